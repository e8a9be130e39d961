"""The gap between chunks, on a GPU in one kernel."""

# mypy: ignore-errors
# ruff: noqa: F821
# What the names and types in a kernel mean, only Triton's compiler knows.

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqparc.codegen.launcher import Launcher

#: Entries of a tile: chunks by state numbers.
TILE = 1024


@triton.jit(
    do_not_specialize=["marks_at", "chunks", "numbers", "row", "atol", "rtol"],
    do_not_specialize_on_alignment=["start", "end", "sizes", "worst", "marks"],
)
def _gap(
    start, end, sizes, worst, marks, marks_at: "i64", chunks: "i32", numbers: "i64", row: "i64", atol: "fp64", rtol: "fp64",
    CHUNKS: tl.constexpr, NUMBERS: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """The move of every start state, in units of the tolerance, and its largest: of every chunk into `worst`, or, with MARK, of all,
    with those chunks' start states replaced by the ends they should be, and `marks` [chunks + 1, samples] made: in row 0 how many
    chunks of a sample are left from the first that moved, in row c + 1 whether chunk c moved."""
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    sample = i // row
    most = tl.zeros([1, NUMBERS], tl.float64)  # in the chunks so far
    for begin in range(1, chunks, CHUNKS):
        c = (begin + tl.arange(0, CHUNKS)).to(tl.int64)[:, None]
        mine = (i < numbers) & (c < chunks)
        s = tl.load(start + c * numbers + i, mask=mine, other=0.0)
        e = tl.load(end + (c - 1) * numbers + i, mask=mine, other=0.0)
        a, b = s.to(tl.float64), e.to(tl.float64)
        size = tl.load(sizes + (c - 1) * numbers + i, mask=mine, other=0.0).to(tl.float64)
        size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), size)  # NaN is left out
        so_far = tl.maximum(tl.associative_scan(tl.where(size < float("inf"), size, 0.0), 0, _larger), most)
        most = tl.max(so_far, 0, keep_dims=True)
        same = (a == b) | ((a != a) & (b != b))
        move = tl.abs(b - a) / tl.where(same, 1.0, atol * so_far + rtol * size)
        move = tl.where(same, 0.0, tl.where(move != move, float("inf"), move))
        # The largest is the same in whatever order it is found.
        if MARK:
            tl.atomic_max(worst + marks_at // ((chunks + 1) * (numbers // row)), tl.max(move))
            moved = mine & (move > 1.0)
            tl.store(start + c * numbers + i, e, mask=moved)
            mark = marks + marks_at + sample
            tl.store(mark + (c + 1) * (numbers // row), tl.full(moved.shape, 1, tl.int32), mask=moved)
            tl.atomic_max(mark + c * 0, (chunks - c + i * 0).to(tl.int32), mask=moved)
        else:
            tl.atomic_max(worst + (c - 1), tl.max(move, 1, keep_dims=True), mask=c < chunks)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


LAUNCH = Launcher(_gap)


def measure(
    start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float, worst: Tensor, marks: Tensor | None = None, at: int = 0
) -> None:
    """Launch the kernel: start, end, sizes [chunks, batch, row]; worst zeros [chunks - 1], or [passes] and `marks` zeros from `at` on."""
    chunks, batch, row = start.shape
    wide = min(64, 1 << (batch * row - 1).bit_length())
    args = (start, end, sizes, worst, marks, at, chunks, batch * row, row, atol, rtol)
    LAUNCH(-(-batch * row // wide), args, {"CHUNKS": TILE // wide, "NUMBERS": wide, "MARK": marks is not None}, 4)


def gap(start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
    """See `seqparc.runtime.driver.Kernel`."""
    worst = torch.zeros(start.shape[0] - 1, dtype=torch.float64, device=start.device)
    measure(start, end, sizes, atol, rtol, worst)
    found = worst.cpu()
    return float(found.max()), found
