"""Locks between threads. A forked child finds them free: whoever held one in the parent is not there to give it back."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


class Lock:
    """`with lock():` one thread at a time, which may take it again."""

    def __init__(self) -> None:
        self._inner = threading.RLock()
        _LOCKS.add(self)

    def __call__(self) -> Any:
        """The lock of this process."""
        return self._inner


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _free() -> None:
    for lock in _LOCKS:
        lock._inner = threading.RLock()


os.register_at_fork(after_in_child=_free)

#: Held while a user's cell is called or changed to find out about it: what it keeps on itself, and its parameters, may be others meanwhile.
LOOKING = Lock()
