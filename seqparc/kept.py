"""What was made of tensors, kept as long as their numbers stay the same."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Bytes up to which what was made of tensors is kept: to compare larger ones takes about as long as to make it anew.
MOST = 1 << 20

#: Makes something of parameters.
Pack = Callable[[Sequence[Tensor]], list[Tensor]]

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes, _compare.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


class Prepared(list[Tensor]):
    """Parameters as a kernel is given them, and what it packs of them, which is packed when it is first read."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._packed: dict[Pack, tuple[list[Tensor], array[int]]] = {}

    def addresses(self, pack: Pack) -> array[int]:
        """Where the parameters lie, and after them what is packed of them in one way."""
        found = self._packed.get(pack)
        if found is None:
            made = pack(self)
            found = self._packed[pack] = made, array("q", [t.data_ptr() for t in (*self, *made)])
        return found[1]


class Kept:
    """Tensors as they were, and what was made of them, which counts as long as they are bit for bit the same.

    A version counter would not do: who writes to `p.data` does not move that of `p`.
    """

    def __init__(self, of: Sequence[Tensor], made: Any) -> None:
        self.made = made
        with torch.no_grad():
            self._were = [t.clone() for t in of]
        self._at = [(t.data_ptr(), t.nbytes) for t in self._were]

    def still(self, now: Sequence[Tensor]) -> bool:
        """Whether tensors of the same number, shapes and dtypes hold the same numbers."""
        for t, (was, size) in zip(now, self._at, strict=True):
            if not t.is_contiguous() or t.nbytes != size or _compare(t.data_ptr(), was, size):
                return False
        return True


def worth_keeping(tensors: Sequence[Tensor]) -> bool:
    """Whether to compare these is less work than to make something of them, and can be done."""
    return sum(t.nbytes for t in tensors) <= MOST and all(t.is_contiguous() for t in tensors)
