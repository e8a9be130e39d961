"""Weights as a C kernel reads them, packed anew only where their numbers have changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seqparc.codegen.pack import Packed
from seqparc.kept import Kept, Prepared, worth_keeping


class Packing:
    """Packs parameters for one kernel."""

    def __init__(self, packed: Sequence[Packed]) -> None:
        # Of every packed weight the parameter, where its elements lie in that, and which are none, if any.
        self._packs: list[tuple[int, Tensor, Tensor | None]] = []
        for p in packed:
            index = torch.from_numpy(p.index.array.reshape(-1).astype(np.int64))
            self._packs.append((p.slot, index.clamp_min(0), index < 0 if bool((index < 0).any()) else None))
        self._slots = sorted({p.slot for p in packed})
        self._last: Kept | None = None  # of another call, and maybe of another thread's

    def __call__(self, params: Sequence[Tensor]) -> Prepared:
        if isinstance(params, Prepared):
            return params
        given = [p if p.is_contiguous() else p.contiguous() for p in params]
        read = [given[slot] for slot in self._slots]
        last = self._last
        if last is None or not last.still(read):
            made = []
            for slot, index, holes in self._packs:
                weight = given[slot].view(-1).index_select(0, index)
                made.append(weight if holes is None else weight.masked_fill_(holes, 0))
            self._last = Kept(read, made) if worth_keeping(read) else None
            return Prepared([*given, *made])
        return Prepared([*given, *last.made])
