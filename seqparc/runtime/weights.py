"""Gradients of the parameters, from what an adjoint's kernel read and wrote: sums over steps, and one product for each weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Pieces of a sum over all steps, none shorter than LEAST: enough for the cores of a processor, and few enough to add up.
PIECES, LEAST = 8, 64


class Places:
    """Indices of a plan as torch wants them, flat and on a device, each made once."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, index: Any, device: torch.device) -> Tensor:
        if (index, device) not in self._made:
            self._made[index, device] = torch.from_numpy(index.array.reshape(-1).astype(np.int64)).to(device)
        return self._made[index, device]


@functools.lru_cache(1024)
def _first(index: Any) -> int | None:
    """The first of the numbers of an index, if every one is one more than the one before."""
    flat = index.array.reshape(-1)
    return int(flat[0]) if flat.size and bool((np.diff(flat) == 1).all()) else None


@functools.lru_cache(1024)
def _rows_count(index: Any) -> bool:
    """Whether every row of an index is 0, 1, 2 …"""
    return bool((index.array == np.arange(index.shape[1])).all())


def of_params(
    adjoint: Any, emits: Sequence[Tensor | None], sums: Sequence[Tensor], read: Sequence[Tensor], params: Sequence[Tensor], places: Places
) -> list[Tensor | None]:
    """The gradient of each parameter, flat, or None. emits, sums, read: what the adjoint's kernel wrote, and the streams it read."""
    found: list[Tensor | None] = [None] * len(params)
    for e in adjoint.params:
        total = sums[e.slot]
        total = (total.view(-1) if total.shape[0] == total.shape[1] == 1 else total.sum((0, 1))).to(params[e.target].dtype)
        if not e.direct:
            total = total.new_zeros(params[e.target].numel()).index_add_(0, places(e.columns, total.device), total)
        found[e.target] = _plus(found[e.target], total)
    for o in adjoint.outers:
        found[o.param] = _plus(found[o.param], _outer(o, emits, read, params, places))
    return found


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def in_one(batch: int, steps: int, narrow: int) -> bool:
    """Whether a sum is made by one product, since those of single samples would take more room than copies of the factors."""
    return batch > 1 and narrow >= steps


def _product(d: Tensor, x: Tensor) -> Tensor:
    """Σ over samples and steps of d xᵀ: [batch, time, m] and [batch, time, k] give [m, k].

    In pieces of the sum, by samples, so that nothing is copied, and on a processor by stretches of time: one product of long thin
    matrices runs in one thread. The narrow one is best the left one, where there is more to do than to call torch.
    """
    if d.shape[0] == 1 and d.shape[1] < PIECES * LEAST:
        return d[0].t() @ x[0]
    if x.shape[-1] > d.shape[-1]:
        return _product(x, d).t()
    batch, steps = d.shape[:2]
    if in_one(batch, steps, x.shape[-1]):
        return (x.flatten(0, 1).t() @ d.flatten(0, 1)).t()
    pieces = max(1, PIECES // max(1, batch)) if d.device.type == "cpu" else 1
    if pieces == 1 or steps < pieces * LEAST:
        return torch.bmm(x.transpose(1, 2), d).sum(0).t()
    whole = steps // pieces * pieces
    total = torch.bmm(x[:, whole:].transpose(1, 2), d[:, whole:]).sum(0)  # what is left over
    for x_b, d_b in zip(x[:, :whole].unbind(0), d[:, :whole].unbind(0), strict=True):
        total += torch.bmm(x_b.unflatten(0, (pieces, -1)).transpose(1, 2), d_b.unflatten(0, (pieces, -1))).sum(0)
    return total.t()


def _outer(o: Any, emits: Sequence[Tensor | None], read: Sequence[Tensor], params: Sequence[Tensor], places: Places) -> Tensor:
    """Σ over steps and samples of delta xᵀ, put where the weight's elements lie."""
    lanes = o.columns.shape[0]
    d, x = emits[o.delta], emits[o.x] if o.x >= 0 else read[-1 - o.x]
    assert d is not None and x is not None
    if o.x < 0 and not (_first(o.columns) == 0 and o.columns.array.size == x.shape[-1]):
        x = x.index_select(-1, places(o.columns, x.device))
    x = x if x.dtype == d.dtype else x.to(d.dtype)
    if lanes == 1:
        first = _first(o.rows)
        m = _product(d if first is None else d.narrow(-1, first, len(o.rows.array)), x)[None]
        m = m if first is not None else m.index_select(1, places(o.rows, m.device))
    else:
        m = torch.einsum("btle,btlk->lek", d.unflatten(-1, (lanes, -1)), x.unflatten(-1, (lanes, -1)))
        m = m.index_select(1, places(o.rows, m.device))
    if o.ix.shape[1] == m.shape[2] and _rows_count(o.ix):
        picked = m
    else:
        at = places(o.ix, m.device).clamp_min(0).reshape(o.ix.shape)
        picked = m.gather(2, at.expand(lanes, -1, -1))
    size = params[o.param].numel()
    if _first(o.target) == 0 and o.target.array.size == size:
        return picked.reshape(-1)
    to = places(o.target, picked.device)  # past the end is what is left out
    return picked.new_zeros(size + 1).index_add_(0, torch.where(to < 0, size, to), picked.reshape(-1))[:size]
