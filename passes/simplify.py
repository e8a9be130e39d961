"""Constant folding for derivatives. (Common subexpressions never exist twice: values are interned.)

Only for derivative programs: 0 · x is taken for 0, which is what a structural zero of a Jacobian means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from seqparc import ir
from seqparc.ir import Const, Map, Value
from seqparc.ops import OPS


def _is(value: Value, number: float) -> bool:
    return isinstance(value, Const) and value.value == number


def fold(value: Value, args: tuple[Value, ...]) -> Value:
    """One rewriting step: the simplified operation on simplified arguments."""
    if not isinstance(value, Map):
        return ir.rebuild(value, args) if args else value
    size = value.size
    if all(isinstance(a, Const) for a in args):
        numbers: list[Any] = [torch.tensor(a.value, dtype=torch.float64) for a in args if isinstance(a, Const)]
        return ir.const(float(OPS[value.op].torch(*numbers)), size)
    match value.op:
        case "mul" if _is(args[0], 0) or _is(args[1], 0):
            return ir.const(0.0, size)
        case "mul" if _is(args[0], 1):
            return args[1]
        case "mul" | "div" if _is(args[1], 1):
            return args[0]
        case "div" | "neg" if _is(args[0], 0):
            return ir.const(0.0, size)
        case "add" if _is(args[0], 0):
            return args[1]
        case "add" | "sub" if _is(args[1], 0):
            return args[0]
        case "sub" if _is(args[0], 0):
            return ir.map_("neg", args[1])
        case "where" if args[1] is args[2]:
            return args[1]
        case _:
            return ir.rebuild(value, args)


def simplify(values: Iterable[Value]) -> list[Value]:
    """Values with constants folded."""
    roots = list(values)
    done = ir.rewrite(roots, fold)
    return [done[v] for v in roots]
