"""A weight in the order in which its contraction reads it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.schedule import TooIrregularError

Ints = NDArray[np.integer[Any]]

#: Most rows of a contraction that are computed together, by vector registers; with two vectors per tile, three quarters of those are sums.
ROWS = {16: 6, 32: 12}
#: Rows that lie side by side where they are put into vectors: a vector of the widest machine, so that text and weights are alike for all.
WIDEST = 16
#: Rows that hide the latency of a multiply-add, and what a row less than the most costs, as the other factor is read more often.
LATENCY, READING = 4, 0.03


@dataclass(frozen=True)
class Packed:
    """A weight in the order its contraction reads it: elements `index` of parameter `slot` (-1: zero), [lanes or 1, numbers]."""

    slot: int
    index: ir.Index


@dataclass
class Block:
    """Consecutive rows of a contraction that read the same elements of its vector operand."""

    first: int
    rows: int
    columns: Ints
    offset: int  # in the packed weight
    height: int  # rows that lie side by side in it, column by column


def height(rows: int, most: int) -> int:
    """How many of a block's rows to compute together, at most so many: what leaves few places empty."""

    def cost(h: int) -> float:
        return -(-rows // h) * max(h, LATENCY) * (1 + READING * (most - h))

    return min(range(1, most + 1), key=cost)


def pack(v: ir.Contract, height: Callable[[int], int]) -> tuple[list[Block], Ints]:
    """Row blocks of a contraction with a weight, and the weight's elements in the order they are read.

    height: how many of so many rows are to lie side by side.
    """
    ia, ib = v.ia.array, v.ib.array
    if (ib < 0).any() or not (ib == ib[:1]).all():
        # Rows that read different elements: if they share most of them, give every row all of them with zero weights.
        union = np.flatnonzero(np.bincount(ib[ib >= 0]))
        if len(union) <= 4 * ib.shape[1] or len({r.tobytes() for r in ib}) > len(ib) // 2:
            column = np.zeros(int(union.max(initial=0)) + 1, np.int32)
            column[union] = np.arange(len(union))
            wide = np.full((len(ib), len(union)), -1, np.int32)
            rows, cols = np.nonzero(ib >= 0)
            target = column[ib[rows, cols]]
            if not ir.distinct(rows * len(union) + target):
                raise TooIrregularError("a row that reads one element twice")
            wide[rows, target] = ia[rows, cols]
            ia, ib = wide, np.broadcast_to(union.astype(np.int32), wide.shape)
    starts = np.concatenate([[0], np.flatnonzero((np.diff(ib, axis=0) != 0).any(1)) + 1, [len(ib)]])
    blocks, pieces, offset = [], [], 0
    for first, stop in itertools.pairwise(starts.tolist()):
        h = height(stop - first)
        pieces.append(side_by_side(ia[first:stop], h))
        blocks.append(Block(first, stop - first, np.maximum(ib[first], 0).astype(np.int32), offset, h))
        offset += pieces[-1].size
    return blocks, np.concatenate(pieces)


def side_by_side(rows: Ints, height: int, fill: int = -1) -> Ints:
    """[rows, columns] with so many rows side by side, column by column; `fill` where there are no more."""
    padded = np.full((-(-len(rows) // height) * height, rows.shape[1]), fill, np.int32)
    padded[: len(rows)] = rows
    return padded.reshape(-1, height, rows.shape[1]).transpose(0, 2, 1).reshape(-1)
