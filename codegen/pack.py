"""A weight in the order in which its contraction reads it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.schedule import TooIrregularError

Ints = NDArray[np.integer[Any]]

#: Most rows of a contraction that are computed together: with two vectors per tile, 12 accumulators of the 16 registers of AVX2.
ROWS = 6
#: Rows that hide the latency of a multiply-add, and what a row less than ROWS costs, as the other factor is read more often.
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
    height: int  # rows that are computed together


def height(rows: int) -> int:
    """How many of a block's rows to compute together: what leaves few places empty."""

    def cost(h: int) -> float:
        return -(-rows // h) * max(h, LATENCY) * (1 + READING * (ROWS - h))

    return min(range(1, ROWS + 1), key=cost)


def pack(v: ir.Contract) -> tuple[list[Block], Ints]:
    """Row blocks of a contraction with a weight, and the weight's elements in the order they are read."""
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
        rows = stop - first
        h = height(rows)
        padded = -(-rows // h) * h
        block = np.full((padded, ib.shape[1]), -1, np.int32)
        block[:rows] = ia[first:stop]
        pieces.append(block.reshape(-1, h, ib.shape[1]).transpose(0, 2, 1).reshape(-1))
        blocks.append(Block(first, rows, np.maximum(ib[first], 0).astype(np.int32), offset, h))
        offset += block.size
    return blocks, np.concatenate(pieces)
