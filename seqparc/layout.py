"""How a tensor of a recording lies over the batch: which sample each element belongs to, and which number of that sample it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from seqparc import ir
from seqparc.errors import TraceError
from seqparc.graphs import mixes
from seqparc.ir import Value

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Laid:
    """A lowered tensor: `elem[p]` is the element of `value` at position p, `batch[p]` its sample (None: all samples)."""

    value: Value
    elem: Ints
    batch: Ints | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.elem.shape)


class Pair(NamedTuple):
    """A lowered complex tensor: two real ones of the same shape."""

    re: Laid
    im: Laid


class Layouts:
    """Operations on laid-out tensors at one batch size; `node` is the one being lowered, for messages."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.node: fx.Node | None = None

    def _src(self) -> ir.Source | None:
        return self.node.meta.get("src") if self.node else None

    def _rows(self, batch: Ints | None) -> tuple[Ints | None, Ints]:
        """`elem` of a new value laid out like `batch`, and the flat positions of each sample's elements, [samples, size]."""
        if batch is None:
            raise AssertionError("only for values with a batch axis")
        flat = batch.reshape(-1)
        order = np.argsort(flat, kind="stable")
        if np.any(np.bincount(flat, minlength=self.batch_size) * self.batch_size != flat.size):
            raise self._mixes()
        rows = order.reshape(self.batch_size, -1)
        elem = np.empty(flat.size, np.int64)
        elem[rows] = np.arange(rows.shape[1])
        return elem.reshape(batch.shape), rows

    def _mixes(self) -> TraceError:
        return mixes(self.node)

    def _join(self, shape: tuple[int, ...], tensors: Sequence[Laid]) -> tuple[Ints | None, list[Ints]]:
        """Broadcast to a shape: the common batch layout, and each operand's elements in the order of the new value."""
        batch: Ints | None = None
        for t in tensors:
            if t.batch is not None:
                b = np.broadcast_to(t.batch, shape)
                if batch is not None and not np.array_equal(batch, b):
                    raise self._mixes()
                batch = b
        elems = [np.broadcast_to(t.elem, shape).reshape(-1) for t in tensors]
        if batch is None:
            return None, elems
        _, rows = self._rows(batch)
        picked = []
        for e in elems:
            per_sample = e[rows]
            if not (per_sample == per_sample[:1]).all():
                raise self._mixes()
            picked.append(per_sample[0])
        return batch, picked

    def _new(self, value: Value, shape: tuple[int, ...], batch: Ints | None) -> Laid:
        if batch is None:
            return Laid(value, np.arange(value.size).reshape(shape), None)
        elem, _ = self._rows(batch)
        assert elem is not None
        return Laid(value, elem, batch)

    def _per_sample(self, flat: Ints, batch: Ints | None) -> Ints:
        """Rows of per-element indices of one sample, having checked that all samples have the same."""
        if batch is None:
            return flat
        _, rows = self._rows(batch)
        per = flat[rows]
        if not (per == per[:1]).all():
            raise self._mixes()
        return per[0]

    def _as_vector(self, t: Laid, shape: tuple[int, ...]) -> Value:
        """The elements of one sample in row-major order; a value without a batch axis is the same in all samples."""
        if t.batch is None:
            flat = np.broadcast_to(t.elem, (self.batch_size, *shape[1:])).reshape(self.batch_size, -1)
            return ir.take(t.value, flat[0])
        _, rows = self._rows(t.batch)
        return ir.take(t.value, t.elem.reshape(-1)[rows[0]])

    def _input(self, leaf: ir.Leaf, val: torch.Tensor) -> Laid:
        shape = (self.batch_size, *val.shape[1:])
        elem = np.broadcast_to(np.arange(leaf.size).reshape(shape[1:]), shape)
        batch = np.broadcast_to(np.arange(self.batch_size).reshape(-1, *[1] * (len(shape) - 1)), shape)
        return Laid(leaf, elem, batch)

    def move(self, node: fx.Node, sources: Sequence[Laid], apply: Callable[[list[torch.Tensor]], Any]) -> list[Laid]:
        """Any operation that only moves elements (and puts zeros), by applying it to numbered elements."""
        coded, start, values = [], 1, []
        starts = []
        for t in sources:
            size = t.value.size
            elem = np.zeros_like(t.elem) if isinstance(t.value, ir.Const) else t.elem  # any element of a constant is the first
            codes = elem if t.batch is None else t.batch * size + elem
            coded.append(torch.from_numpy(np.ascontiguousarray(codes + start)))
            starts.append(start)
            values.append(t.value)
            start += size * (1 if t.batch is None else self.batch_size)
        result = apply(coded)
        parts = result if isinstance(result, (list, tuple)) else [result]
        return [self._decode(p.numpy(), sources, starts, values) for p in parts]

    def _decode(self, codes: Ints, sources: Sequence[Laid], starts: list[int], values: list[Value]) -> Laid:
        which = np.searchsorted(np.array(starts), codes, side="right") - 1  # -1: a zero
        local = codes - np.array([*starts, 0])[which]
        sizes = np.array([*(v.size for v in values), 1])
        elem = np.where(which < 0, -1, local % sizes[which])
        batched = np.array([*(t.batch is not None for t in sources), False])[which]
        batch: Ints | None = None
        if any(t.batch is not None for t in sources):
            batch = np.where(batched, local // sizes[which], -1)
            if (batch < 0).any():
                batch = self._complete(batch)
        if len(values) == 1 and (which == 0).all():
            return Laid(values[0], elem, batch)  # a view: the same value, laid out otherwise
        if batch is None:
            return self._new(ir.gather(values, which.reshape(-1), elem.reshape(-1)), codes.shape, None)
        _, rows = self._rows(batch)
        w, e = which.reshape(-1)[rows], elem.reshape(-1)[rows]
        if not ((w == w[:1]).all() and (e == e[:1]).all()):
            raise self._mixes()
        return self._new(ir.gather(values, w[0], e[0]), codes.shape, batch)

    def _complete(self, batch: Ints) -> Ints:
        """Elements that belong to every sample (zeros, parameters) take the sample of the axis they lie on."""
        layouts = []
        for axis in range(batch.ndim):
            if batch.shape[axis] == self.batch_size:
                shape = [1] * batch.ndim
                shape[axis] = -1
                layouts.append(np.broadcast_to(np.arange(self.batch_size).reshape(shape), batch.shape))
        if batch.ndim == 1 and batch.size % self.batch_size == 0:  # a storage written flat: any part of a sample may lie together
            size = batch.size // self.batch_size
            layouts += [np.arange(batch.size) // n % self.batch_size for n in range(size, 0, -1) if size % n == 0]
        for along in layouts:
            if (along[batch >= 0] == batch[batch >= 0]).all():
                return along
        raise self._mixes()
