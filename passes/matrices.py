"""The state Jacobian as people write it: a sum of products of matrices and diagonals, derived from the core program.

Every value of a step is a vector, and the six kinds of value have simple tangents:

    elementwise    y = f(a, b)        dy = diag(∂f/∂a) da + diag(∂f/∂b) db
    contraction    y = W b            dy = W db, and of a matrix that depends on the state the same with the operands changed over
    picking        y = P b            dy = P db
    sum, maximum   y = 1ᵀ b           dy = 1ᵀ db, 1ᵀ diag(where b is the maximum) db

So ∂s'/∂s is a sum of products diag · W · diag · W · …, one for every way on which a state number reaches the next state. Products with
the same matrices are one, with the sum of their first diagonals, and picked elements are sought where they come from: of W h + b, cut
into gates, each gate has a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.ir import Index, Program, Source, Value
from seqparc.passes.partial import carry
from seqparc.passes.simplify import fold, simplify

#: Products that a Jacobian may have, and numbers of all index tables together: beyond, nobody would read it.
MOST_TERMS, MOST_NUMBERS = 48, 8_000_000

Ints = NDArray[np.int32]


class NoFormError(Exception):
    """The Jacobian has no matrix form that anybody would read; the message says why."""


@dataclass(frozen=True)
class Matrix:
    """M[row, column] is the sum of value[element] over its entries; `entries` are [number, 3]: row, column, element, sorted."""

    value: Value
    shape: tuple[int, int]
    entries: Index
    src: Source | None = field(default=None, compare=False)

    @property
    def picks(self) -> bool:
        """Whether every row is a row of the identity, or zero."""
        rows = self.entries.array[:, 0]
        return isinstance(self.value, ir.Const) and self.value.value == 1 and ir.distinct(rows)


def matrix(value: Value, shape: tuple[int, int], entries: Ints, src: Source | None = None) -> Matrix:
    """A matrix with these entries, whatever their order."""
    if isinstance(value, ir.Const):
        value, entries = ir.const(value.value), entries * np.array([1, 1, 0], np.int32)
    return Matrix(value, shape, Index(entries[np.lexsort(entries.T[::-1])]), src)


#: Matrices, each with the diagonal on its right; the last one's columns are numbers of the state, and its diagonal is the identity.
Chain = tuple[tuple[Matrix, Value], ...]


@dataclass(frozen=True)
class Term:
    """diag(left) M₁ diag(d₁) M₂ diag(d₂) …"""

    left: Value
    chain: Chain


@dataclass(frozen=True)
class Form:
    """blocks[i, j]: the terms of ∂s'_i/∂s_j, by slots of the state; a block that is not there is zero."""

    sizes: tuple[int, ...]
    blocks: Mapping[tuple[int, int], tuple[Term, ...]]


def matrix_form(program: Program) -> Form:
    """The Jacobian of a program of one lane. Raises NoFormError where it would be too long."""
    order = ir.topological(program.next)
    if sum(v.size if not isinstance(v, ir.Contract) else v.ia.array.size for v in order) > MOST_NUMBERS:
        raise NoFormError("the step is too large for its Jacobian to be written out")
    roots = _unpicked(program.next)
    tangents = _Tangents(program.state_sizes)
    for v in ir.topological(roots):
        tangents.take_in(v)
    blocks: dict[tuple[int, int], tuple[Term, ...]] = {}
    for leaf, value in zip(program.state, roots, strict=True):
        for (slot, chain), left in tangents.of.get(value, {}).items():
            if not (isinstance(left, ir.Const) and left.value == 0):
                at = leaf.slot, slot
                blocks[at] = (*blocks.get(at, ()), Term(left, chain))
    return Form(program.state_sizes, blocks)


def _unpicked(roots: tuple[Value, ...]) -> list[Value]:
    """The same values with picked elements sought where they come from, products of single numbers elementwise, and constants folded."""

    def rule(v: Value, args: tuple[Value, ...]) -> Value:
        match ir.rebuild(v, args) if args else v:
            case ir.Gather(sources=(source,), which=which, index=index) if (which.array == 0).all():
                return pick(source, index.array)
            case ir.Contract(a=a, b=b, ia=ia, ib=ib, src=src) if ia.shape[1] == 1 and (ia.array >= 0).all():
                return ir.map_("mul", pick(a, ia.array[:, 0]), pick(b, ib.array[:, 0]), src=src)
            case made:
                return fold(made, made.args)

    done = ir.rewrite(roots, rule)
    return [done[v] for v in roots]


def pick(value: Value, index: Ints) -> Value:
    """value[index], as far down as it goes: picked operands in place of a picked result."""
    if value.size == len(index) and (index == np.arange(value.size)).all():
        return value
    match value:
        case _ if (index < 0).any():
            return ir.take(value, index)
        case ir.Const(value=number):
            return ir.const(number, len(index))
        case ir.Leaf(kind=kind, slot=slot, index=where):
            return ir.leaf(kind, slot, where.array[:, index])
        case ir.Map(op=op, operands=operands, src=src):
            return ir.map_(op, *(pick(a, index) for a in operands), src=src)
        case ir.Contract(a=a, b=b, ia=ia, ib=ib, src=src):
            return ir.contract(a, b, ia.array[index], ib.array[index], src)
        case ir.Reduce(fold=kind, x=x, index=where, src=src) if kind == "sum" or ir.distinct(index):  # a maximum's derivative is shared
            return ir.reduce_(kind, x, where.array[index], src)
    taken = ir.take(value, index)
    if isinstance(value, ir.Gather) and isinstance(taken, ir.Gather) and len(taken.sources) == 1 and (taken.which.array == 0).all():
        return pick(taken.sources[0], taken.index.array)
    return taken


def _product(a: Value, b: Value) -> Value:
    return fold(ir.map_("mul", a, b), (a, b))


class _Tangents:
    """Of every value: (slot of the state, chain) -> the diagonal in front of it."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.of: dict[Value, dict[tuple[int, Chain], Value]] = {}

    def add(self, value: Value, slot: int, chain: Chain, left: Value) -> None:
        terms = self.of.setdefault(value, {})
        known = terms.get((slot, chain))
        terms[slot, chain] = left if known is None else fold(ir.map_("add", known, left), (known, left))
        if len(terms) > MOST_TERMS:
            raise NoFormError(f"a state number reaches the next state on more than {MOST_TERMS} ways")

    def take_in(self, value: Value) -> None:
        """The tangent of a value whose arguments' are known."""
        match value:
            case ir.Leaf(kind="state", slot=slot, index=index):
                self._picked(value, slot, (), ir.const(1.0, self.sizes[slot]), index.array[0])
            case ir.Map(op=op, operands=operands):
                for i, operand in enumerate(operands):
                    if operand in self.of and (d := carry(op, i, operands, value, ir.const(1.0, value.size))) is not None:
                        factor = simplify([d])[0]
                        for (slot, chain), left in self.of[operand].items():
                            self.add(value, slot, chain, _product(factor, left))
            case ir.Gather(sources=sources, which=which, index=index):
                for j, source in enumerate(sources):
                    for (slot, chain), left in self.of.get(source, {}).items():
                        self._picked(value, slot, chain, left, np.where(which.array == j, index.array, -1))
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                self._times(value, a, ia.array, b, ib.array)
                self._times(value, b, ib.array, a, ia.array)
            case ir.Reduce(fold=kind, x=x, index=index) if x in self.of:
                ones = np.where(index.array < 0, -1, 0)
                if kind == "sum":
                    return self._times(value, ir.const(1.0), ones, x, index.array)
                if not ir.distinct(index.array[index.array >= 0]):
                    raise NoFormError("maxima over groups that overlap have no simple derivative")
                row = np.full(x.size, -1, np.int32)
                at = np.nonzero(index.array >= 0)
                row[index.array[at]] = at[0]
                hit = ir.map_("eq", x, pick(value, row))
                share = simplify([ir.map_("div", ir.const(1.0, value.size), ir.reduce_("sum", hit, index.array))])[0]
                self._times(value, ir.const(1.0), ones, x, index.array, share, hit)

    def _picked(self, value: Value, slot: int, chain: Chain, left: Value, index: Ints) -> None:
        """A term of what `value` picks elements of."""
        holes = index < 0
        if chain:
            (m, d), *rest = chain
            rows = _select(m, index)
            chain = ((rows, d), *rest) if rows != m else chain
        elif not (len(index) == left.size and (index == np.arange(left.size)).all()):
            at = np.flatnonzero(~holes)
            entries = np.stack((at, index[at], np.zeros_like(at)), axis=1).astype(np.int32)
            chain = ((matrix(ir.const(1.0), (len(index), left.size), entries), ir.const(1.0, left.size)),)
        self.add(value, slot, chain, pick(left, np.where(holes, 0, index) if chain else index))

    def _times(
        self, value: Value, a: Value, ia: Ints, b: Value, ib: Ints, outer: Value | None = None, inner: Value | None = None
    ) -> None:
        """The terms of diag(outer) A diag(inner) b."""
        if b not in self.of:
            return
        rows, k = np.nonzero((ia >= 0) & (ib >= 0))
        entries = np.stack((rows, ib[rows, k], ia[rows, k]), axis=1).astype(np.int32)
        m = matrix(a, (value.size, b.size), entries, getattr(value, "src", None))
        for (slot, chain), left in self.of[b].items():
            middle = left if inner is None else _product(inner, left)
            front = outer or ir.const(1.0, value.size)
            if isinstance(middle, ir.Const):
                front, middle = _product(front, ir.const(middle.value, value.size)), ir.const(1.0, b.size)
                if chain and chain[0][0].picks:
                    (picking, d), *rest = chain
                    self.add(value, slot, ((_compose(m, picking), d), *rest), front)
                    continue
            self.add(value, slot, ((m, middle), *chain), front)


def _select(m: Matrix, index: Ints) -> Matrix:
    """Rows of a matrix; a row -1 is zero."""
    entries = m.entries.array
    begin, end = (np.searchsorted(entries[:, 0], np.maximum(index, 0), side) for side in ("left", "right"))
    counts = np.where(index < 0, 0, end - begin)
    total = int(counts.sum())
    at = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(total)
    made = entries[at].copy()
    made[:, 0] = np.repeat(np.arange(len(index)), counts)
    return matrix(m.value, (len(index), m.shape[1]), made, m.src)


def _compose(m: Matrix, picking: Matrix) -> Matrix:
    """m · picking."""
    to = np.full(m.shape[1], -1, np.int32)
    to[picking.entries.array[:, 0]] = picking.entries.array[:, 1]
    made = m.entries.array.copy()
    made[:, 1] = to[made[:, 1]]
    return matrix(m.value, (m.shape[0], picking.shape[1]), made[made[:, 1] >= 0], m.src)
