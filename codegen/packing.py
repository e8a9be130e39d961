"""Weights as a C kernel reads them, packed anew only where their numbers have changed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seqparc.codegen.pack import Packed
from seqparc.kept import Kept, worth_keeping


class Packing:
    """Packs the parameters of one kernel in one way."""

    def __init__(self, packed: Sequence[Packed]) -> None:
        self._packed = packed
        self._slots = sorted({p.slot for p in packed})
        self._last: Kept | None = None  # of another call, and maybe of another thread's

    @functools.cached_property
    def _packs(self) -> list[tuple[int, Tensor, Tensor | None]]:
        """Of every packed weight the parameter, where its elements lie in that, and which are none, if any."""
        indices = [torch.from_numpy(p.index.array.reshape(-1).astype(np.int64)) for p in self._packed]
        return [
            (p.slot, index.clamp_min(0), index < 0 if bool((index < 0).any()) else None)
            for p, index in zip(self._packed, indices, strict=True)
        ]  # fmt: skip

    def __call__(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Of contiguous parameters."""
        read = [params[slot] for slot in self._slots]
        last = self._last
        if last is not None and last.still(read):
            return last.made
        made = []
        for slot, index, holes in self._packs:
            weight = params[slot].view(-1).index_select(0, index)
            made.append(weight if holes is None else weight.masked_fill_(holes, 0))
        self._last = Kept(read, made) if worth_keeping(read) else None
        return made
