"""Convolutions as sums of products, and what their gradients with respect to the input are: convolutions again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from seqparc.errors import UnsupportedOpError
from seqparc.layout import Ints, Laid
from seqparc.lower import Lowering
from seqparc.structural import lowers

#: Products of one convolution and sample: each is a number in memory while compiling, and one in the kernel's tables.
MOST_PRODUCTS = 20_000_000


def _axes(values: Sequence[int], count: int) -> list[int]:
    return list(values) * count if len(values) == 1 else list(values)


def _read(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Ints:
    """[positions of the output, places of the kernel]: which input position that reads; -1 is outside."""
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    at = np.arange(count)[:, None] * stride - padding + np.arange(kernel) * dilation
    return np.where((at >= 0) & (at < size), at, -1)


def _read_transposed(size: int, kernel: int, stride: int, padding: int, dilation: int, count: int) -> Ints:
    """The same for the transposed convolution, with `count` output positions."""
    far = np.arange(count)[:, None] + padding - np.arange(kernel) * dilation
    at = far // stride
    return np.where((far % stride == 0) & (at >= 0) & (at < size), at, -1)


def _convolve(lo: Lowering, x: Laid, weight: Ints, w: Laid, reads: list[Ints]) -> Laid:
    """out[b, o, p] = Σ w[weight[o, c, k]] x[b, c of o's group, read[p, k]]; weight [groups, o, c, k]."""
    groups, outs, per, kernel = weight.shape
    batch, places = x.shape[0], tuple(len(r) for r in reads)
    d = len(reads)
    position: Ints = np.zeros((1,) * 2 * d, np.int64)
    inside = np.ones((1,) * 2 * d, bool)
    for axis, (read, size) in enumerate(zip(reads, x.shape[2:], strict=True)):
        shape = [1] * 2 * d
        shape[axis], shape[d + axis] = read.shape
        position = position * size + np.maximum(read, 0).reshape(shape)
        inside = inside & (read >= 0).reshape(shape)
    count = math.prod(places)
    if groups * outs * count * per * kernel > MOST_PRODUCTS:
        where = lo.node.meta.get("src") if lo.node else ""
        raise UnsupportedOpError(f"{where}: a convolution of more than {MOST_PRODUCTS:,} products a step")
    position, inside = position.reshape(count, kernel), inside.reshape(count, kernel)
    full = (batch, groups, outs, count, per, kernel)

    def spread(of_input: Ints, outside: int) -> Ints:
        picked = np.where(inside, of_input.reshape(batch, groups, per, -1)[..., position], outside)  # [batch, groups, per, count, kernel]
        return np.broadcast_to(picked.transpose(0, 1, 3, 2, 4)[:, :, None], full).reshape(-1, per * kernel)

    sample = None
    if x.batch is not None:
        sample = np.broadcast_to(np.arange(batch).reshape(-1, *[1] * (d + 1)), (batch, groups * outs, *places))
        if not (x.batch == np.arange(batch).reshape(-1, *[1] * (d + 1))).all():
            raise lo._mixes()
    elements = np.broadcast_to(w.elem.reshape(-1)[weight][None, :, :, None], full).reshape(-1, per * kernel)
    ia, ib = lo._per_sample(elements, sample), lo._per_sample(spread(x.elem, -1), sample)
    return lo._new(lo._contract(w.value, x.value, ia, ib), (batch, groups * outs, *places), sample)


def _transposed(
    lo: Lowering, x: Laid, w: Laid, stride: list[int], padding: list[int], dilation: list[int], counts: Sequence[int], groups: int
) -> Laid:
    """The transposed convolution of x by w [channels of x, outputs of a group, ...], with so many positions."""
    sizes = w.shape[2:]
    reads = [_read_transposed(*a) for a in zip(x.shape[2:], sizes, stride, padding, dilation, counts, strict=True)]
    numbered = np.arange(w.elem.size).reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return _convolve(lo, x, numbered.transpose(0, 2, 1, 3), w, reads)


@lowers("convolution")
def _convolution(
    lo: Lowering, node: Any, t: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Laid:  # fmt: skip
    x, w = lo.lower(t), lo.lower(weight)
    d = len(x.shape) - 2
    stride, padding, dilation, more = (_axes(v, d) for v in (stride, padding, dilation, output_padding))
    if transposed:
        counts = [
            (n - 1) * s - 2 * p + e * (k - 1) + o + 1
            for n, s, p, e, k, o in zip(x.shape[2:], stride, padding, dilation, w.shape[2:], more, strict=True)
        ]
        y = _transposed(lo, x, w, stride, padding, dilation, counts, groups)
    else:
        reads = [_read(*a) for a in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)]
        numbered = np.arange(w.elem.size).reshape(groups, w.shape[0] // groups, w.shape[1], -1)
        y = _convolve(lo, x, numbered, w, reads)
    if bias is None:
        return y
    b = lo.lower(bias)
    return lo.map("add", y, Laid(b.value, b.elem.reshape(-1, *[1] * d), None))


@lowers("convolution_backward")
def _convolution_backward(
    lo: Lowering, node: Any, g: Any, t: Any, weight: Any, bias_sizes: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Any,
) -> list[Laid | None]:  # fmt: skip
    if wanted[1] or wanted[2] or transposed:
        raise UnsupportedOpError(f"{node.meta.get('src')}: this gradient of a convolution in the core")
    cotangent, w, x = lo.lower(g), lo.lower(weight), lo.lower(t)
    d = len(x.shape) - 2
    stride, padding, dilation = (_axes(v, d) for v in (stride, padding, dilation))
    return [_transposed(lo, cotangent, w, stride, padding, dilation, x.shape[2:], groups), None, None]
