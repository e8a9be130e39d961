"""Partial derivatives of the table's operations, as SymPy gave them, applied to values.

What SymPy derives depends on the operation table alone, so it is derived once and kept: a process that finds it does not import SymPy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqparc import ir, ops, store
from seqparc.ir import Value


@functools.cache
def _templates() -> dict[str, list[Any]]:
    def derive() -> dict[str, list[Any]]:
        from seqparc.passes import symbolic

        return symbolic.templates()

    sources = (Path(ops.__file__), Path(__file__).with_name("symbolic.py"))
    return store.remembered("partials", "".join(p.read_text("utf-8") for p in sources), derive)  # type: ignore[no-any-return]


def carry(op: str, operand: int, args: tuple[Value, ...], y: Value, g: Value) -> Value | None:
    """The value g · ∂op/∂operand, linear in g, where y = op(args); None if the derivative is zero everywhere."""
    template = _templates()[op][operand]
    return None if template is None else _fill(template, {**dict(zip("abc", args, strict=False)), "y": y, "g": g}, g.size)


def _fill(template: Any, env: Mapping[str, Value], size: int) -> Value:
    match template:
        case str(name):
            return env[name]
        case [op, *parts]:
            return ir.map_(op, *(_fill(p, env, size) for p in parts))
        case number:
            return ir.const(number, size)
