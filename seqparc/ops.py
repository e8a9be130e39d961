"""The table of elementwise operations: one row per operation, one fact per column. Adding an operation is one row.

Every value is real; a predicate is 1.0 or 0.0, as in C. Columns:

    arity      operands, called a, b, c below
    form       the operation in SymPy's language; where it differentiates as it stands, no `partials` are needed
    partials   derivatives by each operand in the same language, written structure-preserving: y is the result itself
               (tanh' = 1 - y**2), other operations of this table may be used, and a string that mentions g (the incoming
               cotangent or tangent, in which it must be linear) is the whole product. They are autograd's conventions
               at kinks. "0" means the operand has no derivative.
    c          the C spelling over SIMD vectors (see codegen/simd.h)
    torch      the PyTorch function
    aten       the ATen overloads whose operands map one to one
    domain     interval per operand for tests
    cost       in units of one addition; 8 and more is worth storing rather than computing twice
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Interval = tuple[float, float]
_ANY: Interval = (-4.0, 4.0)
_POSITIVE: Interval = (0.1, 4.0)


@dataclass(frozen=True)
class Op:
    name: str
    arity: int
    form: str
    c: str
    torch: Callable[..., torch.Tensor]
    aten: tuple[str, ...] = ()
    partials: tuple[str, ...] | None = None
    domain: tuple[Interval, ...] = ()
    cost: int = 1

    @property
    def gpu(self) -> str:
        """The Triton spelling: as in C where C needs no function, else the function of the row's name in codegen/gpumath.py."""
        operands = ", ".join(f"{{{i}}}" for i in range(self.arity))
        return f"m.{self.name}({operands})" if "sp_" in self.c else self.c

    @property
    def domains(self) -> tuple[Interval, ...]:
        return self.domain or (_ANY,) * self.arity


def _truth(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def predicate(a: torch.Tensor, b: Any) -> torch.Tensor:
        return function(a, b).to(a.dtype)

    return predicate


def _rounded(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """To the nearest number of a dtype; by way of float32, as torch does it."""
    return lambda a: a.to(torch.float32).to(dtype).to(a.dtype)


def _where(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(c != 0, a, b)


def _binary(name: str) -> tuple[str, ...]:
    return (f"{name}.Tensor", f"{name}.Scalar")


_NONE1, _NONE2 = ("0",), ("0", "0")

_ROWS = (
    Op("add", 2, "a + b", "({0} + {1})", torch.add),
    Op("sub", 2, "a - b", "({0} - {1})", torch.sub),
    Op("mul", 2, "a * b", "({0} * {1})", torch.mul, _binary("mul")),
    Op("div", 2, "a / b", "({0} / {1})", torch.div, _binary("div"), ("g/b", "-g*y/b"), (_ANY, _POSITIVE), 4),
    Op("neg", 1, "-a", "(-{0})", torch.neg, ("neg", "_neg_view")),
    Op("reciprocal", 1, "1/a", "(sp_set1(1) / {0})", torch.reciprocal, ("reciprocal",), ("-y**2",), (_POSITIVE,), 4),
    Op("square", 1, "a**2", "({0} * {0})", torch.square, ("square",), ("2*a",)),
    Op("tanh", 1, "tanh(a)", "sp_tanh({0})", torch.tanh, ("tanh",), ("1 - y**2",), (), 20),
    Op("sigmoid", 1, "1/(1 + exp(-a))", "sp_sigmoid({0})", torch.sigmoid, ("sigmoid",), ("y*(1 - y)",), (), 16),
    Op("exp", 1, "exp(a)", "sp_exp({0})", torch.exp, ("exp",), ("y",), (), 12),
    Op("expm1", 1, "exp(a) - 1", "sp_expm1({0})", torch.expm1, ("expm1",), ("y + 1",), (), 60),
    Op("log", 1, "log(a)", "sp_log({0})", torch.log, ("log",), ("g/a",), (_POSITIVE,), 16),
    Op("log1p", 1, "log(1 + a)", "sp_log1p({0})", torch.log1p, ("log1p",), ("g/(1 + a)",), (_POSITIVE,), 60),
    Op("sqrt", 1, "sqrt(a)", "sp_sqrt({0})", torch.sqrt, ("sqrt",), ("g/(2*y)",), (_POSITIVE,), 8),
    Op("rsqrt", 1, "1/sqrt(a)", "sp_rsqrt({0})", torch.rsqrt, ("rsqrt",), ("-y**3/2",), (_POSITIVE,), 12),
    Op("sin", 1, "sin(a)", "sp_sin({0})", torch.sin, ("sin",), None, (), 60),
    Op("cos", 1, "cos(a)", "sp_cos({0})", torch.cos, ("cos",), None, (), 60),
    Op("tan", 1, "tan(a)", "sp_tan({0})", torch.tan, ("tan",), ("1 + y**2",), ((-1.0, 1.0),), 60),
    Op("asin", 1, "asin(a)", "sp_asin({0})", torch.asin, ("asin",), None, ((-0.9, 0.9),), 60),
    Op("acos", 1, "acos(a)", "sp_acos({0})", torch.acos, ("acos",), None, ((-0.9, 0.9),), 60),
    Op("atan", 1, "atan(a)", "sp_atan({0})", torch.atan, ("atan",), None, (), 60),
    Op("sinh", 1, "sinh(a)", "sp_sinh({0})", torch.sinh, ("sinh",), None, (), 60),
    Op("cosh", 1, "cosh(a)", "sp_cosh({0})", torch.cosh, ("cosh",), None, (), 60),
    Op("asinh", 1, "asinh(a)", "sp_asinh({0})", torch.asinh, ("asinh",), None, (), 60),
    Op("acosh", 1, "acosh(a)", "sp_acosh({0})", torch.acosh, ("acosh",), None, ((1.1, 4.0),), 60),
    Op("atanh", 1, "atanh(a)", "sp_atanh({0})", torch.atanh, ("atanh",), None, ((-0.9, 0.9),), 60),
    Op("erf", 1, "erf(a)", "sp_erf({0})", torch.erf, ("erf",), None, (), 60),
    Op("pow", 2, "a**b", "sp_pow({0}, {1})", torch.pow, ("pow.Tensor_Tensor", "pow.Scalar"),
       ("g*where(eq(b, 0), 0, b*pow(a, b - 1))", "g*where(eq(a, 0)*ge(b, 0), 0, y*log(a))"), (_POSITIVE, _ANY), 80),
    Op("atan2", 2, "atan2(a, b)", "sp_atan2({0}, {1})", torch.atan2, ("atan2",),
       ("where(eq(a**2 + b**2, 0), 0, g*b/(a**2 + b**2))", "where(eq(a**2 + b**2, 0), 0, -g*a/(a**2 + b**2))"),
       (_POSITIVE, _POSITIVE), 80),
    Op("hypot", 2, "sqrt(a**2 + b**2)", "sp_hypot({0}, {1})", torch.hypot, ("hypot",),
       ("g*(a/y)", "g*(b/y)"), (), 20),
    Op("fmod", 2, "fmod(a, b)", "sp_fmod({0}, {1})", torch.fmod, _binary("fmod"), ("1", "-trunc(a/b)"), (_ANY, _POSITIVE), 40),
    Op("remainder", 2, "Mod(a, b)", "sp_remainder({0}, {1})", torch.remainder, _binary("remainder"),
       ("1", "-round((a - y)/b)"), (_ANY, _POSITIVE), 40),  # the floor of a quotient that is not rounded
    Op("abs", 1, "Abs(a)", "sp_abs({0})", torch.abs, ("abs",), ("sign(a)",)),
    Op("relu", 1, "Max(a, 0)", "sp_max({0}, sp_set1(0))", torch.relu, ("relu",), ("where(le(a, 0), 0, g)",)),
    Op("maximum", 2, "Max(a, b)", "sp_max({0}, {1})", torch.maximum, ("maximum",),
       ("where(lt(a, b), 0, where(eq(a, b), g/2, g))", "where(lt(b, a), 0, where(eq(a, b), g/2, g))")),
    Op("minimum", 2, "Min(a, b)", "sp_min({0}, {1})", torch.minimum, ("minimum",),
       ("where(gt(a, b), 0, where(eq(a, b), g/2, g))", "where(gt(b, a), 0, where(eq(a, b), g/2, g))")),
    Op("sign", 1, "sign(a)", "sp_sign({0})", torch.sign, ("sign", "sgn"), _NONE1),
    Op("floor", 1, "floor(a)", "sp_floor({0})", torch.floor, ("floor",), _NONE1),
    Op("ceil", 1, "ceiling(a)", "sp_ceil({0})", torch.ceil, ("ceil",), _NONE1),
    Op("round", 1, "round(a)", "sp_round({0})", torch.round, ("round",), _NONE1),
    Op("trunc", 1, "trunc(a)", "sp_trunc({0})", torch.trunc, ("trunc",), _NONE1),
    Op("held", 1, "held(a)", "({0})", torch.Tensor.detach, (), _NONE1),  # without a derivative
    Op("to_float32", 1, "to_float32(a)", "sp_to_float32({0})", _rounded(torch.float32), (), ("1",)),
    Op("to_float16", 1, "to_float16(a)", "sp_to_float16({0})", _rounded(torch.float16), (), ("1",), (), 8),
    Op("to_bfloat16", 1, "to_bfloat16(a)", "sp_to_bfloat16({0})", _rounded(torch.bfloat16), (), ("1",), (), 8),
    Op("lt", 2, "lt(a, b)", "sp_lt({0}, {1})", _truth(torch.lt), _binary("lt"), _NONE2),
    Op("le", 2, "le(a, b)", "sp_le({0}, {1})", _truth(torch.le), _binary("le"), _NONE2),
    Op("gt", 2, "gt(a, b)", "sp_gt({0}, {1})", _truth(torch.gt), _binary("gt"), _NONE2),
    Op("ge", 2, "ge(a, b)", "sp_ge({0}, {1})", _truth(torch.ge), _binary("ge"), _NONE2),
    Op("eq", 2, "eq(a, b)", "sp_eq({0}, {1})", _truth(torch.eq), _binary("eq"), _NONE2),
    Op("ne", 2, "ne(a, b)", "sp_ne({0}, {1})", _truth(torch.ne), _binary("ne"), _NONE2),
    Op("where", 3, "where(a, b, c)", "sp_where({0}, {1}, {2})", _where, (), ("0", "where(a, g, 0)", "where(a, 0, g)")),
)

#: name -> row
OPS: dict[str, Op] = {row.name: row for row in _ROWS}

#: ATen overload -> row, for the operations whose operands map one to one
ATEN: dict[str, Op] = {f"aten.{name}" if "." in name else f"aten.{name}.default": row for row in _ROWS for name in row.aten}

#: ATen operations that only say where elements go. They are applied to index tensors, whatever their arguments are.
VIEWS = frozenset(
    f"aten.{name}"
    for name in """
    alias.default as_strided.default broadcast_to.default clone.default detach.default diagonal.default expand.default
    flip.default lift_fresh.default narrow.default permute.default repeat.default reshape.default roll.default
    select.int slice.Tensor squeeze.default squeeze.dim squeeze.dims t.default transpose.int tril.default triu.default
    unfold.default unsqueeze.default view.default _unsafe_view.default _reshape_alias.default index_select.default
    constant_pad_nd.default diag_embed.default contiguous.default numpy_T.default movedim.int
    """.split()
)

#: Views with several results.
SPLITS = frozenset(
    f"aten.{name}"
    for name in """
    split.Tensor split_with_sizes.default unsafe_split.Tensor unsafe_split_with_sizes.default chunk.default unbind.int
    unsafe_chunk.default
    """.split()
)
