"""Room for large results on a processor.

The C library gives a large piece of memory back to the system when it is freed, and has it made anew, zeros and all, page by page as it
is first written: 1.8 µs for each 4 KiB, which for an elementwise cell is more than the kernel takes. Asked for in pages of 2 MiB it comes
three to four times as fast.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: Bytes from which glibc never keeps what is freed (DEFAULT_MMAP_THRESHOLD_MAX).
LARGE = 32 << 20
#: Of Linux; see madvise(2).
_HUGE, _PAGE = 14, 4096


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise  # type: ignore[no-any-return]


def room(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of a shape, of the dtype and on the device of another."""
    made = like.new_empty(shape)
    if made.nbytes >= LARGE and made.device.type == "cpu" and (advise := _madvise()) is not None:
        begin = -(-made.data_ptr() // _PAGE) * _PAGE
        advise(begin, (made.data_ptr() + made.nbytes - begin) // _PAGE * _PAGE, _HUGE)  # advice: where it is not taken nothing is lost
    return made
