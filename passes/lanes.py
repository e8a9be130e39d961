"""Axes that never mix become lanes: many small programs in place of one large one.

Each group of state numbers that never meets another is a lane. The program of one lane is found by pulling back: starting
from the lane's next state, every value is asked only for the elements the lane needs, for all lanes at once. If all lanes
turn out to run the same program on other elements, that program *is* the cell, by construction; if they do not, the cell
keeps one lane. Nothing is assumed about shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Program, Store, Value
from seqparc.passes.dependency import Structure

Ints = NDArray[np.int32]

#: State numbers per lane up to which a lane's program is written out number by number.
SCALAR_LIMIT = 8
#: Operations a scalar program may have, and one derived from a scalar program: compilers take long over straight lines.
SCALAR_VALUES, DERIVED_VALUES = 200, 500


class _DifferentError(Exception):
    """Two lanes need different programs."""


def split_lanes(program: Program, structure: Structure) -> Program:
    """The program of one lane, with as many lanes as the state has independent groups of the same form."""
    groups = structure.components
    if len(groups) == 1 or len({len(g) for g in groups}) != 1:
        return program
    try:
        return _Pull(program, np.array(groups, np.int32)).program()
    except _DifferentError:
        return program


class _Pull:
    def __init__(self, program: Program, groups: Ints) -> None:
        self.source, self.groups = program, groups
        self.lanes = len(groups)
        offsets = np.concatenate([[0], np.cumsum(program.state_sizes)])
        self.offsets = offsets
        slot_of = np.searchsorted(offsets, groups, side="right") - 1
        if not (slot_of == slot_of[:1]).all():
            raise _DifferentError
        self.slot_of = slot_of[0]
        # Where each state number of the sample lies: its lane, and its place among the lane's numbers of that slot.
        self.lane = np.empty(int(offsets[-1]), np.int32)
        self.place = np.empty_like(self.lane)
        self.state: dict[int, ir.Leaf] = {}
        for slot in range(len(program.state_sizes)):
            mine = groups[:, self.slot_of == slot]
            if mine.shape[1]:
                self.lane[mine] = np.arange(self.lanes)[:, None]
                self.place[mine] = np.arange(mine.shape[1])[None]
                self.state[slot] = ir.leaf("state", slot, mine - offsets[slot])
        self.done: dict[tuple[Value, bytes], Value] = {}

    def program(self) -> Program:
        p = self.source
        following, stores = [], []
        for slot, leaf in self.state.items():
            value = self.pull(p.next[slot], leaf.index.array)
            following.append(value)
            stores.append(Store(slot, leaf.index, value))
        return Program(
            name=p.name, lanes=self.lanes, state=tuple(self.state.values()), next=tuple(following), emits=tuple(stores),
            state_sizes=p.state_sizes, stream_sizes=p.stream_sizes, param_sizes=p.param_sizes, emit_sizes=p.emit_sizes,
        )  # fmt: skip

    def pull(self, value: Value, wanted: Ints) -> Value:
        """The elements `wanted[lane]` of a value, as a value of the lane program."""
        key = (value, wanted.tobytes())
        if key not in self.done:
            self.done[key] = self._pull(value, np.ascontiguousarray(wanted, np.int32))
        return self.done[key]

    def _pull(self, value: Value, wanted: Ints) -> Value:
        size = wanted.shape[1]
        match value:
            case ir.Leaf(kind="state", slot=slot, index=index):
                numbers = index.array[0][wanted] + self.offsets[slot]
                place = self.place[numbers]
                if not ((self.lane[numbers] == np.arange(self.lanes)[:, None]).all() and (place == place[:1]).all()):
                    raise _DifferentError
                return ir.take(self.state[slot], place[0])
            case ir.Leaf(kind=kind, slot=slot, index=index):
                return ir.leaf(kind, slot, index.array[0][wanted])
            case ir.Const(value=number):
                return ir.const(number, size)
            case ir.Map(op=op, operands=operands, src=src):
                return ir.map_(op, *(self.pull(a, wanted) for a in operands), src=src)
            case ir.Gather(sources=sources, which=which, index=index):
                w, e = which.array[wanted], index.array[wanted]
                if not (w == w[:1]).all():
                    raise _DifferentError
                parts, new = [], np.full(size, -1, np.int32)
                for j, source in enumerate(sources):
                    at = np.flatnonzero(w[0] == j)
                    if at.size:
                        parts.append(self.pull(source, e[:, at]))
                        new[at] = np.arange(at.size)
                    else:
                        parts.append(ir.const(0.0, 1))
                return ir.gather(parts, w[0], new)
            case ir.Contract(a=a, b=b, ia=ia, ib=ib, src=src):
                left, new_a = self._columns(a, ia.array[wanted])
                right, new_b = self._columns(b, ib.array[wanted])
                return ir.contract(left, right, new_a, new_b, src)
            case ir.Reduce(fold=fold, x=x, index=index, src=src):
                inner, new = self._columns(x, index.array[wanted])
                return ir.reduce_(fold, inner, new, src)
            case _:
                raise TypeError(type(value).__name__)

    def _columns(self, value: Value, needed: Ints) -> tuple[Value, Ints]:
        """Pull the elements needed[lane, e, k], each once; the pulled value and where needed[0] lies in it."""
        dead = needed < 0
        if not (dead == dead[:1]).all():
            raise _DifferentError
        flat = needed.reshape(self.lanes, -1)[:, ~dead[0].reshape(-1)]
        columns, inverse = np.unique(flat, axis=1, return_inverse=True)
        index = np.full(dead[0].size, -1, np.int32)
        index[~dead[0].reshape(-1)] = inverse.reshape(-1)
        return self.pull(value, columns), index.reshape(needed.shape[1:])


def scalarise(program: Program, derived: bool = False) -> Program | None:
    """The same program with every value a single number: registers and straight-line code. None if it is too large for that.

    `derived`: from a program that is scalar itself; its state may be larger.
    """
    most = DERIVED_VALUES if derived else SCALAR_VALUES
    if not derived and program.n > SCALAR_LIMIT:
        return None
    work = sum(v.size * (v.ia.shape[1] if isinstance(v, ir.Contract) else 1) for v in ir.topological(program.outputs)
               if not isinstance(v, ir.Leaf))  # fmt: skip
    if work > 16 * most:  # hopeless, however much of it turns out shared or zero
        return None
    done: dict[tuple[Value, int], Value] = {}

    def one(root: Value, element: int) -> Value:
        # Explicit stack: a chain of a thousand values is no reason to overflow Python's.
        stack = [(root, element)]
        while stack:
            v, e = stack[-1]
            if (v, e) in done:
                stack.pop()
                continue
            needs = [d for d in _needs(v, e) if d not in done]
            if needs:
                stack.extend(reversed(needs))
            else:
                done[v, e] = _scalar(v, e, done)
                stack.pop()
        return done[root, element]

    def stores(items: tuple[Store, ...]) -> tuple[Store, ...]:
        return tuple(
            Store(s.slot, ir.Index(s.index.array[:, e : e + 1]), one(s.value, e)) for s in items for e in range(s.value.size)
        )

    state = tuple(ir.leaf("state", v.slot, v.index.array[:, e : e + 1]) for v in program.state for e in range(v.size))
    following = tuple(one(v, e) for v in program.next for e in range(v.size))
    made = replace(program, state=state, next=following, emits=stores(program.emits), sums=stores(program.sums))
    return made if sum(not isinstance(v, ir.Leaf) for v in ir.topological(made.outputs)) <= most else None


def _needs(value: Value, e: int) -> list[tuple[Value, int]]:
    match value:
        case ir.Leaf() | ir.Const():
            return []
        case ir.Map(operands=operands):
            return [(a, e) for a in operands]
        case ir.Gather(sources=sources, which=which, index=index):
            j = int(which.array[e])
            return [] if j < 0 else [(sources[j], int(index.array[e]))]
        case ir.Contract(a=a, b=b, ia=ia, ib=ib):
            pairs = zip(ia.array[e].tolist(), ib.array[e].tolist(), strict=True)
            return [n for i, j in pairs if i >= 0 for n in ((a, i), (b, j))]
        case ir.Reduce(x=x, index=index):
            return [(x, i) for i in index.array[e].tolist() if i >= 0]
        case _:
            raise TypeError(type(value).__name__)


def _scalar(value: Value, e: int, done: dict[tuple[Value, int], Value]) -> Value:
    parts = [done[n] for n in _needs(value, e)]
    match value:
        case ir.Leaf(kind=kind, slot=slot, index=index):
            return ir.leaf(kind, slot, index.array[:, e : e + 1])
        case ir.Const(value=number):
            return ir.const(number)
        case ir.Map(op=op, src=src):
            return ir.map_(op, *parts, src=src)
        case ir.Gather():
            return parts[0] if parts else ir.const(0.0)
        case ir.Contract(src=src):
            terms: list[Value] = [ir.map_("mul", p, q, src=src) for p, q in zip(parts[::2], parts[1::2], strict=True)]
            return _chain("add", terms, src)
        case ir.Reduce(fold=fold, src=src):
            return _chain("add" if fold == "sum" else "maximum", parts, src)
        case _:
            raise TypeError(type(value).__name__)


def _chain(op: str, terms: list[Value], src: ir.Source | None) -> Value:
    if not terms:
        return ir.const(0.0)
    total = terms[0]
    for t in terms[1:]:
        total = ir.map_(op, total, t, src=src)
    return total
