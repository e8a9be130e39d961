"""The diagonal of a step's Jacobian, as a lane program: a correction as cheap as the states, for states too large for the whole matrix.

Every state number i carries d_i, the product of ∂s_i/∂s_i over the steps since its chunk began. What is followed is the way from state
number i to itself that elementwise operations make, and through each product or sum the one term that continues it: of W r(h)·h, for
instance, W_ii ∂(r_i h_i)/∂h_i. Ways that leave number i and come back are left out, as quasi-DEER leaves out whatever is not on the
diagonal (Gonzalez et al., arXiv 2407.19115). It is a correction, not a certificate: the gap decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Leaf, Program, Value
from seqparc.passes.partial import carry

Ints = NDArray[np.integer[Any]]


def diagonal(program: Program) -> Program:
    """A lane program extended by the running product of its Jacobian's diagonal, one more state slot of [lanes, n]."""
    n, slot = program.n, len(program.state_sizes)
    d = ir.leaf("state", slot, np.arange(program.lanes * n).reshape(program.lanes, n))
    follow = _Follow(program, d)
    offsets = np.concatenate([[0], np.cumsum([v.size for v in program.state])])
    rows = [follow.derivative(v, np.arange(v.size), offsets[k] + np.arange(v.size)) for k, v in enumerate(program.next)]
    sizes = [v.size for v in program.next]
    following = ir.gather(
        [r if r is not None else ir.const(0.0, s) for r, s in zip(rows, sizes, strict=True)],
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate([np.arange(s) for s in sizes]),
    )
    return Program(
        name="diagonal", lanes=program.lanes, state=(*program.state, d), next=(*program.next, following), emits=program.emits,
        sums=program.sums, state_sizes=(*program.state_sizes, program.lanes * n), stream_sizes=program.stream_sizes,
        param_sizes=program.param_sizes, emit_sizes=program.emit_sizes, sum_sizes=program.sum_sizes,
    )  # fmt: skip


class _Follow:
    """∂value[e]/∂(state number i) · d_i for pairs (e, i), along elementwise ways."""

    def __init__(self, program: Program, d: Leaf) -> None:
        self.d, self.n = d, program.n
        self.first = dict(zip(program.state, np.cumsum([0, *(v.size for v in program.state[:-1])]).tolist(), strict=True))
        self.near: dict[Value, NDArray[np.bool_]] = {}  # [size, n]: state numbers that reach an element elementwise; absent: none
        self.made: dict[tuple[Value, bytes, bytes], Value | None] = {}
        for v in ir.topological(program.next):
            self._find(v)

    def _find(self, value: Value) -> None:
        reached = [a for a in value.args if a in self.near] if isinstance(value, (ir.Map, ir.Gather)) else []
        if value not in self.first and not reached:
            return
        found = self.near[value] = np.zeros((value.size, self.n), bool)
        match value:
            case Leaf():
                found[np.arange(value.size), self.first[value] + np.arange(value.size)] = True
            case ir.Map():
                for a in reached:
                    found |= self.near[a]
            case ir.Gather(sources=sources, which=which, index=index):
                for j, source in enumerate(sources):
                    if source in self.near:
                        mine = which.array == j
                        found[mine] = self.near[source][index.array[mine]]

    def derivative(self, value: Value, elements: Ints, numbers: Ints) -> Value | None:
        """A value of len(elements) numbers; None if all are zero."""
        key = value, elements.astype(np.int64).tobytes(), numbers.astype(np.int64).tobytes()
        if key not in self.made:
            self.made[key] = self._derivative(value, elements, numbers) if len(elements) else None
        return self.made[key]

    def _derivative(self, value: Value, elements: Ints, numbers: Ints) -> Value | None:
        total: Value | None = None
        match value:
            case Leaf() if value in self.first:
                own = self.first[value] + elements == numbers
                return ir.take(self.d, np.where(own, numbers, -1)) if own.any() else None
            case ir.Map(op=op, operands=operands):
                args, y = tuple(ir.take(a, elements) for a in operands), ir.take(value, elements)
                for k, a in enumerate(operands):
                    inner = self.derivative(a, elements, numbers)
                    if inner is not None:
                        total = _plus(total, carry(op, k, args, y, inner))
            case ir.Gather(sources=sources, which=which, index=index):
                from_, at = which.array[elements], index.array[elements]
                parts: list[Value] = []
                place: Ints = np.full((2, len(elements)), -1)
                for j, source in enumerate(sources):
                    mine = np.flatnonzero(from_ == j)
                    inner = self.derivative(source, at[mine], numbers[mine])
                    if inner is not None:
                        place[0, mine], place[1, mine] = len(parts), np.arange(len(mine))
                        parts.append(inner)
                total = ir.gather(parts, *place) if parts else None
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                for one, other, index_one, index_other in ((b, a, ib.array, ia.array), (a, b, ia.array, ib.array)):
                    terms, inner = self._terms(one, index_one[elements], numbers)
                    if inner is not None:
                        width = np.take_along_axis(index_other[elements], np.maximum(terms[0], 0), 1)
                        total = _plus(total, ir.contract(other, inner, np.where(terms[1] < 0, -1, width), terms[1]))
            case ir.Reduce(fold="sum", x=x, index=index):
                terms, inner = self._terms(x, index.array[elements], numbers)
                total = None if inner is None else ir.reduce_("sum", inner, terms[1])
        return total

    def _terms(self, x: Value, index: Ints, numbers: Ints) -> tuple[Ints, Value | None]:
        """Of sums over x[index[e, q]], the terms that state number numbers[e] reaches elementwise.

        Returns [which q, place in the derivative] × [e, terms], -1 where a row has fewer, and their derivatives.
        """
        if x not in self.near:
            return np.zeros((2, 0, 0), int), None
        live = (index >= 0) & self.near[x][np.maximum(index, 0), numbers[:, None]]
        rows, q = np.nonzero(live)
        rank: Ints = np.arange(len(rows)) - np.searchsorted(rows, rows)
        order = np.argsort(rank, kind="stable")  # first terms, second terms, …: elements that lie side by side stay so
        rows, q, rank = rows[order], q[order], rank[order]
        table: Ints = np.full((2, len(index), int(rank.max(initial=0)) + 1), -1)
        table[0, rows, rank], table[1, rows, rank] = q, np.arange(len(rows))
        return table, self.derivative(x, index[rows, q], numbers[rows])


def _plus(a: Value | None, b: Value | None) -> Value | None:
    return b if a is None else a if b is None else ir.map_("add", a, b)
