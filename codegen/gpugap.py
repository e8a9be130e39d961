"""The gap between chunks, on a GPU in one kernel."""

# mypy: ignore-errors
# What the names in a kernel mean, only Triton's compiler knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries of a tile: chunks by state numbers.
TILE = 1024


@triton.jit
def _gap(start, end, sizes, worst, chunks, numbers, atol, rtol, CHUNKS: tl.constexpr, NUMBERS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    most = tl.zeros([1, NUMBERS], tl.float64)  # in the chunks so far
    for first in range(1, chunks, CHUNKS):
        c = (first + tl.arange(0, CHUNKS)).to(tl.int64)[:, None]
        mine = (i < numbers) & (c < chunks)
        a = tl.load(start + c * numbers + i, mask=mine, other=0.0).to(tl.float64)
        b = tl.load(end + (c - 1) * numbers + i, mask=mine, other=0.0).to(tl.float64)
        size = tl.load(sizes + (c - 1) * numbers + i, mask=mine, other=0.0).to(tl.float64)
        size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), size)  # NaN is left out
        so_far = tl.maximum(tl.associative_scan(tl.where(size < float("inf"), size, 0.0), 0, _larger), most)
        most = tl.max(so_far, 0, keep_dims=True)
        same = (a == b) | ((a != a) & (b != b))
        move = tl.abs(b - a) / tl.where(same, 1.0, atol * so_far + rtol * size)
        move = tl.where(same, 0.0, tl.where(move != move, float("inf"), move))
        move = tl.max(move, 1, keep_dims=True)
        tl.atomic_max(worst + (c - 1), move, mask=c < chunks)  # the largest is the same in whatever order


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


def gap(start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
    """See `seqparc.runtime.driver.Kernel`."""
    chunks, numbers = start.shape[0], start[0].numel()
    worst = torch.zeros(chunks - 1, dtype=torch.float64, device=start.device)
    wide = min(64, triton.next_power_of_2(numbers))
    _gap[(-(-numbers // wide),)](start, end, sizes, worst, chunks, numbers, atol, rtol, CHUNKS=TILE // wide, NUMBERS=wide)
    found = worst.cpu()
    return float(found.max()), found
