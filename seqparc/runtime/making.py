"""Kernels made beside whatever comes next: compilers are other processes, and there is mostly a core idle."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: compiling makes many objects that stay, and a full round looks through all of torch's (0.1 s).

    Afterwards all there is counts as old, unless somebody keeps objects from collection: so many new ones would else bring about a full
    round at once.
    """
    was = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class Begun(Generic[T]):
    """Something that is being made. What is not ready when the process ends is not waited for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._process, self._future = os.getpid(), Future[T]()
        threading.Thread(target=self._run, args=(make,), name="seqparc", daemon=True).start()

    def _run(self, make: Callable[[], T]) -> None:
        try:
            self._future.set_result(make())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> T | None:
        """It, when it is there; None if it failed, which is to be believed when it has failed again, or if another process makes it."""
        if os.getpid() != self._process or self._future.exception() is not None:
            return None
        return self._future.result()
