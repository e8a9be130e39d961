"""State that a cell keeps on itself: which attributes it is, and calls that put it there and take it out.

A cell that writes `self.h = ...` is a function of that attribute like any other: its state goes in and comes out as a dict
{name of the attribute: tensor}, names of inner modules before it ("neuron.mem").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqparc.errors import ShapeError
from seqparc.locks import LOOKING
from seqparc.tree import flatten

_INTERNAL = frozenset(vars(nn.Module()))


def owners(cell: Any) -> dict[str, Any]:
    """The objects a cell may keep something on, by the prefix of their attributes."""
    owner = cell if isinstance(cell, nn.Module) else getattr(cell, "__self__", cell)
    if isinstance(owner, nn.Module):
        return {name + "." if name else "": m for name, m in owner.named_modules()}
    return {"": owner} if hasattr(owner, "__dict__") else {}


def attributes(cell: Any) -> dict[str, Any]:
    """What a cell holds now, parameters aside: plain attributes, buffers, and what a module's own dicts show as attributes."""
    return _attributes(owners(cell))


def _attributes(owned: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, owner in owned.items():
        places: list[Mapping[str, Any]] = [vars(owner)]
        if isinstance(owner, nn.Module):
            inner = [v for k, v in vars(owner).items() if isinstance(v, dict) and k.startswith("_") and k not in _INTERNAL]
            places += [owner._buffers, *inner]
        for place in places:
            for name, value in place.items():
                shown = isinstance(name, str) and not name.startswith("_") and name not in _INTERNAL
                if shown and getattr(owner, name, None) is value:
                    found[prefix + name] = value
    return found


def call(cell: Any, args: Sequence[Any], keywords: Mapping[str, Any], state: Mapping[str, Any], leave: bool = False) -> Any:
    """(what the cell returns, {name: what it holds then}) when it holds this state before; it is put back unless it is to be left so."""
    with LOOKING():  # the cell holds one state at a time
        owned = owners(cell)
        before = {} if leave else _attributes(owned)
        try:
            for name, value in state.items():
                setattr(*_place(owned, name), value)
            result = cell(*args, **keywords)
            return result, {name: getattr(*_place(owned, name), None) for name in state}
        finally:
            for name, value in before.items():
                if getattr(*_place(owned, name), None) is not value:
                    setattr(*_place(owned, name), value)


def _place(owned: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """The object that an attribute is on, and its name there."""
    prefix, _, last = name.rpartition(".")
    return owned[prefix + "." if prefix else ""], last


@contextmanager
def untouched(cell: Any, leaves: Sequence[Any], grad: bool = False) -> Iterator[None]:
    """A trial that leaves no trace: buffers, attributes and random states are put back; no graph unless asked for."""
    places = [vars(o) for o in owners(cell).values()]
    places += [v for place in places for v in place.values() if isinstance(v, dict) and v is not place.get("_modules")]
    kept = [(place, dict(place)) for place in places]
    lists = [(v, list(v)) for _, place in kept for v in place.values() if isinstance(v, list)]
    values = [(t, t.detach().clone()) for _, place in kept for t in place.values() if type(t) is Tensor]
    devices = {t.device.index for t in leaves if isinstance(t, Tensor) and t.device.type == "cuda"}
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.set_grad_enabled(grad):
            yield
    finally:
        random.setstate(python)
        for live, was in kept:
            if [*map(id, (*live, *live.values()))] != [*map(id, (*was, *was.values()))]:  # else other threads may be reading it
                live.clear()
                live.update(was)
        for items, held in lists:
            items[:] = held
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class _Token:
    """What tells whether a value was replaced or written to."""

    def __init__(self, value: Any) -> None:
        try:
            self.parts: list[Any] = flatten(value)[0]  # kept, so that none of them can make room for another
        except ShapeError:
            self.parts = [value]
        self.marks = [_mark(p) for p in self.parts]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Token) and self.marks == other.marks

    __hash__ = None  # type: ignore[assignment]


def _mark(part: Any) -> Any:
    if isinstance(part, Tensor):
        return id(part), 0 if part.is_inference() else part._version
    return part if isinstance(part, (bool, int, float, str, type(None))) else id(part)


class Watch:
    """Notes what a cell changes on itself from here on."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell
        self.before = {name: _Token(value) for name, value in attributes(cell).items()}

    def changed(self) -> dict[str, Any]:
        """{name: value now} of everything that was replaced or written to."""
        return {n: v for n, v in attributes(self.cell).items() if self.before.get(n) != _Token(v)}

    def replaced(self) -> dict[str, Any]:
        """The same without tensors that are still the same tensor: writes into those are seen by the recorder, with their line."""
        return {n: v for n, v in self.changed().items() if n not in self.before or all(v is not p for p in self.before[n].parts)}


class Used(TorchDispatchMode):
    """Notes which tensors operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in the recorder: dynamo is not to be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        todo = [*args, *(kwargs or {}).values()]
        while todo:
            value = todo.pop()
            if isinstance(value, (list, tuple)):
                todo += value
            elif isinstance(value, Tensor):
                self.seen.append(value)
        return func(*args, **(kwargs or {}))

    def reads(self, value: Any) -> bool:
        """Whether any tensor of a tree was read."""
        return any(t is s for t in flatten(value)[0] for s in self.seen)
