"""What forward writes down so that backward need not compute it again: `Options(save="store")`.

An adjoint program computes the values of a step anew from the state before it. Here those that cost something, products with the state and
functions like tanh, are read from one more stream instead, and the forward program writes them to one more output. Kept are the
elements that the adjoint reads and no others, and of a chain of such values the last: what is left to compute anew is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Program, Store, Value
from seqparc.ops import OPS
from seqparc.passes.derivative import Adjoint, replayed

Ints = NDArray[np.integer[Any]]

#: Additions from which on a number is rather read than computed anew; see `seqparc.ops`.
WORTH = 8


@dataclass(frozen=True)
class Stored:
    """The step that writes what backward reads, in its last emit slot, and the adjoint that reads it, its last stream; `numbers` a step."""

    program: Program
    adjoint: Adjoint
    numbers: int


def stored(program: Program, recomputing: Adjoint, side_by_side: bool) -> Stored | None:
    """Both, from a step and its adjoint; None if nothing is worth keeping.

    side_by_side: a number's lanes lie beside each other in memory, as scalar programs read them; else a lane's numbers do.
    """
    before = recomputing.program
    forward = {new: old for old, new in replayed(program).items() if old.args}  # what the adjoint computes anew -> what it is of the step
    order = ir.topological(before.outputs)
    needed: dict[Value, Ints] = {}  # of such values: [size], whether an element is read
    for v in before.outputs:
        if v in forward:
            needed[v] = np.ones(v.size, bool)
    for v in reversed(order):
        if v in forward and (v not in needed or worth_keeping(v)):
            continue
        for a, elements in _reads(v, _elements(v, needed)):
            if a in forward:
                needed.setdefault(a, np.zeros(a.size, bool))[elements] = True
    kept = [v for v in order if v in needed and worth_keeping(v)]
    if not kept:
        return None
    starts = np.concatenate([[0], np.cumsum([needed[v].sum() for v in kept])]).astype(int)
    total, lane = int(starts[-1]), np.arange(program.lanes)[:, None]
    where = {
        v: ir.Index(np.arange(a, b)[None] * program.lanes + lane if side_by_side else lane * total + np.arange(a, b)[None])
        for v, a, b in zip(kept, starts[:-1], starts[1:], strict=True)
    }
    slot = len(before.stream_sizes)
    new: dict[Value, Value] = {v: ir.leaf("stream", slot, where[v]) for v in kept}
    place = {v: np.where(mask, np.cumsum(mask) - 1, -1) for v, mask in needed.items()}  # of each element among those that are made
    for v in order:
        if v not in new and (v not in forward or v in needed):
            new[v] = _rebuilt(v, _elements(v, needed), new, place)
    emits = tuple(replace(s, value=new[s.value]) for s in before.emits)
    outers = []
    for o in recomputing.outers:  # a factor that lies in the stream already is not written out again
        own = next((s for s in emits if s.slot == o.x), None)
        if own is not None and isinstance(own.value, ir.Leaf) and own.value.slot == slot and own.value.kind == "stream":
            o = replace(o, x=-1 - slot, columns=own.value.index)
        outers.append(o)
    read = {n for o in outers for n in (o.delta, o.x)} | {e.slot for e in recomputing.streams}
    reading = replace(
        before, next=tuple(new[v] for v in before.next), emits=tuple(s for s in emits if s.slot in read),
        sums=tuple(replace(s, value=new[s.value]) for s in before.sums), stream_sizes=(*before.stream_sizes, program.lanes * total),
    )  # fmt: skip
    out = len(program.emit_sizes)
    writing = replace(
        program, emit_sizes=(*program.emit_sizes, program.lanes * total),
        emits=(*program.emits, *(Store(out, where[v], ir.take(forward[v], np.flatnonzero(needed[v]))) for v in kept)),
    )  # fmt: skip
    return Stored(writing, replace(recomputing, program=reading, outers=tuple(outers)), program.lanes * total)


def worth_keeping(value: Value) -> bool:
    """Whether a value of the step is rather read than computed anew.

    A maximum is not: the derivative compares it with what it was taken of, and both must have been rounded alike.
    """
    match value:
        case ir.Map(op=op):
            return OPS[op].cost >= WORTH
        case ir.Reduce(fold=fold, index=index):
            return fold == "sum" and index.shape[1] >= WORTH
        case _:
            return isinstance(value, ir.Contract)


def _elements(value: Value, needed: dict[Value, Ints]) -> Ints:
    """Which elements of a value are made."""
    return np.flatnonzero(needed[value]) if value in needed else np.arange(value.size)


def _reads(value: Value, elements: Ints) -> list[tuple[Value, Ints]]:
    """Which elements of its arguments some elements of a value are made from."""
    match value:
        case ir.Map(operands=operands):
            return [(a, elements) for a in operands]
        case ir.Gather(sources=sources, which=which, index=index):
            return [(s, index.array[elements][which.array[elements] == j]) for j, s in enumerate(sources)]
        case ir.Contract(a=a, b=b, ia=ia, ib=ib):
            return [(v, i.array[elements][i.array[elements] >= 0]) for v, i in ((a, ia), (b, ib))]
        case ir.Reduce(x=x, index=index):
            return [(x, index.array[elements][index.array[elements] >= 0])]
        case _:
            return []


def _rebuilt(value: Value, elements: Ints, new: dict[Value, Value], place: dict[Value, Ints]) -> Value:
    """Some elements of a value, made from what its arguments have become."""

    def at(v: Value, index: Ints) -> Ints:
        return np.where(index < 0, -1, place[v][index]) if v in place else index

    match value:
        case ir.Map(op=op, operands=operands, src=src):
            return ir.map_(op, *(ir.take(new[a], at(a, elements)) for a in operands), src=src)
        case ir.Gather(sources=sources, which=which, index=index):
            which_, index_ = which.array[elements], index.array[elements].copy()
            for j, s in enumerate(sources):
                index_[which_ == j] = at(s, index_[which_ == j])
            return ir.gather([new[s] for s in sources], which_, index_)
        case ir.Contract(a=a, b=b, ia=ia, ib=ib, src=src):
            return ir.contract(new[a], new[b], at(a, ia.array[elements]), at(b, ib.array[elements]), src)
        case ir.Reduce(fold=fold, x=x, index=index, src=src):
            return ir.reduce_(fold, new[x], at(x, index.array[elements]), src)
        case _:
            return value
