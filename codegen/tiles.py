"""One step of a lane program as Triton statements on tiles: what the GPU's `step` function says.

A tile holds the same numbers of many lanes. Scalar programs have tiles [BLOCK], one lane per entry; vector programs have
tiles [BLOCK, width], a lane per row, widths padded to a power of two. Nothing is addressed inside a step: what it reads comes
as arguments, tiles that are loaded before it. Elements of a value that are used by themselves (a gate, half of a state) are tiles of
their own, so that no tile is ever taken apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.schedule import TooIrregularError, segments
from seqparc.ir import Program, Value
from seqparc.ops import OPS

Ints = NDArray[np.integer[Any]]

#: Tiles the state of a lane may fall into.
MOST_PIECES = 16
#: The narrowest tile that a matrix product takes.
NARROWEST = 16


@dataclass(frozen=True)
class Weight:
    """A tile of a weight, [columns, rows]: elements `index` [lanes or 1, columns, rows] of parameter `slot`, -1 being zero."""

    slot: int
    index: ir.Index
    product: str  # "dot", or "columns" for one column and "rows" for one row, which are sums of products

    @property
    def bytes(self) -> int:
        """Of the tile, in float32."""
        return 4 * padded(self.index.shape[1]) * padded(self.index.shape[2])


@dataclass(frozen=True)
class Read:
    """A tile read from memory: elements index [lanes, width] of a stream or a parameter."""

    kind: str  # "stream" or "param"
    slot: int
    index: ir.Index


@dataclass(frozen=True)
class Written:
    """A result of the step: elements lo … hi - 1 of its next state, emit or sum `number`."""

    role: str
    number: int
    lo: int
    hi: int
    name: str  # in the step


@dataclass
class Step:
    """The step's arguments and statements. States are called s{number}_{lo}; `reads` and `weights` by their keys."""

    program: Program
    scalar: bool
    precision: str
    cuts: dict[int, set[int]] = field(default_factory=dict)  # state number -> where its tiles begin and end
    reads: dict[str, Read] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    results: list[Written] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memo: dict[tuple[Value, bytes], str] = {}
        self.names: dict[Any, str] = {}
        self.shapes: dict[str, int] = {}  # the width of every tile of a vector program
        self.whole: dict[Value, Ints] = {}  # where each value falls into pieces
        for number, v in enumerate(self.program.state):
            edges = self.cuts.setdefault(number, {0, v.size})
            self.whole[v] = np.searchsorted(np.array(sorted(edges)), np.arange(v.size), side="right")
        self.products: set[Value] = {v for v in ir.topological(self.program.outputs) if isinstance(v, (ir.Contract, ir.Reduce))}
        self.fresh: dict[int, set[int]] = {number: set() for number in self.cuts}  # cuts found to be missing

    # -- pieces ----------------------------------------------------------------------------------------------------------

    def pieces(self, value: Value, elements: Ints) -> list[Ints]:
        """Runs of elements that are read from the same places all the way down."""
        parts = segments(value, self.products, self.whole)[elements]
        edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(elements)]
        if len(edges) > 4 * MOST_PIECES:
            raise TooIrregularError(f"a value of {value.size} elements falls into {len(edges) - 1} pieces")
        return [elements[i:j] for i, j in itertools.pairwise(edges)]

    def state_tiles(self) -> Iterator[tuple[int, int, int]]:
        """(number, lo, hi) of every tile of the state."""
        for number, edges in self.cuts.items():
            ordered = sorted(edges)
            yield from ((number, lo, hi) for lo, hi in itertools.pairwise(ordered))

    # -- expressions -----------------------------------------------------------------------------------------------------

    def expression(self, value: Value, elements: Ints) -> str:
        """The name of the tile of these elements of a value."""
        if len(elements) > 1 and (elements == elements[0]).all():
            elements = elements[:1]
        key = (value, elements.astype(np.int32).tobytes())
        if key not in self.memo:
            self.memo[key] = self._make(value, elements)
        return self.memo[key]

    def _make(self, value: Value, elements: Ints) -> str:
        width = len(elements)
        match value:
            case ir.Const(value=number):
                return self._let(f"tl.full((), {literal(number)}, DT)", 1)
            case ir.Leaf(kind="state"):
                return self._state(self.program.state.index(value), elements)
            case ir.Leaf(kind=kind, slot=slot, index=index):
                return self._read(Read(kind, slot, ir.Index(index.array[:, elements])))
            case ir.Map(op=op, operands=operands, src=src):
                names = [self.expression(a, elements) for a in operands]
                return self._let(OPS[op].gpu.format(*names), max(self.shapes[n] for n in names), src)
            case ir.Gather(sources=sources, which=which, index=index):
                w = which.array[elements]
                if not (w == w[0]).all():
                    raise TooIrregularError("a gather that mixes sources element by element")
                if w[0] < 0:
                    return self.expression(ir.const(0.0), np.zeros(1, np.int32))
                return self.expression(sources[w[0]], index.array[elements])
            case ir.Contract():
                return self._contract(value, elements)
            case ir.Reduce():
                return self._reduce(value, elements)
        raise TypeError(f"{type(value).__name__} of {width}")

    def _let(self, text: str, width: int, src: ir.Source | None = None) -> str:
        name = f"v{len(self.lines)}"
        comment = f"  # {src.label}" if src else ""
        self.lines.append(f"{name} = {text}{comment}")
        self.shapes[name] = width
        return name

    def _state(self, number: int, elements: Ints) -> str:
        lo, hi = int(elements[0]), int(elements[-1]) + 1
        if not np.array_equal(elements, np.arange(lo, hi)):
            raise TooIrregularError("state numbers that are read out of order")
        self.fresh[number] |= {lo, hi} - self.cuts[number]
        name = f"s{number}_{lo}"
        self.shapes[name] = hi - lo
        return name

    def _read(self, read: Read) -> str:
        if read not in self.names:
            self.names[read] = name = f"{'x' if read.kind == 'stream' else 'p'}{read.slot}_{len(self.reads)}"
            self.reads[name] = read
            self.shapes[name] = read.index.shape[1]
        return self.names[read]

    def _contract(self, v: ir.Contract, rows: Ints) -> str:
        if not (isinstance(v.a, ir.Leaf) and v.a.kind == "param"):
            return self._products(v, rows)
        if self.scalar:
            return self._products(v, rows)
        ia, ib = v.ia.array[rows], v.ib.array[rows]
        live = (ia >= 0) & (ib >= 0)
        columns = np.unique(ib[live])
        if not len(columns):
            return self.expression(ir.const(0.0), np.zeros(1, np.int32))
        matrix = np.full((len(columns), len(rows)), -1, np.int64)
        r, k = np.nonzero(live)
        at = np.searchsorted(columns, ib[r, k])
        if len(np.unique(at * len(rows) + r)) != len(r):
            raise TooIrregularError("a row that reads one element twice")
        matrix[at, r] = ia[r, k]
        leaf = v.a.index.array
        leaf = leaf[:1] if (leaf == leaf[:1]).all() else leaf
        elements = np.where(matrix[None] < 0, -1, leaf[:, np.maximum(matrix, 0)])
        total, done = "", 0
        for piece in self.pieces(v.b, columns):
            x = self.expression(v.b, piece)
            total = self._product(x, Weight(v.a.slot, ir.Index(elements[:, done : done + len(piece)]), ""), total, v.src)
            done += len(piece)
        return total

    def _product(self, x: str, w: Weight, total: str, src: ir.Source | None) -> str:
        """total + x w, with x [BLOCK, columns] and w [columns, rows]."""
        columns, rows = w.index.shape[1:]
        given = self.shapes[x]
        kind = "columns" if columns == 1 or given == 1 else "rows" if rows == 1 else "dot"
        if kind == "columns" and columns > 1:
            raise TooIrregularError("a product with one number many times")
        weight = Weight(w.slot, w.index, kind)
        if weight not in self.names:
            self.names[weight] = f"w{len(self.weights)}"
            self.weights[self.names[weight]] = weight
        name = self.names[weight]
        plus = f"{total} + " if total else ""
        if kind == "columns":
            return self._let(f"{plus}{x} * {name}", rows, src)
        x = self._padded(x, columns)
        if kind == "rows":
            return self._let(f"{plus}tl.sum({x} * {name}, 1, keep_dims=True)", 1, src)
        added = f", {total}" if total else ""
        return self._let(f"tl.dot({x}, {name}{added}, input_precision='{self.precision}', out_dtype=DT)", rows, src)

    def _padded(self, x: str, width: int, empty: str = "0.0") -> str:
        """A tile whose columns past the last are `empty`, not what they happen to be."""
        if padded(width) == width:
            return x
        return self._let(f"tl.where(column({padded(width)}) < {width}, {x}, {empty})", width)

    def _products(self, v: ir.Contract, rows: Ints) -> str:
        """A sum of products of two lane values, product by product."""
        total = ""
        for ka, kb in zip(v.ia.array[rows].T, v.ib.array[rows].T, strict=True):
            if (ka < 0).all():
                continue
            if (ka < 0).any() or len(self.pieces(v.a, ka)) > 1 or len(self.pieces(v.b, kb)) > 1:
                raise TooIrregularError("a product of two values that vary from step to step")
            a, b = self.expression(v.a, ka), self.expression(v.b, kb)
            total = self._let(f"{total + ' + ' if total else ''}{a} * {b}", max(self.shapes[a], self.shapes[b]), v.src)
        return total or self.expression(ir.const(0.0), np.zeros(1, np.int32))

    def _reduce(self, v: ir.Reduce, rows: Ints) -> str:
        index = np.sort(v.index.array[rows], axis=1)
        if not (index == index[:1]).all():
            raise TooIrregularError("a fold whose rows read different elements")
        empty, fold = ("0.0", "tl.sum({0}, 1, keep_dims=True)") if v.fold == "sum" else (
            "float('-inf')", "tl.reduce({0}, 1, m.maximum, keep_dims=True)")  # fmt: skip
        total = ""
        for piece in self.pieces(v.x, index[0][index[0] >= 0]):
            x = self.expression(v.x, piece)
            count = len(piece)
            if not self.scalar and self.shapes[x] == count > 1:
                part, count = self._let(fold.format(self._padded(x, count, empty)), 1, v.src), 1
            elif count == 1 or v.fold != "sum":
                part = x
            else:
                part = self._let(f"{x} * {float(count)}", 1, v.src)
            both = f"{total} + {part}" if v.fold == "sum" else f"m.maximum({total}, {part})"
            total = self._let(both, 1, v.src) if total else part
        return total

    def returned(self) -> list[str]:
        """What the step returns: every result once, however many places it goes to."""
        return list(dict.fromkeys(w.name for w in self.results))

    # -- the whole step --------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Make every result."""
        p = self.program
        targets: list[tuple[str, int, Value]] = [("next", i, v) for i, v in enumerate(p.next)]
        targets += [("emit", i, s.value) for i, s in enumerate(p.emits)] + [("sum", i, s.value) for i, s in enumerate(p.sums)]
        for role, number, value in targets:
            at = 0
            for piece in self.pieces(value, np.arange(value.size)):
                edges = [at, at + len(piece)]
                if role == "next":
                    self.fresh[number] |= set(edges) - self.cuts[number]
                    edges += [e for e in self.cuts[number] if at < e < at + len(piece)]
                edges.sort()
                for lo, hi in itertools.pairwise(edges):
                    name = self.expression(value, piece[lo - at : hi - at])
                    self.results.append(Written(role, number, lo, hi, name))
                at += len(piece)


def step(program: Program, precision: str) -> Step:
    """The step of a program. Raises TooIrregularError where tiles do not express it."""
    scalar = all(v.size == 1 for v in ir.topological(program.outputs))
    cuts: dict[int, set[int]] = {}
    while True:
        made = Step(program, scalar, precision, {n: set(c) for n, c in cuts.items()})
        made.write()
        if not any(made.fresh.values()):
            return made
        cuts = {n: edges | made.fresh[n] for n, edges in made.cuts.items()}
        if sum(len(c) - 1 for c in cuts.values()) > MOST_PIECES:
            raise TooIrregularError(f"the state of {program.n} numbers is read in more than {MOST_PIECES} pieces")


def padded(width: int) -> int:
    """The width of the tile that holds so many numbers."""
    return 1 if width == 1 else max(NARROWEST, 1 << (width - 1).bit_length())


def literal(value: float) -> str:
    return f"float('{value}')" if value != value or value in (float("inf"), float("-inf")) else repr(value)


def wrapped(items: list[str]) -> list[str]:
    """Arguments in lines of their own."""
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) > 130:
            lines.append(line)
            line = "   "
        line += f" {item},"
    return [*lines, line]
