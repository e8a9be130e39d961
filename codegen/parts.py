"""A time step taken apart into matrix products for a library, folds, and elementwise loops between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.schedule import Loop, Schedule, schedule
from seqparc.ir import Program, Value

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Place:
    """Where an array lies: elements `at` … of the rows of buffer `number`, which are `width` wide."""

    number: int
    at: int
    width: int


@dataclass
class Product:
    """One matrix product for all the contractions of a phase that read the same numbers: x [lanes, rows, k] by w [lanes or 1, k, e]."""

    x: Value
    columns: Ints
    members: list[tuple[ir.Contract, Ints]]  # with each one's matrix [k, e] of elements of its parameter's leaf, -1 for zero
    buffer: int


@dataclass
class Parts:
    """A step: what is to be done in order, loops by number; where every stored value lies, and how wide the buffers are."""

    plan: Schedule
    work: list[Product | ir.Contract | ir.Reduce | int]
    places: dict[Value, Place]
    widths: list[int]


def split(program: Program) -> Parts:
    """The parts of a step; contractions of one parameter that read the same numbers become one product."""
    plan = schedule(program, in_place=("state", "param"))
    places: dict[Value, Place] = {}
    widths: list[int] = []
    work: list[Product | ir.Contract | ir.Reduce | int] = []
    loops = 0
    for part in plan.parts:
        if isinstance(part, Loop):
            work.append(loops)
            loops += 1
            continue
        found = _matrix(part) if isinstance(part, ir.Contract) else None
        if not isinstance(part, ir.Contract) or found is None:
            work.append(part)
            continue
        columns, matrix = found
        last = work[-1] if work else None
        if isinstance(last, Product) and last.x is part.b and np.array_equal(last.columns, columns):
            last.members.append((part, matrix))
        else:
            work.append(Product(part.b, columns, [(part, matrix)], 0))
    for item in work:
        if isinstance(item, Product):
            item.buffer, at = len(widths), 0
            widths.append(sum(v.size for v, _ in item.members))
            for v, _ in item.members:
                places[v] = Place(item.buffer, at, widths[item.buffer])
                at += v.size
    for stored in plan.arrays:
        if stored not in places:
            places[stored] = Place(len(widths), 0, stored.size)
            widths.append(stored.size)
    return Parts(plan, work, places, widths)


def _matrix(v: ir.Contract) -> tuple[Ints, Ints] | None:
    """(columns of b, [k, e] elements of a's leaf) of a contraction of a parameter that is one matrix product, else None."""
    if not (isinstance(v.a, ir.Leaf) and v.a.kind == "param"):
        return None
    ia, ib = v.ia.array, v.ib.array
    r, q = np.nonzero((ia >= 0) & (ib >= 0))
    columns = np.unique(ib[r, q])
    at = np.searchsorted(columns, ib[r, q])
    if not len(columns) or len(np.unique(at * len(ia) + r)) != len(r):
        return None  # nothing, or a row that reads one number twice
    matrix = np.full((len(columns), len(ia)), -1, np.int64)
    matrix[at, r] = ia[r, q]
    return columns, matrix
