"""OpenMP across a fork.

GNU's keeps the threads of a parallel region for the next one, and a forked child, which has none of them, waits for them for ever: in
torch's operations as in our kernels. So they are let go before a fork, and parent and child start others when they need them.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

#: omp_pause_soft: threads go, settings stay.
_SOFT = 1

_pausing: dict[int, Any] = {}  # by address: torch's OpenMP and that of kernels may be two
_let_go = _alone = False


def runs_on(library: ctypes.CDLL) -> None:
    """Note the OpenMP that a library runs on, if it does on one that can let go of its threads (since version 5.0)."""
    try:
        pause = library.omp_pause_resource_all
    except AttributeError:
        return
    pause.argtypes, pause.restype = [ctypes.c_int], ctypes.c_int
    _pausing[ctypes.cast(pause, ctypes.c_void_p).value or 0] = pause


def threads() -> int:
    """Threads that a kernel may run on: torch's, but one in a child that was forked from a process that could not let go of its own."""
    return 1 if _alone else torch.get_num_threads()


def _before() -> None:
    global _let_go
    left = [pause(_SOFT) for pause in list(_pausing.values())]
    _let_go = bool(left) and not any(left)


def _in_child() -> None:
    global _alone
    _alone = _alone or not _let_go


runs_on(ctypes.CDLL(None))
os.register_at_fork(before=_before, after_in_child=_in_child)
