"""The order of work inside one step of a lane program, shared by the code generators.

A step is a list of loops and products. A loop runs over i = 0 … m-1 and computes all its targets together, with everything
elementwise pulled into it: a Map becomes an expression at element i, a Gather an address. Only what must exist as an array
is stored: results and operands of contractions and folds, and costly values that a later part of the step needs again.
A scalar program is one loop with m = 1, which prints as straight-line code.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Program, Value
from seqparc.ops import OPS

Ints = NDArray[np.integer[Any]]
Role = Literal["array", "next", "emit", "sum"]

#: Pieces a stored gather may fall into before the generated code would be worse than the fallback.
MOST_PIECES = 64
#: Stretches of arrays that one output is written from; more, and it gets an array of its own.
MOST_RUNS = 4
#: Runs of a value from which on those that read alike share a loop, with tables for addresses: so much code takes compilers long.
MANY_RUNS = 6


@dataclass(frozen=True)
class Target:
    """Elements `position` of `value` go to the same elements of array / state / emit / sum number `number`."""

    role: Role
    number: int
    value: Value
    position: tuple[int, ...]


@dataclass
class Loop:
    size: int
    targets: list[Target] = field(default_factory=list)


@dataclass
class Schedule:
    """The parts of a step in order; `arrays` numbers the values that are stored."""

    parts: list[Loop | ir.Contract | ir.Reduce]
    arrays: dict[Value, int]


class TooIrregularError(ValueError):
    """A gather so scattered that straight loops do not express it."""


def schedule(program: Program, in_place: tuple[ir.Kind, ...] = ("state", "stream", "param"), by_element: bool = False) -> Schedule:
    """The parts of a step.

    in_place: the kinds of leaves that products and folds read where they are; others are stored first. by_element: whether a loop goes from
    element to element, so that those of a target need not lie one after the other, and what reads an element that the loop has just stored
    is part of it.
    """
    outputs = program.outputs
    order = ir.topological(outputs)
    phase = _phases(order)
    stored = _stored(order, phase, outputs, in_place)
    arrays = {v: i for i, v in enumerate(v for v in order if v in stored)}
    by_phase: dict[int, list[Target]] = defaultdict(list)

    def target(role: Role, number: int, value: Value) -> None:
        # By element what is also stored is at hand in the loop that stores it, if it falls into the same pieces.
        for position in _pieces(value, stored - {value} if by_element or role == "array" else stored, by_element):
            by_phase[phase[value]].append(Target(role, number, value, tuple(position.tolist())))

    for v in arrays:
        if not isinstance(v, (ir.Contract, ir.Reduce)):
            target("array", arrays[v], v)
    for i, v in enumerate(program.next):
        target("next", i, v)
    for i, s in enumerate(program.emits):
        target("emit", i, s.value)
    for i, s in enumerate(program.sums):
        target("sum", i, s.value)

    parts: list[Loop | ir.Contract | ir.Reduce] = []
    for p in range(max(phase.values(), default=0) + 1):
        parts += [v for v in order if isinstance(v, (ir.Contract, ir.Reduce)) and phase[v] == p]
        parts += _loops(by_phase[p], arrays, by_element)
    return Schedule(parts, arrays)


def _phases(order: list[Value]) -> dict[Value, int]:
    phase: dict[Value, int] = {}
    for v in order:
        below = max((phase[a] for a in v.args), default=0)
        phase[v] = below + 1 if isinstance(v, (ir.Contract, ir.Reduce)) else below
    return phase


def _stored(order: list[Value], phase: dict[Value, int], outputs: tuple[Value, ...], in_place: tuple[ir.Kind, ...]) -> set[Value]:
    stored: set[Value] = set()

    def addressable(value: Value) -> bool:
        return isinstance(value, ir.Leaf) and value.kind in in_place

    for v in order:
        if isinstance(v, ir.Contract):
            stored |= {a for a in v.args if not addressable(a)}
        if isinstance(v, ir.Reduce) and not addressable(v.x):
            stored.add(v.x)
        if isinstance(v, (ir.Contract, ir.Reduce)):
            stored.add(v)
    cost: dict[Value, int] = {}
    for v in order:
        inner = 0 if v in stored else sum(cost[a] for a in v.args)
        cost[v] = (OPS[v.op].cost + inner) if isinstance(v, ir.Map) else (0 if v in stored else inner)
    uses: dict[Value, set[int]] = defaultdict(set)
    for v in order:
        for a in v.args:
            uses[a].add(phase[v])
    for v in outputs:
        uses[v].add(phase[v])
    stored |= {v for v in order if isinstance(v, ir.Map) and cost[v] >= 8 and max(uses[v]) > phase[v]}
    return stored


def _pieces(value: Value, stored: set[Value], scattered: bool) -> list[Ints]:
    """The elements of a target in pieces within which every gather reads one source: runs, or all that read alike."""
    parts = segments(value, stored, {})
    pieces: list[Ints] = np.split(np.arange(value.size, dtype=np.int32), np.flatnonzero(np.diff(parts)) + 1)
    if scattered and len(pieces) > MANY_RUNS:
        pieces = [np.flatnonzero(parts == p).astype(np.int32) for p in np.unique(parts)]
    if len(pieces) > MOST_PIECES:
        raise TooIrregularError(f"a value of {value.size} elements falls into {len(pieces)} pieces")
    return pieces


def segments(value: Value, stored: set[Value], done: dict[Value, Ints]) -> Ints:
    """A number per element; elements of equal number read the same sources all the way down to what is stored."""
    if value in done:
        return done[value]
    parts: Ints = np.zeros(value.size, np.int64)
    if value.size > 1 and value not in stored:
        match value:
            case ir.Map(operands=operands):
                parts = _combine([segments(a, stored, done) for a in operands])
            case ir.Gather(sources=sources, which=which, index=index):
                inner: Ints = np.zeros(value.size, np.int64)
                for j, source in enumerate(sources):
                    at = which.array == j
                    inner[at] = segments(source, stored, done)[index.array[at]]
                parts = _combine([which.array.astype(np.int64), inner])
    done[value] = parts
    return parts


def _combine(columns: list[Ints]) -> Ints:
    telling = [c for c in columns if (c != c[0]).any()]
    if not telling:
        return np.zeros(len(columns[0]), np.int64)
    return np.unique(np.stack(telling, 1), axis=0, return_inverse=True)[1].reshape(-1)


def _loops(targets: list[Target], arrays: dict[Value, int], by_element: bool) -> list[Loop]:
    """Targets of equal size share a loop; a loop that reads what another of the same phase stores comes after it. Arrays come first."""
    loops: dict[tuple[int, int], Loop] = {}
    for t in targets:
        depth = _depth(t, targets, arrays, by_element)
        loops.setdefault((depth, len(t.position)), Loop(len(t.position))).targets.append(t)
    return [loops[key] for key in sorted(loops, key=lambda k: k[0])]


def _depth(t: Target, targets: list[Target], arrays: dict[Value, int], by_element: bool) -> int:
    """How many loops of the same phase must have run before."""
    made: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for x in targets:
        if x.role == "array":
            made[x.number].add(x.position)
    best = 0
    stack: list[tuple[Value, Ints, int]] = [(t.value, np.array(t.position, np.int32), 0)]
    seen: set[tuple[Value, bytes, int]] = set()
    while stack:
        v, at, d = stack.pop()
        if (v, at.tobytes(), d) in seen:
            continue
        seen.add((v, at.tobytes(), d))
        own = t.role == "array" and arrays.get(v) == t.number
        # Read where it is stored, element by element, it is at hand.
        if not own and arrays.get(v) in made and not (by_element and tuple(at.tolist()) in made[arrays[v]]):
            d += 1
        best = max(best, d)
        match v:
            case ir.Map(operands=operands):
                stack.extend((a, at, d) for a in operands)
            case ir.Gather(sources=sources, which=which, index=index):
                which_at, index_at = which.array[at], index.array[at]
                stack.extend((source, index_at[which_at == j], d) for j, source in enumerate(sources) if (which_at == j).any())
    return best


def runs(value: Value, lie: dict[Value, str]) -> list[tuple[int, int, str]]:
    """Where the elements of a value lie in arrays that there are anyway, in runs: the first, how many, the address. Empty if not all do."""
    if value in lie:
        return [(0, value.size, lie[value])]
    at = {origin: (name, e) for v, name in reversed(lie.items()) for e, origin in enumerate(ir.origins(v))}
    places = [at.get(origin) for origin in ir.origins(value)]
    found: list[tuple[int, int, str]] = []
    start = 0
    for e, place in enumerate(places):
        if place is None:
            return []
        if e + 1 == len(places) or places[e + 1] != (place[0], place[1] + 1):
            name, first = places[start]  # type: ignore[misc]
            found.append((start, e + 1 - start, f"{name} + {first}" if first else name))
            start = e + 1
    return found if len(found) <= MOST_RUNS else []
