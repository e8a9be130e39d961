"""The intermediate representation: one time step of a recurrent cell, per batch element and per lane.

A value is a flat vector of `size` numbers. Six kinds of value are enough for every cell:

    Leaf      elements of a state, stream (per-step input) or parameter tensor
    Const     one number, `size` times
    Map       an elementwise operation from the table in `seqparc.ops`
    Gather    elements picked from one or more values (every view, slice, cat and broadcast)
    Contract  out[e] = sum_k a[ia[e, k]] * b[ib[e, k]]   (mm, bmm, convolution, ...)
    Reduce    out[e] = sum or max over k of x[index[e, k]]

Which element goes where is always an explicit `Index`, so what a value depends on can be read off exactly; nothing is
inferred from tensor ranks. Index -1 stands for the number zero in Gather and Contract and for "nothing" in Reduce.

Values are immutable and interned: two equal values are one object, so common subexpressions never exist twice.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqparc.locks import Lock

Kind = Literal["state", "stream", "param"]
Fold = Literal["sum", "max"]


class Index:
    """A read-only integer array with value equality: which element of a source each output element reads."""

    __slots__ = ("_key", "array")

    def __init__(self, array: ArrayLike) -> None:
        data = np.array(array, dtype=np.int32, order="C")
        data.setflags(write=False)
        self.array: NDArray[np.int32] = data
        self._key = (data.shape, data.tobytes())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Index(shape={self.shape})"

    def affine(self) -> tuple[int, tuple[int, ...]] | None:
        """`(offset, strides)` if array[i, j, ...] == offset + strides · (i, j, ...), else None."""
        return affine(self.array)

    def is_identity(self, size: int) -> bool:
        return self.shape == (size,) and bool((self.array == np.arange(size)).all())


def affine(array: NDArray[Any]) -> tuple[int, tuple[int, ...]] | None:
    """`(offset, strides)` of an array that is affine in its own indices, else None."""
    if array.size == 0:
        return None
    offset = int(array.flat[0])
    strides = []
    grid: Any = offset
    for axis, extent in enumerate(array.shape):
        corner = [0] * array.ndim
        if extent > 1:
            corner[axis] = 1
        stride = int(array[tuple(corner)]) - offset
        strides.append(stride)
        shape = [1] * array.ndim
        shape[axis] = extent
        grid = grid + (np.arange(extent) * stride).reshape(shape)
    return (offset, tuple(strides)) if np.array_equal(np.broadcast_to(grid, array.shape), array) else None


def distinct(numbers: NDArray[Any]) -> bool:
    """Whether no number occurs twice. (np.unique would import numpy.ma, at 0.03 s, to count them.)"""
    return bool(np.diff(np.sort(numbers.reshape(-1))).all())


@dataclass(frozen=True)
class Source:
    """Where in the user's code a value was written."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def label(self) -> str:
        """The same, short and safe in a comment of generated code."""
        return f"{plain(self.file.rsplit('/', 1)[-1])}:{self.line}"


def plain(text: str) -> str:
    """A text of a user's, without what could end a comment that it stands in: a file's name may hold anything."""
    return re.sub(r"[^\w .,+()=-]", "?", text)


@dataclass(frozen=True, eq=False)
class Value:
    """A flat vector of `size` numbers; equality is identity (values are interned)."""

    size: int

    @property
    def args(self) -> tuple[Value, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Leaf(Value):
    """Elements `index[g]` of tensor `slot` of a kind, in lane g; `index` has shape [lanes, size]."""

    kind: Kind
    slot: int
    index: Index


@dataclass(frozen=True, eq=False)
class Const(Value):
    value: float


@dataclass(frozen=True, eq=False)
class Map(Value):
    op: str
    operands: tuple[Value, ...]
    src: Source | None = None

    @property
    def args(self) -> tuple[Value, ...]:
        return self.operands


@dataclass(frozen=True, eq=False)
class Gather(Value):
    """out[e] = sources[which[e]][index[e]]; which -1 is zero."""

    sources: tuple[Value, ...]
    which: Index
    index: Index

    @property
    def args(self) -> tuple[Value, ...]:
        return self.sources


@dataclass(frozen=True, eq=False)
class Contract(Value):
    """out[e] = sum over k of a[ia[e, k]] * b[ib[e, k]]; a pair with a -1 in it adds nothing."""

    a: Value
    b: Value
    ia: Index
    ib: Index
    src: Source | None = None

    @property
    def args(self) -> tuple[Value, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Reduce(Value):
    """out[e] = fold over k of x[index[e, k]]; -1 adds nothing."""

    fold: Fold
    x: Value
    index: Index
    src: Source | None = None

    @property
    def args(self) -> tuple[Value, ...]:
        return (self.x,)


_interned: weakref.WeakValueDictionary[tuple[Any, ...], Value] = weakref.WeakValueDictionary()
_interning = Lock()  # the backward kernel is made beside the forward one, and of the same values


def _intern(key: tuple[Any, ...], make: Callable[[], Value]) -> Any:
    with _interning():
        found = _interned.get(key)
        if found is None:
            found = _interned[key] = make()
        return found


def leaf(kind: Kind, slot: int, index: ArrayLike | Index) -> Leaf:
    """Elements of a tensor; `index` is [lanes, size]."""
    idx = index if isinstance(index, Index) else Index(index)
    return _intern((Leaf, kind, slot, idx), lambda: Leaf(idx.shape[1], kind, slot, idx))  # type: ignore[no-any-return]


def const(value: float, size: int = 1) -> Const:
    value = float(value)
    return _intern((Const, size, value.hex()), lambda: Const(size, value))  # type: ignore[no-any-return]


def map_(op: str, *operands: Value, src: Source | None = None) -> Map:
    size = operands[0].size
    if any(v.size != size for v in operands):
        raise ValueError(f"operands of {op} have sizes {[v.size for v in operands]}")
    return _intern((Map, op, operands), lambda: Map(size, op, operands, src))  # type: ignore[no-any-return]


def gather(sources: Iterable[Value], which: ArrayLike, index: ArrayLike) -> Value:
    """Pick elements; gathers of gathers are composed, unused sources dropped, an identity returns its source."""
    values = list(sources)
    which, index = np.array(which, np.int32), np.array(index, np.int32)
    which[index < 0] = -1
    flat: list[Value] = []
    new_which, new_index = np.full_like(which, -1), np.full_like(index, -1)

    def put(source: Value, at: NDArray[Any], elements: NDArray[Any]) -> None:
        if source not in flat:
            flat.append(source)
        new_which[at], new_index[at] = flat.index(source), elements

    for i, value in enumerate(values):
        at = np.flatnonzero(which == i)
        if at.size == 0:
            continue
        elements = index[at]
        if isinstance(value, Gather):
            inner_which, inner_index = value.which.array[elements], value.index.array[elements]
            for j, source in enumerate(value.sources):
                here = inner_which == j
                if here.any():
                    put(source, at[here], inner_index[here])
        elif isinstance(value, Const):
            put(const(value.value, 1), at, np.zeros_like(elements))
        else:
            put(value, at, elements)
    if not flat:
        return const(0.0, which.size)
    if len(flat) == 1 and (new_which == 0).all():
        only = flat[0]
        if isinstance(only, Const):
            return const(only.value, which.size)
        if np.array_equal(new_index, np.arange(only.size)):
            return only
    w, x = Index(new_which), Index(new_index)
    made = tuple(flat)
    return _intern((Gather, made, w, x), lambda: Gather(which.size, made, w, x))  # type: ignore[no-any-return]


def origins(value: Value) -> list[tuple[Value, int]]:
    """What each element of a value is an element of, gathers seen through; a hole is one of zero."""
    if not isinstance(value, Gather):
        return [(value, e) for e in range(value.size)]
    picked = zip(value.which.array.tolist(), value.index.array.tolist(), strict=True)
    return [(const(0.0), 0) if w < 0 else (value.sources[w], e) for w, e in picked]


def take(x: Value, index: ArrayLike) -> Value:
    """x[index], with -1 for zero."""
    index = np.asarray(index, np.int32)
    return gather((x,), np.where(index < 0, -1, 0), index)


def absorb(v: Value, i: NDArray[Any]) -> tuple[Value, NDArray[Any]]:
    """What v[i] reads where v only picks elements of one value: that value, and i in terms of it."""
    if isinstance(v, Gather) and len(v.sources) == 1 and (v.which.array == 0).all():
        return v.sources[0], np.where(i < 0, -1, v.index.array[i])
    return v, i


def contract(a: Value, b: Value, ia: ArrayLike, ib: ArrayLike, src: Source | None = None) -> Value:
    """A sum of products; single-source gathers of either operand are absorbed into its index."""
    ia, ib = np.array(ia, np.int32), np.array(ib, np.int32)
    a, ia = absorb(a, ia)
    b, ib = absorb(b, ib)
    dead = (ia < 0) | (ib < 0)
    ia[dead] = ib[dead] = -1
    xa, xb = Index(ia), Index(ib)
    return _intern((Contract, a, b, xa, xb), lambda: Contract(ia.shape[0], a, b, xa, xb, src))  # type: ignore[no-any-return]


def reduce_(fold: Fold, x: Value, index: ArrayLike | Index, src: Source | None = None) -> Value:
    idx = index if isinstance(index, Index) else Index(index)
    return _intern((Reduce, fold, x, idx), lambda: Reduce(idx.shape[0], fold, x, idx, src))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Store:
    """A value written to elements `index[g]` of output tensor `slot` in lane g; `index` has shape [lanes, size]."""

    slot: int
    index: Index
    value: Value


@dataclass(frozen=True)
class Program:
    """One time step in every lane: reads state, streams and parameters; gives the next state, emits and sums.

    `emits` are written at every step to tensors [batch, time, emit_sizes[slot]]; `sums` are added up over the steps a
    lane runs. All sizes are flat element counts of one batch element (and, for parameters, of the whole tensor).
    """

    name: str
    lanes: int
    state: tuple[Leaf, ...]
    next: tuple[Value, ...]
    emits: tuple[Store, ...] = ()
    sums: tuple[Store, ...] = ()
    state_sizes: tuple[int, ...] = ()
    stream_sizes: tuple[int, ...] = ()
    param_sizes: tuple[int, ...] = ()
    emit_sizes: tuple[int, ...] = ()
    sum_sizes: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def n(self) -> int:
        """State numbers in one lane."""
        return sum(v.size for v in self.state)

    @functools.cached_property
    def filled(self) -> tuple[float, ...]:
        """How much of each emit slot is written: 1 is all of it, 0 nothing."""
        written = [sum(s.index.array.size for s in self.emits if s.slot == slot) for slot in range(len(self.emit_sizes))]
        return tuple(w / max(size, 1) for w, size in zip(written, self.emit_sizes, strict=True))

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (*self.next, *(s.value for s in self.emits), *(s.value for s in self.sums))


def topological(roots: Iterable[Value]) -> list[Value]:
    """Every value the roots need, arguments first, each once, in a deterministic order."""
    order: list[Value] = []
    seen: set[Value] = set()
    stack: list[tuple[Value, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        value, expanded = stack.pop()
        if expanded:
            order.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((a, False) for a in reversed(value.args))
    return order


def rebuild(value: Value, args: tuple[Value, ...]) -> Value:
    """The same operation on other arguments; the value itself if they are the same."""
    if args == value.args:
        return value
    match value:
        case Map(op=op, src=src):
            return map_(op, *args, src=src)
        case Gather(which=which, index=index):
            return gather(args, which.array, index.array)
        case Contract(ia=ia, ib=ib, src=src):
            return contract(args[0], args[1], ia.array, ib.array, src)
        case Reduce(fold=fold, index=index, src=src):
            return reduce_(fold, args[0], index, src)
        case _:
            raise TypeError(f"{type(value).__name__} has no arguments")


def rewrite(roots: Iterable[Value], rule: Callable[[Value, tuple[Value, ...]], Value]) -> dict[Value, Value]:
    """Apply `rule(old value, its rewritten arguments)` bottom up; the map from old values to new ones."""
    done: dict[Value, Value] = {}
    for value in topological(roots):
        done[value] = rule(value, tuple(done[a] for a in value.args))
    return done


def leaves(roots: Iterable[Value], kind: Kind | None = None) -> list[Leaf]:
    return [v for v in topological(roots) if isinstance(v, Leaf) and kind in (None, v.kind)]
