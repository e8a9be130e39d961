"""How ATen operations that are neither elementwise rows nor plain views are lowered: one handler each.

Compositions are written out in terms of rows, folds and products, in the order PyTorch's own kernels compute them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from seqparc.errors import UnsupportedOpError
from seqparc.exact import is_count
from seqparc.fused import floored
from seqparc.layout import Laid
from seqparc.lower import STRUCTURAL, Lowering, registers

lowers = registers(STRUCTURAL)


# -- arithmetic with extra arguments -------------------------------------------------------------------------------------


def _scaled(lo: Lowering, t: Any, factor: float) -> Any:
    if factor == 1:
        return t
    return lo.map("mul", t, float(factor)) if isinstance(t, Laid) else t * factor


@lowers("add.Tensor", "add.Scalar")
def _add(lo: Lowering, node: Any, a: Any, b: Any, alpha: float = 1) -> Laid:
    return lo.map("add", lo.lower(a), _scaled(lo, lo.lower(b), alpha))


@lowers("sub.Tensor", "sub.Scalar")
def _sub(lo: Lowering, node: Any, a: Any, b: Any, alpha: float = 1) -> Laid:
    return lo.map("sub", lo.lower(a), _scaled(lo, lo.lower(b), alpha))


@lowers("rsub.Tensor", "rsub.Scalar")
def _rsub(lo: Lowering, node: Any, a: Any, b: Any, alpha: float = 1) -> Laid:
    return lo.map("sub", lo.lower(b), _scaled(lo, lo.lower(a), alpha))


@lowers("pow.Tensor_Scalar")
def _pow(lo: Lowering, node: Any, a: Any, exponent: float) -> Laid:
    t = lo.lower(a)
    exact = {2: lambda: lo.map("square", t), 3: lambda: lo.map("mul", lo.map("square", t), t), 0.5: lambda: lo.map("sqrt", t),
             -0.5: lambda: lo.map("rsqrt", t), -1: lambda: lo.map("reciprocal", t), 1: lambda: t}
    return exact[exponent]() if exponent in exact else lo.map("pow", t, float(exponent))


@lowers("addcmul")
def _addcmul(lo: Lowering, node: Any, t: Any, a: Any, b: Any, value: float = 1) -> Laid:
    value = int(value) if is_count(node.meta["val"].dtype) else value
    return lo.map("add", lo.lower(t), _scaled(lo, lo.map("mul", lo.lower(a), lo.lower(b)), value))


@lowers("addcdiv")
def _addcdiv(lo: Lowering, node: Any, t: Any, a: Any, b: Any, value: float = 1) -> Laid:
    return lo.map("add", lo.lower(t), _scaled(lo, lo.map("div", lo.lower(a), lo.lower(b)), value))


@lowers("lerp.Scalar", "lerp.Tensor")
def _lerp(lo: Lowering, node: Any, a: Any, b: Any, weight: Any) -> Laid:
    """From the nearer end, as torch: b - (b - a) (1 - w) where |w| is a half or more, which gives b itself at 1."""
    start, end, w = lo.lower(a), lo.lower(b), lo.lower(weight)
    way = lo.map("sub", end, start)
    if not isinstance(w, Laid):
        return lo.map("add", *((start, lo.map("mul", way, w)) if abs(w) < 0.5 else (end, lo.map("mul", way, w - 1.0))))
    far = lo.map("ge", lo.map("abs", w), 0.5)
    share = lo.map("where", far, lo.map("sub", w, 1.0), w)
    return lo.map("add", lo.map("where", far, end, start), lo.map("mul", way, share))


@lowers("div.Tensor_mode", "floor_divide")
def _div_mode(lo: Lowering, node: Any, a: Any, b: Any, rounding_mode: str | None = "floor") -> Laid:
    x, y = lo.lower(a), lo.lower(b)
    if rounding_mode != "floor":
        quotient = lo.map("div", x, y)
        return lo.map(rounding_mode, quotient) if rounding_mode else quotient
    # As torch: by the exact remainder, as a quotient that is rounded up to a whole number would be one too large.
    left = lo.map("fmod", x, y)
    below, none = (lo.map("lt", y, 0.0), lo.map("eq", y, 0.0)) if isinstance(y, Laid) else (float(y < 0), float(y == 0))
    other = lo.map("mul", lo.map("ne", left, 0.0), lo.map("ne", lo.map("lt", left, 0.0), below))
    exact = lo.map("sub", lo.map("div", lo.map("sub", x, left), y), other)
    whole = lo.map("floor", exact)
    near = lo.map("add", whole, lo.map("gt", lo.map("sub", exact, whole), 0.5))
    # A quotient by zero has the sign of both, and like any other of these no derivative.
    return lo.map("where", none, lo.map("div", lo.map("sign", x), lo.map("trunc", y) if isinstance(y, Laid) else y), near)


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(lo: Lowering, node: Any, c: Any, a: Any, b: Any) -> Laid:
    return lo.map("where", lo.lower(c), lo.lower(a), lo.lower(b))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(lo: Lowering, node: Any, t: Any, mask: Any, value: Any) -> Laid:
    filling, dtype = lo.lower(value), node.meta["val"].dtype
    if isinstance(filling, Laid):
        filling = lo.cast(filling, value.meta["val"].dtype, dtype)
    return lo.map("where", lo.lower(mask), filling, lo.lower(t))


@lowers("clamp", "clamp.Tensor", "clamp_min", "clamp_max", "clamp_min.Tensor", "clamp_max.Tensor", "hardtanh")
def _clamp(lo: Lowering, node: Any, t: Any, low: Any = None, high: Any = None, **named: Any) -> Laid:
    name = str(node.target)
    low, high = named.get("min", low), named.get("max", high)
    if "clamp_max" in name:
        low, high = None, low
    if "hardtanh" in name:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    # The derivative is 1 at the bounds for clamp and 0 for hardtanh, as autograd has it.
    above, below = ("le", "ge") if "hardtanh" in name else ("lt", "gt")
    value = lo.lower(t)
    for given, beyond in ((low, above), (high, below)):
        if given is not None:
            bound = lo.lower(given)
            value = lo.map("where", lo.map(beyond, value, bound), bound, value)
            if isinstance(bound, Laid):  # nothing is beyond a bound that is no number, and torch gives that
                value = lo.map("where", lo.map("eq", bound, bound), value, bound)
            elif bound != bound:
                value = lo.map("mul", value, bound)
    return value  # type: ignore[no-any-return]


def _of_truths(node: Any) -> None:
    """Raises UnsupportedOpError for an operation on the bits of numbers."""
    if "bitwise" in str(node.target) and node.meta["val"].dtype is not torch.bool:
        raise UnsupportedOpError(f"{node.meta.get('src')}: {node.target} of integers that depend on the state")


@lowers("logical_and", "bitwise_and.Tensor")
def _and(lo: Lowering, node: Any, a: Any, b: Any) -> Laid:
    _of_truths(node)
    return lo.map("mul", lo.map("ne", lo.lower(a), 0.0), lo.map("ne", lo.lower(b), 0.0))


@lowers("logical_or", "bitwise_or.Tensor")
def _or(lo: Lowering, node: Any, a: Any, b: Any) -> Laid:
    _of_truths(node)
    return lo.map("maximum", lo.map("ne", lo.lower(a), 0.0), lo.map("ne", lo.lower(b), 0.0))


@lowers("logical_not", "bitwise_not")
def _not(lo: Lowering, node: Any, a: Any) -> Laid:
    _of_truths(node)
    return lo.map("eq", lo.lower(a), 0.0)


@lowers("_to_copy")
def _to_copy(lo: Lowering, node: Any, t: Any, dtype: torch.dtype | None = None, **_: Any) -> Laid:
    source = lo.lower(t)
    return source if dtype is None else lo.cast(source, t.meta["val"].dtype, dtype)  # type: ignore[no-any-return]


@lowers("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty")
def _like(lo: Lowering, node: Any, t: Any, *args: Any, **kwargs: Any) -> Laid:
    name = str(node.target).removeprefix("aten.").removesuffix(".default")
    source = lo.lower(t)
    shape = list(source.shape) if name.endswith("_like") else list(args[0])
    value = args[0] if name == "full_like" else args[1] if name == "new_full" else 1.0 if "ones" in name else 0.0
    return Laid(_const(lo.kinds.constant(value, lo.common, node)), np.zeros(shape, np.int64), None)


def _const(value: float) -> Any:
    from seqparc import ir

    return ir.const(float(value))


# -- activations as PyTorch computes them --------------------------------------------------------------------------------


@lowers("silu")
def _silu(lo: Lowering, node: Any, t: Any) -> Laid:
    return lo.map("mul", lo.lower(t), lo.map("sigmoid", lo.lower(t)))


@lowers("gelu")
def _gelu(lo: Lowering, node: Any, t: Any, approximate: str = "none") -> Laid:
    x = lo.lower(t)
    if approximate == "none":
        inner = lo.map("erf", lo.map("mul", x, math.sqrt(0.5)))
    else:
        cubic = lo.map("add", x, lo.map("mul", lo.map("mul", lo.map("square", x), x), 0.044715))
        inner = lo.map("tanh", lo.map("mul", cubic, math.sqrt(2 / math.pi)))
    return lo.map("mul", lo.map("mul", x, 0.5), lo.map("add", inner, 1.0))


@lowers("softplus")
def _softplus(lo: Lowering, node: Any, t: Any, beta: float = 1, threshold: float = 20) -> Laid:
    x = lo.lower(t)
    scaled = _scaled(lo, x, beta)
    large = lo.map("gt", scaled, float(threshold))
    # Where it is not taken it has a derivative all the same, which is not to be 0 times infinity.
    soft = _scaled(lo, lo.map("log1p", lo.map("exp", lo.map("where", large, 0.0, scaled))), 1 / beta)
    return lo.map("where", large, x, soft)


@lowers("elu")
def _elu(lo: Lowering, node: Any, t: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Laid:
    x = lo.lower(t)
    large = lo.map("gt", x, 0.0)
    low = lo.map("mul", lo.map("expm1", lo.map("where", large, 0.0, _scaled(lo, x, input_scale))), float(alpha * scale))
    return lo.map("where", large, _scaled(lo, x, scale), low)


@lowers("leaky_relu")
def _leaky(lo: Lowering, node: Any, t: Any, slope: float = 0.01) -> Laid:
    x = lo.lower(t)
    return lo.map("where", lo.map("gt", x, 0.0), x, lo.map("mul", x, float(slope)))


@lowers("_prelu_kernel")
def _prelu(lo: Lowering, node: Any, t: Any, weight: Any) -> Laid:
    x = lo.lower(t)
    return lo.map("where", lo.map("gt", x, 0.0), x, lo.map("mul", x, lo.lower(weight)))


@lowers("log_sigmoid_forward")
def _log_sigmoid(lo: Lowering, node: Any, t: Any) -> list[Laid]:
    x = lo.lower(t)
    e = lo.map("exp", lo.map("neg", lo.map("abs", x)))  # what its derivative is given
    return [lo.map("sub", lo.map("minimum", x, 0.0), lo.map("log1p", e)), e]


@lowers("hardsigmoid")
def _hardsigmoid(lo: Lowering, node: Any, t: Any) -> Laid:
    x = lo.lower(t)
    inner = lo.map("div", lo.map("add", x, 3.0), 6.0)  # which has no derivative at either end, as autograd has it
    return lo.map("where", lo.map("le", x, -3.0), 0.0, lo.map("where", lo.map("ge", x, 3.0), 1.0, inner))


@lowers("mish")
def _mish(lo: Lowering, node: Any, t: Any) -> Laid:
    return lo.map("mul", lo.lower(t), lo.map("tanh", _softplus(lo, node, t)))


# -- products ------------------------------------------------------------------------------------------------------------


@lowers("mm", "bmm")
def _mm(lo: Lowering, node: Any, a: Any, b: Any) -> Laid:
    return lo.product(lo.lower(a), lo.lower(b))


@lowers("addmm", "baddbmm")
def _addmm(lo: Lowering, node: Any, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Laid:
    result = _scaled(lo, lo.product(lo.lower(a), lo.lower(b)), alpha)
    return lo.map("add", result, _scaled(lo, lo.lower(c), beta)) if beta else result


def _axis(lo: Lowering, t: Laid, axis: int) -> Laid:
    return Laid(t.value, np.expand_dims(t.elem, axis), None if t.batch is None else np.expand_dims(t.batch, axis))


def _drop(t: Laid, axis: int) -> Laid:
    return Laid(t.value, np.squeeze(t.elem, axis), None if t.batch is None else np.squeeze(t.batch, axis))


@lowers("mv")
def _mv(lo: Lowering, node: Any, a: Any, b: Any) -> Laid:
    return _drop(lo.product(lo.lower(a), _axis(lo, lo.lower(b), -1)), -1)


@lowers("dot")
def _dot(lo: Lowering, node: Any, a: Any, b: Any) -> Laid:
    return _drop(_drop(lo.product(_axis(lo, lo.lower(a), 0), _axis(lo, lo.lower(b), -1)), -1), 0)


@lowers("linear")
def _linear(lo: Lowering, node: Any, x: Any, w: Any, bias: Any = None) -> Laid:
    weight = lo.lower(w)
    t = lo.lower(x)
    flat = Laid(t.value, t.elem.reshape(-1, t.shape[-1]), None if t.batch is None else t.batch.reshape(-1, t.shape[-1]))
    result = lo.product(flat, Laid(weight.value, weight.elem.T, None))
    shape = (*t.shape[:-1], weight.shape[0])
    result = Laid(result.value, result.elem.reshape(shape), None if result.batch is None else result.batch.reshape(shape))
    return result if bias is None else lo.map("add", result, lo.lower(bias))


# -- folds ---------------------------------------------------------------------------------------------------------------


@lowers("sum", "sum.dim_IntList")
def _sum(lo: Lowering, node: Any, t: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Laid:
    return lo.fold("sum", _of_dtype(lo, t, dtype), dim, keepdim)


def _of_dtype(lo: Lowering, t: Any, dtype: torch.dtype | None) -> Laid:
    """What a fold is asked to fold in a dtype."""
    source = lo.lower(t)
    return source if dtype is None else lo.cast(source, t.meta["val"].dtype, dtype)  # type: ignore[no-any-return]


@lowers("mean", "mean.dim")
def _mean(lo: Lowering, node: Any, t: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Laid:
    source = _of_dtype(lo, t, dtype)
    total = lo.fold("sum", source, dim, keepdim)
    return lo.map("div", total, float(source.elem.size / total.elem.size))


@lowers("amax")
def _amax(lo: Lowering, node: Any, t: Any, dim: Any = None, keepdim: bool = False) -> Laid:
    return lo.fold("max", lo.lower(t), dim, keepdim)


@lowers("amin")
def _amin(lo: Lowering, node: Any, t: Any, dim: Any = None, keepdim: bool = False) -> Laid:
    return lo.map("neg", lo.fold("max", lo.map("neg", lo.lower(t)), dim, keepdim))


@lowers("var.correction")
def _var(lo: Lowering, node: Any, t: Any, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> Laid:
    source = lo.lower(t)
    count = source.elem.size / lo.fold("sum", source, dim, True).elem.size
    mean = lo.map("div", lo.fold("sum", source, dim, True), float(count))
    squares = lo.fold("sum", lo.map("square", lo.map("sub", source, mean)), dim, keepdim)
    return lo.map("div", squares, float(max(count - (1 if correction is None else correction), 0)))


@lowers("linalg_vector_norm")
def _norm(lo: Lowering, node: Any, t: Any, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Laid:
    if order != 2:
        raise UnsupportedOpError(f"{node.meta.get('src')}: a vector norm of order {order} in the core")
    squares = lo.fold("sum", lo.map("square", _of_dtype(lo, t, dtype)), dim, keepdim)
    nothing = lo.map("eq", squares, 0.0)  # whose gradient is 0, as autograd has it
    return lo.map("where", nothing, squares, lo.map("sqrt", lo.map("where", nothing, 1.0, squares)))


def _floored(lo: Lowering, node: Any, size: Any, least: float) -> Laid:
    """See `seqparc.fused.floored`."""
    n = lo.lower(size)
    return lo.map("where", lo.map("lt", n, least), lo.map("add", n, lo.map("held", lo.map("sub", least, n))), n)


STRUCTURAL[str(floored)] = _floored


@lowers("native_layer_norm")
def _layer_norm(lo: Lowering, node: Any, t: Any, shape: Any, weight: Any, bias: Any, eps: float) -> list[Laid]:
    x = lo.lower(t)
    dims = list(range(-len(shape), 0))
    size = float(math.prod(shape))
    mean = lo.map("div", lo.fold("sum", x, dims, True), size)
    centred = lo.map("sub", x, mean)
    variance = lo.map("div", lo.fold("sum", lo.map("square", centred), dims, True), size)
    scale = lo.map("rsqrt", lo.map("add", variance, float(eps)))
    y = lo.map("mul", centred, scale)
    if weight is not None:
        y = lo.map("mul", y, lo.lower(weight))
    if bias is not None:
        y = lo.map("add", y, lo.lower(bias))
    return [y, mean, scale]


@lowers("_softmax", "_log_softmax")
def _softmax(lo: Lowering, node: Any, t: Any, dim: int, half_to_float: bool = False) -> Laid:
    x = lo.lower(t)
    shifted = lo.map("sub", x, lo.fold("max", x, [dim], True))
    e = lo.map("exp", shifted)
    total = lo.fold("sum", e, [dim], True)
    if "log" in str(node.target):
        return lo.map("sub", shifted, lo.map("log", total))
    return lo.map("div", e, total)


# -- several sources -----------------------------------------------------------------------------------------------------


@lowers("cat", "stack")
def _cat(lo: Lowering, node: Any, tensors: Any, dim: int = 0) -> Laid:
    return lo.move(node, lo.lower(tensors), lambda c: node.target(c, dim))[0]


@lowers("slice_scatter", "select_scatter", "as_strided_scatter")
def _scatter(lo: Lowering, node: Any, t: Any, source: Any, *where: Any, **named: Any) -> Laid:
    return lo.move(node, [lo.lower(t), lo.lower(source)], lambda c: node.target(c[0], c[1], *where, **named))[0]


@lowers("select_backward", "slice_backward", "diagonal_backward")
def _placed(lo: Lowering, node: Any, g: Any, *where: Any) -> Laid:
    return lo.move(node, [lo.lower(g)], lambda c: node.target(c[0], *where))[0]


@lowers("index.Tensor")
def _index(lo: Lowering, node: Any, t: Any, indices: Any) -> Laid:
    fixed = lo._static_index(list(indices))
    return lo.move(node, [lo.lower(t)], lambda c: node.target(c[0], fixed))[0]


# -- derivatives, met when the cell's own gradient is recorded -----------------------------------------------------------


@lowers("sigmoid_backward")
def _sigmoid_backward(lo: Lowering, node: Any, g: Any, y: Any) -> Laid:
    y = lo.lower(y)
    return lo.map("mul", lo.lower(g), lo.map("mul", y, lo.map("sub", 1.0, y)))


@lowers("tanh_backward")
def _tanh_backward(lo: Lowering, node: Any, g: Any, y: Any) -> Laid:
    return lo.map("mul", lo.lower(g), lo.map("sub", 1.0, lo.map("square", lo.lower(y))))


@lowers("threshold_backward")
def _threshold_backward(lo: Lowering, node: Any, g: Any, x: Any, threshold: float) -> Laid:
    return lo.map("where", lo.map("le", lo.lower(x), float(threshold)), 0.0, lo.lower(g))
