"""The loop that people write: the cell called once a step, as it stands. What rows are compared with and timed against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from seqparc.convention import Convention
from seqparc.tree import flatten


def loop(cell: Any, way: Convention, x: Any, state: Any, copies: bool = False) -> tuple[Any, Any]:
    """(outputs or states [batch, time, ...], last state) of a cell that is called this way; with copies of x if it writes into it."""
    steps = list(zip(*(leaf.unbind(1) for leaf in flatten(x)[0]), strict=True))  # slices would each have a gradient as long as x
    if copies:
        steps = [tuple(leaf.clone() for leaf in x_t) for x_t in steps]
    start = [leaf.clone() for leaf in flatten(state)[0]]  # the cell may write into it
    if way.held:
        rows, last = _held(cell, way, steps, start)
    else:
        rows, last = _passed(cell, way, steps, start)
    columns = zip(*(flatten(row)[0] for row in rows), strict=True)
    return [torch.stack(column, 1) for column in columns], last


def _held(cell: Any, way: Convention, steps: Sequence[Any], start: Sequence[Any]) -> tuple[list[Any], Any]:
    """Of a cell that keeps its state on itself."""
    homes = [(attrgetter(home)(cell) if home else cell, last) for home, _, last in (name.rpartition(".") for name in way.held)]
    before = [getattr(*home) for home in homes]
    for home, value in zip(homes, way.state.unflatten(start).values(), strict=True):
        setattr(*home, value)
    places = _places(way)
    rows = [cell(*(place(x_t, ()) for place in places)) for x_t in steps]
    last = {name: getattr(*home) for name, home in zip(way.held, homes, strict=True)}
    for home, value in zip(homes, before, strict=True):
        setattr(*home, value)
    return rows, last


def _passed(cell: Any, way: Convention, steps: Sequence[Any], start: Sequence[Any]) -> tuple[list[Any], Any]:
    """Of a cell that is given its state."""
    words = way.returns.split(", ")
    state: Any = tuple(start) if way.separate else way.state.unflatten(start)
    places, rows = _places(way), []
    for x_t in steps:
        result = cell(*(place(x_t, state) for place in places))
        if words == ["state"]:
            out = state = result
        elif "state" in words:
            state, out = result[words.index("state")], [part for part, word in zip(result, words, strict=True) if word != "state"]
        else:
            state = tuple(result[words.index(f"state.{i}")] for i in range(way.state.count))
            out = [part for part, word in zip(result, words, strict=True) if word.startswith("out")]
        rows.append(out)
    return rows, state if way.separate else way.state.unflatten(way.state.conform(state) or [])


def _places(way: Convention) -> list[Callable[[Any, Any], Any]]:
    """How to make each argument of a step from the leaves of x and the state."""
    assert not any(way.keywords), way.keywords
    makers: dict[str, Callable[[int], Callable[[Any, Any], Any]]] = {
        "x.": lambda i: lambda x_t, state: x_t[i],
        "state.": lambda i: lambda x_t, state: state[i],
        "x": lambda _: (lambda x_t, state: x_t[0]) if way.inputs.kind == "leaf" else lambda x_t, state: way.inputs.unflatten(x_t),
        "state": lambda _: lambda x_t, state: state,
    }
    return [makers[role + dot](int(leaf or 0)) for role, dot, leaf in (word.partition(".") for word in way.order)]
