"""Gradients of the parameters, from what an adjoint's kernel read and wrote: sums over steps, and one product for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Places:
    """Indices of a plan as torch wants them, flat and on a device, each made once."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, index: Any, device: torch.device) -> Tensor:
        if (index, device) not in self._made:
            self._made[index, device] = torch.from_numpy(index.array.reshape(-1).astype(np.int64)).to(device)
        return self._made[index, device]


def of_params(
    adjoint: Any, emits: Sequence[Tensor | None], sums: Sequence[Tensor], read: Sequence[Tensor], params: Sequence[Tensor], places: Places
) -> list[Tensor | None]:
    """The gradient of each parameter, flat, or None. emits, sums, read: what the adjoint's kernel wrote, and the streams it read."""
    found: list[Tensor | None] = [None] * len(params)
    for e in adjoint.params:
        total = sums[e.slot].sum((0, 1)).to(params[e.target].dtype)
        if not e.direct:
            total = total.new_zeros(params[e.target].numel()).index_add_(0, places(e.columns, total.device), total)
        found[e.target] = _plus(found[e.target], total)
    for o in adjoint.outers:
        found[o.param] = _plus(found[o.param], _outer(o, emits, read, params, places))
    return found


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _outer(o: Any, emits: Sequence[Tensor | None], read: Sequence[Tensor], params: Sequence[Tensor], places: Places) -> Tensor:
    """Σ over steps and samples of delta xᵀ, put where the weight's elements lie."""
    lanes = o.columns.shape[0]
    delta = emits[o.delta]
    assert delta is not None
    d = delta.reshape(delta.shape[0] * delta.shape[1], lanes, delta.shape[-1] // lanes)
    if o.x >= 0:
        given = emits[o.x]
        assert given is not None
        x = given.reshape(d.shape[0], lanes, given.shape[-1] // lanes)
    else:
        given = read[-1 - o.x]
        x = given.reshape(d.shape[0], given.shape[-1])
        if not np.array_equal(o.columns.array.reshape(-1), np.arange(given.shape[-1])):
            x = x.index_select(-1, places(o.columns, x.device))
        x = x if x.dtype == d.dtype else x.to(d.dtype)
        x = x.reshape(d.shape[0], lanes, x.shape[-1] // lanes)
    if lanes == 1:
        m = (d[:, 0].t() @ x[:, 0])[None]
    else:
        m = torch.einsum("nle,nlk->lek", d, x)
    ix = o.ix.array
    if ix.shape[1] == m.shape[2] and bool((ix == np.arange(m.shape[2])).all()):
        picked = m
    else:
        at = places(o.ix, m.device).clamp_min(0).reshape(ix.shape)
        picked = m.gather(2, at.expand(lanes, -1, -1))
    target = o.target.array.reshape(-1)
    size = params[o.param].numel()
    if np.array_equal(target, np.arange(size)):
        return picked.reshape(-1)
    to = places(o.target, picked.device)  # past the end is what is left out
    return picked.new_zeros(size + 1).index_add_(0, torch.where(to < 0, size, to), picked.reshape(-1))[:size]
