"""Derivatives of a lane program, as lane programs.

Write one step as s' = f(s, u, θ), and μ for the cotangent that arrives at s' from later steps, ḡ for the one from this
step's output. With λ = μ + ḡ,

    μ_before = (∂f/∂s)ᵀ λ,      ū = (∂f/∂u)ᵀ λ,      θ̄ = Σ over steps and lanes of (∂f/∂θ)ᵀ λ.

The first is a recurrence again, run from the right and linear in μ: `adjoint` returns it as a program whose state is μ and
whose streams are u, s and ḡ, so everything that runs f runs it too. For a weight in a contraction out = W x, θ̄ is a sum of
outer products λ_out xᵀ over all steps: the program emits both factors and one matrix product makes the sum.

`jacobian` extends a program by A, the product of its step Jacobians since the chunk began: A' = (∂f/∂s) A, in forward
mode. Again a program like any other, with more state.

Both are written with the partial derivatives of the operation table. They are the derivative of f as a function; a cell
that overrides its own gradient is handled where the cell is traced, and its Jacobian here stays the true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Index, Leaf, Program, Store, Value
from seqparc.ops import OPS
from seqparc.passes.partial import carry

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Emitted:
    """A gradient the adjoint program emits: its emit slot, and which element of the target each number is [lanes, size].

    `direct`: the slot has the target's own layout. Otherwise its numbers are [lanes, size] and are added up.
    """

    slot: int
    target: int
    columns: Index
    direct: bool


@dataclass(frozen=True)
class Outer:
    """θ̄[param] at target[g, e, k] += Σ over steps of delta[g, rows[e]] · x[g, ix[e, k]]; a target of -1 is left out."""

    param: int
    target: Index
    delta: int  # emit slot, numbers [lanes, those that several weights' cotangents have between them]
    rows: Index
    x: int  # emit slot, numbers [lanes, columns]; or -1 - stream slot, then `columns` says which of its elements
    columns: Index
    ix: Index


@dataclass(frozen=True)
class Adjoint:
    """The adjoint program and what its outputs mean.

    Streams of the program: u slots, then the state before the step, then ḡ, the last two per state slot.
    """

    program: Program
    streams: tuple[Emitted, ...]
    params: tuple[Emitted, ...]  # their slots count sums, not emits
    outers: tuple[Outer, ...]

    def idle(self, wanted: Sequence[bool] | None) -> frozenset[int]:
        """Emit slots that need not be written where only some streams' gradients are wanted."""
        if wanted is None:
            return frozenset()
        read = {slot for o in self.outers for slot in (o.delta, o.x)} | {e.slot for e in self.streams if wanted[e.target]}
        return frozenset(e.slot for e in self.streams) - read


def _add(a: Value | None, b: Value | None) -> Value | None:
    """The sum of two cotangents; two that fill each other's holes are put together instead."""
    if a is None or b is None:
        return a if b is None else b
    if isinstance(a, ir.Gather) and isinstance(b, ir.Gather):
        mine = a.which.array >= 0
        if not (mine & (b.which.array >= 0)).any():
            which = np.where(mine, a.which.array, np.where(b.which.array < 0, -1, b.which.array + len(a.sources)))
            return ir.gather((*a.sources, *b.sources), which, np.where(mine, a.index.array, b.index.array))
    return ir.map_("add", a, b)


def _inverse(index: Ints, size: int) -> Ints:
    """[size, most] positions of the flat index that hold each element, padded with -1."""
    flat = index.reshape(-1)
    live = np.flatnonzero(flat >= 0)
    order = live[np.argsort(flat[live], kind="stable")]
    counts = np.bincount(flat[live], minlength=size)
    table = np.full((size, max(1, int(counts.max(initial=0)))), -1, np.int32)
    rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    table[flat[order], rank] = order
    return table


def _spread_back(cotangent: Value, index: Ints, size: int) -> Value:
    """The cotangent of x where y[e] = x[index[e]]."""
    table = _inverse(index, size)
    return ir.take(cotangent, table[:, 0]) if table.shape[1] == 1 else ir.reduce_("sum", cotangent, table)


class _Reverse:
    """Reverse mode over one lane program."""

    def __init__(self, values: list[Value]) -> None:
        self.order = ir.topological(values)
        self.bar: dict[Value, Value | None] = {}
        self.outers: list[tuple[ir.Contract, Value]] = []
        self.live = {v for v in self.order if _differentiable(v)}

    def give(self, value: Value, cotangent: Value | None) -> None:
        if cotangent is not None and value in self.live:
            self.bar[value] = _add(self.bar.get(value), cotangent)

    def run(self) -> None:
        for value in reversed(self.order):
            bar = self.bar.get(value)
            if bar is not None:
                self.back(value, bar)

    def back(self, value: Value, bar: Value) -> None:
        match value:
            case ir.Map(op=op, operands=operands):
                for i, operand in enumerate(operands):
                    if operand in self.live:
                        self.give(operand, carry(op, i, operands, value, bar))
            case ir.Gather(sources=sources, which=which, index=index):
                for j, source in enumerate(sources):
                    if source in self.live:
                        mine = np.where(which.array == j, index.array, -1)
                        self.give(source, _spread_back(bar, mine, source.size))
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                self.give(b, _contract_back(a, ia.array, ib.array, b.size, bar))
                if isinstance(a, Leaf) and a.kind == "param":
                    self.outers.append((value, bar))
                else:
                    self.give(a, _contract_back(b, ib.array, ia.array, a.size, bar))
            case ir.Reduce(fold="sum", x=x, index=index):
                table = _inverse(index.array, x.size)
                rows = np.where(table < 0, -1, table // index.shape[1])
                self.give(x, ir.take(bar, rows[:, 0]) if rows.shape[1] == 1 else ir.reduce_("sum", bar, rows))
            case ir.Reduce(fold="max", x=x, index=index):
                # Autograd's convention for amax: the elements that tie for the maximum share the cotangent evenly.
                if (np.bincount(index.array[index.array >= 0], minlength=x.size) > 1).any():
                    raise NotImplementedError("the derivative of overlapping maxima")
                table = _inverse(index.array, x.size)[:, 0]
                row = np.where(table < 0, -1, table // index.shape[1])
                hit = ir.map_("eq", x, ir.take(value, row))
                count = ir.reduce_("sum", hit, index.array)
                share = ir.map_("div", bar, count)
                self.give(x, ir.map_("mul", hit, ir.take(share, row)))


def _differentiable(value: Value) -> bool:
    return not isinstance(value, ir.Const) and (not value.args or not isinstance(value, ir.Map) or _smooth(value.op))


def _smooth(op: str) -> bool:
    row = OPS[op]
    return row.partials is None or any(p != "0" for p in row.partials)


def _contract_back(other: Value, i_other: Ints, i_mine: Ints, size: int, bar: Value) -> Value:
    """The cotangent of one factor: x̄[j] = Σ over (e, k) with i_mine[e, k] = j of other[i_other[e, k]] · bar[e]."""
    table = _inverse(i_mine, size)
    safe = np.maximum(table, 0)
    rows = np.where(table < 0, -1, safe // i_mine.shape[1])
    return ir.contract(other, bar, np.where(table < 0, -1, i_other.reshape(-1)[safe]), rows)


def _before(program: Program, state: Leaf) -> Leaf:
    """A leaf of the state as the adjoint reads it: the state before the step, which was kept."""
    return ir.leaf("stream", len(program.stream_sizes) + state.slot, state.index)


def replayed(program: Program) -> dict[Value, Value]:
    """Every value of a step -> the same as its adjoint computes it anew."""

    def rule(v: Value, args: tuple[Value, ...]) -> Value:
        return _before(program, v) if isinstance(v, Leaf) and v.kind == "state" else ir.rebuild(v, args) if args else v

    return ir.rewrite(program.next, rule)


def adjoint(program: Program) -> Adjoint:
    """The adjoint of one step of a lane program."""
    n_streams, n_slots = len(program.stream_sizes), len(program.state_sizes)
    done = replayed(program)
    following = [done[v] for v in program.next]
    mode = _Reverse(following)
    for before, value in zip(program.state, following, strict=True):
        arriving = ir.leaf("state", before.slot, before.index)
        here = ir.leaf("stream", n_streams + n_slots + before.slot, before.index)
        mode.give(value, ir.map_("add", arriving, here))
    mode.run()
    before_step = [mode.bar.get(_before(program, v)) or ir.const(0.0, v.size) for v in program.state]
    emits: list[Store] = []
    sums: list[Store] = []
    emit_sizes = list(program.stream_sizes)
    sum_sizes: list[int] = []
    found = [v for v in mode.order if isinstance(v, Leaf)]

    streams: list[Emitted] = []
    for slot in range(n_streams):
        columns, total = _collect([v for v in found if v.kind == "stream" and v.slot == slot], mode)
        if total is None:
            continue
        flat = columns.reshape(-1)
        direct = ir.distinct(flat)
        where, layout = (slot, columns) if direct else (len(emit_sizes), np.arange(flat.size).reshape(columns.shape))
        if not direct:
            emit_sizes.append(flat.size)
        emits.append(Store(where, Index(layout), total))
        streams.append(Emitted(where, slot, Index(columns), direct))

    params: list[Emitted] = []
    for slot in range(len(program.param_sizes)):
        columns, total = _collect([v for v in found if v.kind == "param" and v.slot == slot], mode)
        if total is not None:
            direct = np.array_equal(np.sort(columns.reshape(-1)), np.arange(program.param_sizes[slot]))
            numbers = columns if direct else np.arange(columns.size).reshape(columns.shape)
            sums.append(Store(len(sum_sizes), Index(numbers), total))
            params.append(Emitted(len(sum_sizes), slot, Index(columns), direct))
            sum_sizes.append(columns.size)

    outers: list[Outer] = []
    emitted: dict[Value, int] = {}

    def emit(value: Value) -> int:
        if value not in emitted:
            numbers = np.arange(program.lanes * value.size).reshape(program.lanes, -1)
            emitted[value] = len(emit_sizes)
            emits.append(Store(len(emit_sizes), Index(numbers), value))
            emit_sizes.append(numbers.size)
        return emitted[value]

    deltas = _together([bar for _, bar in mode.outers])
    for node, bar in mode.outers:
        assert isinstance(node.a, Leaf)
        delta, rows = deltas[bar]
        target = np.where(node.ia.array[None] < 0, -1, node.a.index.array[:, np.maximum(node.ia.array, 0)])
        if isinstance(node.b, Leaf) and node.b.kind == "stream":
            x, columns_x = -1 - node.b.slot, node.b.index
        else:
            x, columns_x = emit(node.b), Index(np.arange(program.lanes * node.b.size).reshape(program.lanes, -1))
        outers.append(Outer(node.a.slot, Index(target.reshape(program.lanes, -1)), emit(delta), Index(rows), x, columns_x, node.ib))

    made = Program(
        name="adjoint", lanes=program.lanes,
        state=tuple(ir.leaf("state", v.slot, v.index) for v in program.state), next=tuple(before_step),
        emits=tuple(emits), sums=tuple(sums), state_sizes=program.state_sizes,
        stream_sizes=(*program.stream_sizes, *program.state_sizes, *program.state_sizes), param_sizes=program.param_sizes,
        emit_sizes=tuple(emit_sizes), sum_sizes=tuple(sum_sizes),
    )  # fmt: skip
    return Adjoint(made, tuple(streams), tuple(params), tuple(outers))


def _together(bars: list[Value]) -> dict[Value, tuple[Value, Ints]]:
    """For every cotangent a value that has its elements, and where they are in that: one value for all, if elements are shared."""
    columns: dict[tuple[Value, int], int] = {}
    rows: dict[Value, Ints] = {}
    for bar in bars:
        rows[bar] = np.array([columns.setdefault(origin, len(columns)) for origin in ir.origins(bar)], np.int32)
    if len(columns) == sum(bar.size for bar in rows):
        return {bar: (bar, np.arange(bar.size, dtype=np.int32)) for bar in rows}
    sources = list(dict.fromkeys(source for source, _ in columns))
    which = {source: k for k, source in enumerate(sources)}
    every = ir.gather(sources, [which[source] for source, _ in columns], [element for _, element in columns])
    return {bar: (every, at) for bar, at in rows.items()}


def _collect(found: list[Leaf], mode: _Reverse) -> tuple[Ints, Value | None]:
    """All cotangents that reach one tensor, added up by element: its columns [lanes, size] and their values."""
    reached = [(v, bar) for v in found if (bar := mode.bar.get(v)) is not None]
    if not reached:
        return np.zeros((0, 0), np.int32), None
    every = np.concatenate([v.index.array for v, _ in reached], axis=1)
    columns, inverse = np.unique(every, axis=1, return_inverse=True)
    if columns.shape[1] == every.shape[1] and len(reached) == 1:
        return every, reached[0][1]
    inverse = inverse.reshape(-1)
    total: Value | None = None
    start = 0
    for v, bar in reached:
        mine = inverse[start : start + v.size]
        start += v.size
        total = _add(total, _spread_back(bar, mine, columns.shape[1]))
    return columns, total


class _Forward:
    """Forward mode, `n` tangents at once: the tangent of a value of size m has size m · n, element e's j-th at e·n + j."""

    def __init__(self, n: int, seeds: dict[Value, Value]) -> None:
        self.n, self.tangent = n, dict(seeds)

    def wide(self, index: Ints) -> Ints:
        """An index over values as an index over their tangents."""
        j = np.arange(self.n, dtype=np.int32)
        grown = np.where(index[..., None] < 0, -1, index[..., None] * self.n + j)
        return np.moveaxis(grown, -1, 1).reshape(index.shape[0] * self.n, *index.shape[1:])

    def repeat(self, value: Value) -> Value:
        return ir.take(value, np.repeat(np.arange(value.size), self.n))

    def run(self, roots: list[Value]) -> None:
        for value in ir.topological(roots):
            if value not in self.tangent and any(a in self.tangent for a in value.args):
                made = self.step(value)
                if made is not None:
                    self.tangent[value] = made

    def step(self, value: Value) -> Value | None:
        t, total = self.tangent, None
        match value:
            case ir.Map(op=op, operands=operands):
                if not _smooth(op):
                    return None
                wide = tuple(self.repeat(a) for a in operands)
                y = self.repeat(value)
                for i, operand in enumerate(operands):
                    if operand in t:
                        total = _add(total, carry(op, i, wide, y, t[operand]))
                return total
            case ir.Gather(sources=sources, which=which, index=index):
                inner = [t.get(s) for s in sources]
                w = np.array([-1 if j < 0 or inner[j] is None else j for j in which.array], np.int32)
                return ir.gather([v or ir.const(0.0) for v in inner], np.repeat(w, self.n), self.wide(index.array))
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                if b in t:
                    total = ir.contract(a, t[b], np.repeat(ia.array, self.n, axis=0), self.wide(ib.array))
                if a in t:
                    total = _add(total, ir.contract(t[a], b, self.wide(ia.array), np.repeat(ib.array, self.n, axis=0)))
                return total
            case ir.Reduce(fold="sum", x=x, index=index):
                return ir.reduce_("sum", t[x], self.wide(index.array))
            case ir.Reduce(x=x, index=index):
                hit = ir.map_("eq", x, ir.take(value, _rows_of(index.array, x.size)))
                count = ir.reduce_("sum", hit, index.array)
                shared = ir.reduce_("sum", ir.map_("mul", self.repeat(hit), t[x]), self.wide(index.array))
                return ir.map_("div", shared, self.repeat(count))
        return None


def _rows_of(index: Ints, size: int) -> Ints:
    table = _inverse(index, size)[:, 0]
    return np.where(table < 0, -1, table // index.shape[1])


def jacobian(program: Program) -> Program:
    """A lane program extended by A = ∂(state now)/∂(state at the chunk's start), one more state slot of [lanes, n, n].

    The order of the state numbers is the program's.
    """
    n, slot = program.n, len(program.state_sizes)
    numbers = np.arange(program.lanes * n * n).reshape(program.lanes, -1)
    a = ir.leaf("state", slot, numbers)
    seeds: dict[Value, Value] = {}
    start = 0
    for v in program.state:
        seeds[v] = ir.take(a, np.arange(start * n, (start + v.size) * n))
        start += v.size
    mode = _Forward(n, seeds)
    mode.run(list(program.next))
    rows = [mode.tangent.get(v) or ir.const(0.0, v.size * n) for v in program.next]
    sizes = [r.size for r in rows]
    following = ir.gather(rows, np.repeat(np.arange(len(rows)), sizes), np.concatenate([np.arange(s) for s in sizes]))
    return Program(
        name="jacobian", lanes=program.lanes, state=(*program.state, a), next=(*program.next, following), emits=program.emits,
        sums=program.sums, state_sizes=(*program.state_sizes, program.lanes * n * n), stream_sizes=program.stream_sizes,
        param_sizes=program.param_sizes, emit_sizes=program.emit_sizes, sum_sizes=program.sum_sizes,
    )  # fmt: skip


def entries(program: Program) -> list[list[Value]]:
    """The Jacobian of one lane, entry by entry, simplified. For scalar programs."""
    from seqparc.passes.simplify import simplify

    n = program.n
    table: list[list[Value]] = [[ir.const(0.0)] * n for _ in range(n)]
    for j, direction in enumerate(program.state):
        mode = _Forward(1, {direction: ir.const(1.0)})
        mode.run(list(program.next))
        for i, value in enumerate(program.next):
            table[i][j] = mode.tangent.get(value) or ir.const(0.0)
    flat = simplify(v for row in table for v in row)
    return [flat[i * n : (i + 1) * n] for i in range(n)]
