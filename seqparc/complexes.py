"""Complex numbers in the core: a complex tensor is a pair of real ones, and every operation on it is written in real arithmetic.

Operations that only move or add numbers are lowered twice, once for each part. What the core takes from outside stays complex there:
its two parts are taken where it comes in. States are real by then (`runtime.derived`), so gradients follow torch's conventions, as
those of `view_as_real` and `view_as_complex` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from seqparc import ir
from seqparc.errors import UnsupportedOpError
from seqparc.layout import Laid, Pair
from seqparc.lower import COMPLEX, STRUCTURAL, Lowering, registers
from seqparc.ops import OPS, SPLITS, VIEWS

#: A part of a complex number; None: the imaginary part of what is real, which takes part in nothing.
Part = Laid | float | None


lowers = registers(COMPLEX)


# -- real arithmetic that leaves out what is not there ---------------------------------------------------------------------


def _map(lo: Lowering, op: str, *parts: Part) -> Part:
    """An operation on parts that are there, any of which may be a number."""
    there = [p for p in parts if p is not None]
    if any(isinstance(p, Laid) for p in there):
        return lo.map(op, *there)
    return float(OPS[op].torch(*(torch.tensor(p, dtype=torch.float64) for p in there)))


def _add(lo: Lowering, a: Part, b: Part) -> Part:
    return b if a is None else a if b is None else _map(lo, "add", a, b)


def _neg(lo: Lowering, a: Part) -> Part:
    return None if a is None else _map(lo, "neg", a)


def _sub(lo: Lowering, a: Part, b: Part) -> Part:
    return a if b is None else _neg(lo, b) if a is None else _map(lo, "sub", a, b)


def _mul(lo: Lowering, a: Part, b: Part) -> Part:
    return None if a is None or b is None else _map(lo, "mul", a, b)


def _div(lo: Lowering, a: Part, b: Part) -> Part:
    return None if a is None else _map(lo, "div", a, b)


def _zero(a: Part) -> Part:
    """A part where an operation needs it to be there."""
    return 0.0 if a is None else a


def _parts(lo: Lowering, value: Any) -> tuple[Part, Part]:
    """The two parts of anything an operation may be given."""
    found = value if isinstance(value, Pair) else lo.lower(value)
    if isinstance(found, Pair):
        return found.re, found.im
    if isinstance(found, complex):
        return found.real, found.imag
    return (found, None) if isinstance(found, Laid) else (float(found), None)


def _pair(lo: Lowering, node: fx.Node, re: Part, im: Part) -> Pair:
    """Two parts as a complex tensor: both of its shape."""
    shapes = [p.shape for p in (re, im) if isinstance(p, Laid)]
    shape = np.broadcast_shapes(*shapes) if shapes else tuple(node.meta["val"].shape)
    return Pair(_spread(lo, node, re, shape), _spread(lo, node, im, shape))


def _spread(lo: Lowering, node: fx.Node, part: Part, shape: tuple[int, ...]) -> Laid:
    if not isinstance(part, Laid):
        return Laid(ir.const(part or 0.0), np.zeros(shape, np.int64), None)
    return part if part.shape == shape else lo.move(node, [part], lambda c: c[0].expand(shape))[0]


Complex = tuple[Part, Part]


def _product(lo: Lowering, a: Complex, b: Complex) -> Complex:
    return _sub(lo, _mul(lo, a[0], b[0]), _mul(lo, a[1], b[1])), _add(lo, _mul(lo, a[0], b[1]), _mul(lo, a[1], b[0]))


def _quotient(lo: Lowering, a: Complex, b: Complex) -> Complex:
    if b[1] is None:
        return _div(lo, a[0], b[0]), _div(lo, a[1], b[0])
    size = _map(lo, "maximum", _map(lo, "abs", b[0]), _map(lo, "abs", b[1]))  # so that no square overflows
    c = _div(lo, b[0], size), _div(lo, b[1], size)
    square = _mul(lo, size, _add(lo, _mul(lo, c[0], c[0]), _mul(lo, c[1], c[1])))
    re, im = _product(lo, a, (c[0], _neg(lo, c[1])))
    return _div(lo, re, square), _div(lo, im, square)


# -- operations ------------------------------------------------------------------------------------------------------------


def _each(lo: Lowering, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """An operation that does to each part what it does to real numbers."""
    made = []
    for part in (0, 1):
        lo.part = part
        try:
            made.append(lo.plain(node))
        finally:
            lo.part = None
    if isinstance(made[0], list):
        return [Pair(re, im) for re, im in zip(*made, strict=True)]
    return Pair(*made)


def _copied(lo: Lowering, node: fx.Node, value: Any, shape: Any, dtype: Any) -> Pair:
    """What a write into a complex tensor leaves there."""
    return Pair(*(_spread(lo, node, p, tuple(shape)) for p in _parts(lo, value)))


COMPLEX.update(dict.fromkeys(VIEWS | SPLITS, _each) | {"_copied": _copied})
lowers("sum", "sum.dim_IntList", "mean", "mean.dim", "cumsum", "slice_scatter", "select_scatter", "as_strided_scatter", "index.Tensor",
       "select_backward", "slice_backward", "diagonal_backward")(_each)  # fmt: skip


@lowers("neg")
def _minus(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    re, im = _parts(lo, a)
    return _pair(lo, node, _neg(lo, re), _neg(lo, im))


@lowers("_conj", "_conj_physical", "conj_physical")
def _conj(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    re, im = _parts(lo, a)
    return _pair(lo, node, re, _neg(lo, im))


@lowers("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar")
def _sum(lo: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Pair:
    one, two = _parts(lo, a), _parts(lo, b)
    if "rsub" in str(node.target):
        one, two = two, one
    two = two if alpha == 1 else _product(lo, two, _parts(lo, alpha))
    combine = _add if "add" in str(node.target) else _sub
    return _pair(lo, node, combine(lo, one[0], two[0]), combine(lo, one[1], two[1]))


@lowers("mul.Tensor", "mul.Scalar")
def _times(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Pair:
    return _pair(lo, node, *_product(lo, _parts(lo, a), _parts(lo, b)))


@lowers("div.Tensor", "div.Scalar")
def _over(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Pair:
    return _pair(lo, node, *_quotient(lo, _parts(lo, a), _parts(lo, b)))


@lowers("reciprocal")
def _inverse(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    return _pair(lo, node, *_quotient(lo, (1.0, None), _parts(lo, a)))


@lowers("square")
def _square(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    return _pair(lo, node, *_product(lo, _parts(lo, a), _parts(lo, a)))


@lowers("pow.Tensor_Scalar")
def _pow(lo: Lowering, node: fx.Node, a: Any, exponent: Any) -> Pair:
    if exponent not in (1, 2, 3, 4):
        raise UnsupportedOpError(f"{node.meta.get('src') or 'the cell'}: a complex state to the power of {exponent}")
    base = made = _parts(lo, a)
    for _ in range(int(exponent) - 1):
        made = _product(lo, made, base)
    return _pair(lo, node, *made)


@lowers("exp")
def _exp(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    re, im = _parts(lo, a)
    return _pair(lo, node, *_polar_parts(lo, _map(lo, "exp", re), im))


def _polar_parts(lo: Lowering, size: Part, angle: Part) -> Complex:
    return _mul(lo, size, _map(lo, "cos", angle)), _mul(lo, size, _map(lo, "sin", angle))


@lowers("log")
def _log(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    re, im = _parts(lo, a)
    return _pair(lo, node, _map(lo, "log", _map(lo, "hypot", re, im)), _map(lo, "atan2", im, re))


@lowers("polar")
def _polar(lo: Lowering, node: fx.Node, size: Any, angle: Any) -> Pair:
    return _pair(lo, node, *_polar_parts(lo, lo.lower(size), lo.lower(angle)))


@lowers("abs")
def _abs(lo: Lowering, node: fx.Node, a: Any) -> Part:
    return _modulus(lo, *_parts(lo, a))


def _modulus(lo: Lowering, re: Part, im: Part) -> Part:
    """Without a derivative at zero, as autograd has it."""
    if im is None:
        return _map(lo, "abs", re)
    nothing = _both_zero(lo, re, im)
    return _map(lo, "where", nothing, 0.0, _map(lo, "hypot", _map(lo, "where", nothing, 1.0, re), im))


def _both_zero(lo: Lowering, re: Part, im: Part) -> Part:
    return _map(lo, "mul", _map(lo, "eq", re, 0.0), _map(lo, "eq", im, 0.0))


@lowers("angle")
def _angle(lo: Lowering, node: fx.Node, a: Any) -> Part:
    """Without a derivative at zero, as autograd has it; there it follows from signs, which trunc keeps."""
    re, im = (_zero(p) for p in _parts(lo, a))
    nothing = _both_zero(lo, re, im)
    there = _map(lo, "atan2", _map(lo, "trunc", im), _map(lo, "trunc", re))
    return _map(lo, "where", nothing, there, _map(lo, "atan2", im, _map(lo, "where", nothing, 1.0, re)))


@lowers("sgn")
def _sgn(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    re, im = _parts(lo, a)
    size = _modulus(lo, re, im)
    zero = _map(lo, "eq", size, 0.0)
    safe = _map(lo, "where", zero, 1.0, size)
    return _pair(lo, node, *(_map(lo, "where", zero, 0.0, _div(lo, part, safe)) for part in (re, im)))


@lowers("view_as_real", "view_as_real_copy")
def _as_real(lo: Lowering, node: fx.Node, a: Any) -> Laid:
    found = lo.lower(a)
    return lo.move(node, [found.re, found.im], lambda c: torch.stack(c, -1))[0]


@lowers("view_as_complex", "view_as_complex_copy")
def _as_complex(lo: Lowering, node: fx.Node, a: Any) -> Pair:
    source = lo.lower(a)
    return Pair(*lo.move(node, [source], lambda c: c[0].unbind(-1)))


@lowers("complex")
def _complex(lo: Lowering, node: fx.Node, re: Any, im: Any) -> Pair:
    return _pair(lo, node, lo.lower(re), lo.lower(im))


@lowers("real")
def _real(lo: Lowering, node: fx.Node, a: Any) -> Part:
    return _parts(lo, a)[0]


@lowers("imag")
def _imag(lo: Lowering, node: fx.Node, a: Any) -> Part:
    return lo.lower(a).im  # type: ignore[no-any-return]


@lowers("_to_copy")
def _cast(lo: Lowering, node: fx.Node, a: Any, **_: Any) -> Any:
    of, to = (n.meta["val"].dtype for n in (a, node))
    re, im = (lo.cast(p, of.to_real(), to.to_real()) if isinstance(p, Laid) else p for p in _parts(lo, a))
    return _pair(lo, node, re, im) if to.is_complex else re


@lowers("eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar")
def _same(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Part:
    one, two = _parts(lo, a), _parts(lo, b)
    name = "eq" if "eq" in str(node.target) else "ne"
    return _map(lo, "mul" if name == "eq" else "maximum", *(_map(lo, name, _zero(p), _zero(q)) for p, q in zip(one, two, strict=True)))


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(lo: Lowering, node: fx.Node, c: Any, a: Any, b: Any) -> Pair:
    condition = lo.lower(c)
    return _pair(lo, node, *(_map(lo, "where", condition, _zero(p), _zero(q)) for p, q in zip(_parts(lo, a), _parts(lo, b), strict=True)))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(lo: Lowering, node: fx.Node, t: Any, mask: Any, value: Any) -> Pair:
    return _where(lo, node, mask, value, t)  # type: ignore[no-any-return]


@lowers("cat", "stack")
def _cat(lo: Lowering, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> Pair:
    pairs = [_pair(lo, t, *_parts(lo, t)) for t in tensors]
    re, im = (lo.move(node, part, lambda c: node.target(c, dim))[0] for part in ([p.re for p in pairs], [p.im for p in pairs]))  # type: ignore[operator]
    return Pair(re, im)


@lowers("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty")
def _like(lo: Lowering, node: fx.Node, t: Any, *args: Any, **kwargs: Any) -> Any:
    re = STRUCTURAL[str(node.target)](lo, node, _parts(lo, t)[0], *args, **kwargs)
    return _pair(lo, node, re, None) if node.meta["val"].dtype.is_complex else re


# -- products --------------------------------------------------------------------------------------------------------------


def _contracted(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Pair:
    """[.., M, K] @ [.., K, N]; a real factor makes two products, a complex one four."""
    one, two = _parts(lo, a), _parts(lo, b)

    def product(p: Part, q: Part) -> Part:
        return lo.product(p, q) if isinstance(p, Laid) and isinstance(q, Laid) else None

    re = _sub(lo, product(one[0], two[0]), product(one[1], two[1]))
    im = _add(lo, product(one[0], two[1]), product(one[1], two[0]))
    return _pair(lo, node, re, im)


@lowers("mm", "bmm")
def _mm(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Pair:
    return _contracted(lo, node, a, b)


@lowers("mv")
def _mv(lo: Lowering, node: fx.Node, a: Any, b: Any) -> Pair:
    column = Pair(*(lo.move(node, [p], lambda c: c[0].unsqueeze(-1))[0] for p in _pair(lo, b, *_parts(lo, b))))
    return Pair(*(lo.move(node, [p], lambda c: c[0].squeeze(-1))[0] for p in _contracted(lo, node, a, column)))


@lowers("addmm", "baddbmm")
def _addmm(lo: Lowering, node: fx.Node, c: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    made = _contracted(lo, node, a, b)
    scaled = _product(lo, (made.re, made.im), _parts(lo, alpha))
    bias = _product(lo, _parts(lo, c), _parts(lo, beta))
    return _pair(lo, node, _add(lo, scaled[0], bias[0]), _add(lo, scaled[1], bias[1]))
