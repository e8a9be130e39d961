"""Partial derivatives of the table's operations, as SymPy gave them, applied to values.

What SymPy derives depends on the operation table alone, so it is derived once and kept beside this file: nothing that compiles imports
SymPy, which takes longer than a C compiler. `python -m seqparc.passes.symbolic` writes it anew; a test compares.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqparc import ir
from seqparc.ir import Value

#: Where the derivatives are kept.
KEPT = Path(__file__).with_name("partials.json")


@functools.cache
def templates() -> dict[str, list[Any]]:
    """Of every operation, for each operand: the tangent g carried through it (see `seqparc.passes.symbolic.Template`)."""
    return json.loads(KEPT.read_text("utf-8"))  # type: ignore[no-any-return]


def carry(op: str, operand: int, args: tuple[Value, ...], y: Value, g: Value) -> Value | None:
    """The value g · ∂op/∂operand, linear in g, where y = op(args); None if the derivative is zero everywhere."""
    template = templates()[op][operand]
    return None if template is None else _fill(template, {**dict(zip("abc", args, strict=False)), "y": y, "g": g}, g.size)


def _fill(template: Any, env: Mapping[str, Value], size: int) -> Value:
    match template:
        case str(name):
            return env[name]
        case [op, *parts]:
            return ir.map_(op, *(_fill(p, env, size) for p in parts))
        case number:
            return ir.const(number, size)
