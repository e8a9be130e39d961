"""Between the IR and SymPy: the only place where either becomes the other.

SymPy derives what the operation table does not spell out, and writes Jacobian entries for people to read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import sympy

from seqparc import ir
from seqparc.ir import Value
from seqparc.ops import OPS
from seqparc.passes.partial import KEPT

_A, _B, _C, _Y, _G = sympy.symbols("a b c y g", real=True)
_ARGUMENTS = (_A, _B, _C)
#: Operations SymPy has no function for (or would rewrite): kept as applied undefined functions.
_OPAQUE = {
    name: sympy.Function(name)
    for name in ("where", "lt", "le", "gt", "ge", "eq", "ne", "round", "trunc", "fmod", "atan2", "relu", "pow", "maximum", "minimum",
                 "held", "to_float32", "to_float16", "to_bfloat16")
}
_LOCALS: dict[str, Any] = {"a": _A, "b": _B, "c": _C, "y": _Y, "g": _G, **_OPAQUE}
_FUNCTIONS = {
    sympy.tanh: "tanh", sympy.exp: "exp", sympy.log: "log", sympy.sin: "sin", sympy.cos: "cos", sympy.tan: "tan",
    sympy.asin: "asin", sympy.acos: "acos", sympy.atan: "atan", sympy.sinh: "sinh", sympy.cosh: "cosh", sympy.asinh: "asinh",
    sympy.acosh: "acosh", sympy.atanh: "atanh", sympy.erf: "erf", sympy.Abs: "abs", sympy.sign: "sign", sympy.floor: "floor",
    sympy.ceiling: "ceil",
}  # fmt: skip


@functools.cache
def form(op: str) -> sympy.Expr:
    """An operation in SymPy's language, over a, b, c."""
    return sympy.sympify(OPS[op].form, locals=_LOCALS)


@functools.cache
def partials(op: str) -> tuple[sympy.Expr | None, ...]:
    """For each operand, the tangent g carried through the operation; None: no derivative.

    Taken from the table where it is spelled out, derived from the form otherwise, with the result itself (y) put back in
    place of the form wherever it reappears.
    """
    row = OPS[op]
    result: list[sympy.Expr | None] = []
    for i in range(row.arity):
        if row.partials is not None:
            expr = sympy.sympify(row.partials[i], locals=_LOCALS)
        else:
            expr = sympy.diff(form(op), _ARGUMENTS[i]).subs(form(op), _Y)
        if expr == 0:
            result.append(None)
        else:
            result.append(expr if expr.has(_G) else _G * expr)
    return tuple(result)


Template = Any  # a name among a, b, c, y, g; a number; or [operation, templates…]


def templates() -> str:
    """Of every operation, for each operand: the tangent g carried through it, in operations of the table. JSON, a line per operation."""
    found = {name: [None if e is None else template(e) for e in partials(name)] for name in OPS}
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()) + "\n}\n"


def template(expr: sympy.Expr) -> Template:
    """A SymPy expression over a, b, c, y, g in operations of the table."""
    if expr.is_Symbol:
        return expr.name
    if expr.is_number:
        return float(expr)
    if expr.is_Add:
        positive = [t for t in expr.args if not t.could_extract_minus_sign()]
        negative = [-t for t in expr.args if t.could_extract_minus_sign()]
        if not positive:
            return ["neg", template(sympy.Add(*negative))]
        value = functools.reduce(lambda p, q: ["add", p, q], map(template, positive))
        return functools.reduce(lambda p, q: ["sub", p, q], map(template, negative), value)
    if expr.is_Mul:
        if expr.could_extract_minus_sign():
            return ["neg", template(-expr)]
        over, under = expr.as_numer_denom()
        if under != 1 and not under.is_number:
            return ["div", template(over), template(under)]
        # g first, so that a product of the cotangent with everything else reads left to right
        factors = sorted(expr.args, key=lambda t: (t != _G, str(t)))
        return functools.reduce(lambda p, q: ["mul", p, q], map(template, factors))
    if expr.is_Pow:
        base, exponent = expr.args
        if exponent == 2:
            return ["square", template(base)]
        if exponent.is_Integer and 2 < exponent <= 8:
            return ["mul", template(base ** (exponent - 1)), template(base)]
        if exponent == -1:
            return ["reciprocal", template(base)]
        if exponent.is_negative and exponent.is_number and exponent != sympy.Rational(-1, 2):
            return ["reciprocal", template(base**-exponent)]
        if exponent in (sympy.Rational(1, 2), sympy.Rational(-1, 2)):
            return ["sqrt" if exponent > 0 else "rsqrt", template(base)]
        return ["pow", template(base), template(exponent)]
    name = _FUNCTIONS.get(expr.func) or getattr(expr.func, "__name__", "")
    if name not in OPS:
        raise ValueError(f"no operation for the SymPy function {expr.func}")
    return [name, *map(template, expr.args)]


#: Spelled with SymPy's own functions for reading; everything else as an applied function of the operation's name.
_READABLE = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "square": lambda a: a**2, "reciprocal": lambda a: 1 / a, "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a), "pow": lambda a, b: a**b, **{name: f for f, name in _FUNCTIONS.items()},
}  # fmt: skip


def to_sympy(value: Value, name: Mapping[Value, str], limit: int = 400) -> sympy.Expr:
    """A scalar value as an expression over named leaves, for reading; values in `name` become symbols."""
    done: dict[Value, sympy.Expr] = {}
    order = _down_to(value, name)
    if len(order) > limit:
        return sympy.Symbol(f"(expression of {len(order)} terms)")
    for v in order:
        if v in name:
            done[v] = sympy.Symbol(name[v], real=True)
            continue
        match v:
            case ir.Const(value=number):
                done[v] = sympy.nsimplify(number, rational=True) if abs(number) < 1e6 and number == number else sympy.Float(number)
            case ir.Map(op=op, operands=operands):
                function = _READABLE.get(op) or sympy.Function("σ" if op == "sigmoid" else op)
                done[v] = function(*(done[a] for a in operands))
            case _:
                done[v] = sympy.Symbol(f"{type(v).__name__.lower()}{len(done)}", real=True)
    return done[value]


def _down_to(value: Value, name: Mapping[Value, str]) -> list[Value]:
    """The values that a value is made of, arguments first, and none below those that have a name."""
    order: dict[Value, None] = {}
    stack = [(value, False)]
    while stack:
        v, expanded = stack.pop()
        if expanded or v in name:
            order.setdefault(v)
        elif v not in order:
            stack.append((v, True))
            stack.extend((a, False) for a in v.args)
    return list(order)


if __name__ == "__main__":
    KEPT.write_text(templates(), "utf-8")
