"""How much memory a call takes: the resident set, as the system counts it, and so whatever allocates it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")
#: The C library; glibc's has malloc_trim and mallopt.
LIBC = ctypes.CDLL(None)
ARENA_MAX = -8

with contextlib.suppress(AttributeError):
    LIBC.mallopt(ARENA_MAX, 1)  # one heap for all threads: malloc_trim leaves the free ends of the others as they are


def peak(call: Callable[[], Any]) -> tuple[int | None, Any]:
    """Bytes by which the process grew during a call, at most, above what was there before, or None where the system does not tell; and what
    the call returns.

    What earlier calls freed is given back to the system first: else a call that reuses it would seem to take nothing. Pages are counted in
    batches: to about a quarter of a MiB.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):
        LIBC.malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak so far is forgotten
        before = _bytes("VmRSS")
    except OSError:
        return None, call()
    result = call()
    return max(0, _bytes("VmHWM") - before), result


def _bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    return 1024 * int(found[1])
