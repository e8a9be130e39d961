"""Calls of compiled modules: what is known of one, and what is checked."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from seqparc import signature as sig
from seqparc.errors import ShapeError, StateError
from seqparc.held import Watch
from seqparc.runtime.derived import Paired, as_real

#: All that are there, by the number that a call which is being traced gives for them.
MODULES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def numbered(module: nn.Module) -> int:
    """A number for a module that is called while something is traced."""
    MODULES[number := next(_NUMBERS)] = module
    return number


class Call(NamedTuple):
    """A call, understood: leaves of x, how the cell is called, leaves of the state to start from, and what an engine depends on."""

    leaves: list[Tensor]
    convention: sig.Convention
    start: list[Tensor]
    about: tuple[Any, ...]


class Known(NamedTuple):
    """What calls alike have in common; the start state only if it is the same in all of them."""

    convention: sig.Convention
    start: list[Tensor] | None
    about: tuple[Any, ...]
    watch: Watch | None  # on what the cell holds, if that is what it starts from


def settled(cell: Any, convention: sig.Convention, x: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """A state of the dtypes that a loop under autocast goes on with, whatever it starts from. Raises StateError if there are none."""
    for _ in range(len(start) + 1):
        with torch.no_grad():
            after = convention.call(cell, [v.clone() for v in x], [s.clone() for s in start])[1]
        if [a.dtype for a in after] == [s.dtype for s in start]:
            return start
        start = [s.to(a.dtype) for s, a in zip(start, after, strict=True)]
    raise StateError(f"under autocast the state of {sig.called(cell)} keeps changing its dtypes; convert it in the cell, with .to(dtype)")


def about_call(convention: sig.Convention, leaves: Sequence[Tensor], start: Sequence[Tensor], home: str) -> tuple[Any, ...]:
    """What an engine depends on, the type of device first: of tensors, all but the values and the batch and time axes."""
    shapes = [*[(v.shape[2:], v.dtype) for v in leaves], *[(s.shape[1:], s.dtype) for s in start]]
    return home, convention, len(leaves), *shapes


def paired(call: Call, cell: Any) -> tuple[Call, Any]:
    """The same call of a step with real states, if the cell's are not."""
    if not any(s.is_complex() for s in call.start):
        return call, cell
    step, start = Paired(cell, call.convention, len(call.leaves), call.start), as_real(call.start)
    return Call(call.leaves, step.signature, start, about_call(step.signature, call.leaves, start, call.about[0])), step


class Admit(Protocol):
    """Raises an error where an engine, or a plain loop for some reason, must not be."""

    def __call__(self, rnn: Any, engine: Any) -> None: ...


def check_x(rnn: nn.Module, leaves: Sequence[Tensor]) -> None:
    """Raises ShapeError for an x that no cell can be run over, and for parameters that it cannot be run with."""
    if not leaves:
        raise ShapeError("x holds no tensor; give [batch, time, ...]")
    lead = leaves[0].shape[:2]
    for i, leaf in enumerate(leaves):
        if leaf.dim() < 2:
            raise ShapeError(f"x's leaf {i} has shape {list(leaf.shape)}; the first two axes must be batch and time")
        if leaf.shape[:2] != lead:
            raise ShapeError(f"x's leaves disagree about batch and time: {list(lead)} and {list(leaf.shape[:2])} (leaf {i})")
    if lead[1] == 0:
        raise ShapeError(f"x has shape {list(leaves[0].shape)}: an empty sequence has no states")
    if any(map(nn.parameter.is_lazy, rnn.parameters())):
        raise ShapeError(f"{rnn.name} has parameters that are not initialised yet; call the cell itself once, on one step")
    parameter = next(rnn.parameters(), None)
    for i, leaf in enumerate(leaves):
        if parameter is not None and leaf.device != parameter.device:
            raise ShapeError(f"x's leaf {i} is on {leaf.device}, the cell's parameters on {parameter.device}; move one to the other")


def check_state(start: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raises StateError or ShapeError for a state that does not belong to an x."""
    for i, leaf in enumerate(start):
        if leaf.dim() < 1 or leaf.shape[0] != leaves[0].shape[0]:
            batch = leaves[0].shape[0]
            raise StateError(f"the state's leaf {i} has shape {list(leaf.shape)}, x has batch {batch}; a state is [batch, ...]")
        if leaf.device != leaves[0].device:
            raise ShapeError(f"the state's leaf {i} is on {leaf.device}, x on {leaves[0].device}")


def mixed(rnn: nn.Module, leaves: Sequence[Tensor]) -> str | None:
    """What may be wrong with a call that the cell does not take: x of another dtype than the parameters."""
    dtypes = {p.dtype for p in rnn.parameters() if p.dtype.is_floating_point}
    wrong = next((v.dtype for v in leaves if v.dtype.is_floating_point and v.dtype not in dtypes), None)
    if wrong is None or not dtypes:
        return None
    return f"x is {wrong}, the cell's parameters are {' and '.join(sorted(map(str, dtypes)))}; convert one with .to(dtype)"
