"""Which state numbers a next state number depends on, and what follows: independent lanes, and an order of blocks.

The pattern is computed element by element through the program, so it is exact up to cancellation: a False is a proof that
the Jacobian entry is zero, whatever the values of inputs and parameters (constants that are zero count as zero).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Program, Value
from seqparc.ops import OPS

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """The dependence of next state numbers (rows) on state numbers (columns), flat over all slots of one sample.

    components  groups of state numbers that never meet, each sorted
    order       strongly connected groups of the whole, in the order they can be solved in
    """

    pattern: Bools
    components: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> str:
        """ "diagonal", "block", "block-triangular" or "dense"; "none" if the next state ignores the state."""
        if not self.pattern.any():
            return "none"
        largest = max(map(len, self.components))
        if largest == 1:
            return "diagonal"
        if any(len(g) < largest for g in self.order):
            return "block-triangular"
        return "block" if len(self.components) > 1 else "dense"


def pattern(program: Program) -> Bools:
    """[next numbers, state numbers] of a program with one lane: where the Jacobian may be non-zero."""
    offsets = np.concatenate([[0], np.cumsum(program.state_sizes)])
    total = int(offsets[-1])
    empty = np.zeros((0, total), bool)
    done: dict[Value, Bools] = {}
    for v in ir.topological(program.next):
        match v:
            case ir.Leaf(kind="state", slot=slot, index=index):
                rows = np.zeros((v.size, total), bool)
                rows[np.arange(v.size), offsets[slot] + index.array[0]] = True
            case ir.Leaf() | ir.Const():
                rows = np.zeros((v.size, total), bool)
            case ir.Map(op=op, operands=operands):
                parts = [done[a] for i, a in enumerate(operands) if not _steps(op)]
                rows = np.logical_or.reduce(parts) if parts else np.zeros((v.size, total), bool)
                if _steps(op):
                    # piecewise constant: the derivative is zero, but the value still depends on the state
                    rows = np.logical_or.reduce([done[a] for a in operands])
            case ir.Gather(sources=sources, which=which, index=index):
                rows = np.zeros((v.size, total), bool)
                for j, s in enumerate(sources):
                    at = which.array == j
                    rows[at] = done[s][index.array[at]]
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                rows = _any(ia.array, done.get(a, empty)) | _any(ib.array, done.get(b, empty))
            case ir.Reduce(x=x, index=index):
                rows = _any(index.array, done[x])
            case _:
                raise TypeError(type(v).__name__)
        done[v] = rows
    return np.concatenate([done[v] for v in program.next])


def _steps(op: str) -> bool:
    """Operations whose value jumps while their derivative is zero everywhere."""
    row = OPS[op]
    return row.partials is not None and all(p == "0" for p in row.partials)


def _any(index: NDArray[np.int32], rows: Bools) -> Bools:
    """out[e] = any over k of rows[index[e, k]]; -1 is nothing."""
    if not rows.any():
        return np.zeros((index.shape[0], rows.shape[1]), bool)
    used = np.zeros((index.shape[0], rows.shape[0] + 1), np.float32)
    used[np.arange(index.shape[0])[:, None], index] = 1.0  # -1 lands in the last column, which is cut off
    return (used[:, :-1] @ rows.astype(np.float32)) > 0


def analyse(program: Program) -> Structure:
    """The structure of a program with one lane."""
    p = pattern(program)
    return Structure(p, *groups(p))


def groups(p: Bools) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Components and, in an order they can be solved in, strongly connected groups."""
    # A row is an integer of as many bits, so that a dense pattern of thousands takes no longer than a sparse one.
    packed = np.packbits(p, axis=1, bitorder="little"), np.packbits(p, axis=0, bitorder="little").T
    needs, needed = ([int.from_bytes(row.tobytes(), "little") for row in bits] for bits in packed)
    meets = [a | b for a, b in zip(needs, needed, strict=True)]
    return tuple(sorted(strongly_connected(meets, meets))), strongly_connected(needs, needed)


def strongly_connected(needs: list[int], needed: list[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of numbers that need each other, each after all that it needs (Kosaraju 1978).

    Bit j of needs[i], and bit i of needed[j]: i needs j.
    """
    last = [i for found in _walk(needed, range(len(needed))) for i in found]
    return tuple(tuple(sorted(group)) for group in _walk(needs, reversed(last)) if group)


def _walk(follow: list[int], roots: Iterable[int]) -> Iterator[list[int]]:
    """For every root what it leads to that no earlier one did, each after all that was found from there."""
    new = (1 << len(follow)) - 1
    for root in roots:
        path, found = [root] if new >> root & 1 else [], []
        new &= ~(1 << root)
        while path:
            if ahead := follow[path[-1]] & new:
                path.append(ahead.bit_length() - 1)
                new ^= 1 << path[-1]
            else:
                found.append(path.pop())
        yield found
