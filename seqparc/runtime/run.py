"""One run of a plan over whole sequences: prelude, recurrence, readout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqparc.draws import drawn
from seqparc.errors import InexactError
from seqparc.exact import below, reaches
from seqparc.plan import Plan, StateShape
from seqparc.runtime.differentiable import Solve, parts, unit
from seqparc.runtime.engine import Engine
from seqparc.runtime.lifted import Lifted
from seqparc.runtime.operator import number, solve
from seqparc.runtime.pages import room
from seqparc.surroundings import autocast, plain, recast, transformed

HALVES = (torch.bfloat16, torch.float16)


class Run(NamedTuple):
    """Leaves: the states after each step [batch, time, ...], the outputs [batch, time, ...], the last state [batch, ...].

    end: the last state as the core has it, flat and in the dtype of the arithmetic.
    """

    states: list[Tensor]
    outputs: list[Tensor]
    last: list[Tensor]
    end: Sequence[Tensor]


def run(engine: Engine, x: list[Tensor], start: list[Tensor]) -> Run:
    """Run a plan on x leaves [batch, time, ...] from start leaves [batch, ...]; differentiable.

    Raises InexactError where integers are met, or made, that are larger than the plan's arithmetic holds exactly.
    """
    device = x[0].device.type
    if autocast(device) is not None:
        with recast(device, None):  # a plan holds the casts that the cell was seen to make, and wants no others
            return run(engine, x, start)
    plan = engine.plan
    batch, steps = x[0].shape[:2]
    if plan.draws and len(x) == plan.inputs:
        x = [*x, *drawn(plan.draws, batch, steps, x[0].device)]
    values = Values(x, lambda name: plan.attributes[name]())
    if plan.stages:
        states, last, ends = staged(engine, x, start, values)
        return Run(states, read(plan, values, states, start), last, ends)
    weights = values.of(plan.weights)
    streams = streams_of(plan, values)
    exact(plan, weights, [w.dtype for w in weights])
    exact(plan, start, [s.dtype for s in plan.states])
    params = [w if w.dtype == plan.dtype else w.to(plan.dtype) for w in weights]
    flat = [
        s if s.dim() == 2 and s.dtype == plan.dtype else s.reshape(batch, n).to(plan.dtype)
        for s, n in zip(start, plan.core.state_sizes, strict=True)
    ]
    if not plain((*flat, *streams, *params)):
        if transformed():
            *flat_states, end = Lifted.apply(engine, steps, (len(flat), len(streams)), *flat, *streams, *params)
        else:
            *flat_states, end = solve(flat, streams, params, number(engine), steps)
        flat_last = parts(end, flat)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (*flat, *streams, *params)):
        engine.begin_backward(flat[0].device)
        results = Solve.apply(engine, steps, (len(flat), len(streams)), *flat, *streams, *params)
        flat_states, flat_last = results[: len(flat)], results[len(flat) :]
    else:
        flat_states = [room(s, batch, steps, s.shape[1]) for s in flat]
        end = engine.forward(flat, streams, params, flat_states, steps)
        flat_last = parts(end, flat)
    exact(plan, flat_states, [s.dtype for s in plan.states])
    states = [_shaped(y, s, batch, steps) for y, s in zip(flat_states, plan.states, strict=True)]
    last = [_shaped(e, s, batch) for e, s in zip(flat_last, plan.states, strict=True)]
    values |= {("param", i): w for i, w in enumerate(weights)}
    streams.clear()  # what nothing else reads is gone before the readout makes more
    return Run(states, read(plan, values, states, start), last, flat_last)


def exact(plan: Plan, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Raises InexactError where those of the tensors that hold integers, by their dtypes in the cell, hold larger ones than are exact.

    Not of tensors that hold no numbers, and not while a CUDA graph is captured.
    """
    if plan.given is None:
        return
    counts = [t.detach() for t, dtype in zip(tensors, dtypes, strict=True) if reaches(plan.given, dtype)]
    if not counts or not plain(counts) or (counts[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not below(plan.given, counts):
        raise InexactError(f"integers of {plan.given} and more")


class Values(dict[Any, Any]):
    """What pieces read, by key: tensors that the cell uses, leaves of x with batch and time in one axis, what is made on the way."""

    def __init__(self, x: Sequence[Tensor], attribute: Callable[[str], Tensor]) -> None:
        self.x, self.attribute = x, attribute
        self.batch, self.steps = x[0].shape[:2]
        super().__init__({("batch",): self.batch * self.steps})

    def __missing__(self, key: Any) -> Any:
        match key[0]:
            case "attr":
                made = self.attribute(key[1])
            case "x":
                made = self.x[key[1]].reshape(self.batch * self.steps, *self.x[key[1]].shape[2:])
            case _:
                raise KeyError(key)
        self[key] = made
        return made

    def of(self, piece: Any) -> Sequence[Tensor]:
        """What a piece makes."""
        return piece.run(*[self[key] for key in piece.inputs])  # type: ignore[no-any-return]


def streams_of(plan: Plan, values: Values) -> list[Tensor]:
    """What the recurrence reads at every step, [batch, time, numbers]: leaves of x, or what the prelude makes."""
    x, batch, steps, sizes = values.x, values.batch, values.steps, plan.core.stream_sizes
    if all(d is not None for d in plan.direct):
        leaves = [x[d] for d in plan.direct if d is not None]
        made = [v if v.dim() == 3 else v.reshape(batch, steps, n) for v, n in zip(leaves, sizes, strict=True)]
    else:
        flat = values.of(plan.prelude)
        values |= {key: flat[key[1]] for key in plan.read if key[0] == "stream"}
        made = [s.reshape(batch, steps, n) for s, n in zip(flat, sizes, strict=True)]
    exact(plan, made, [s.dtype for s in made])
    return [_ready(s, plan.dtype) for s in made]


def read(plan: Plan, values: Values, states: list[Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """The outputs [batch, time, ...], made from the states."""
    if plan.readout is None:
        return states
    for i, (y, s) in enumerate(zip(states, start, strict=True)):
        values["next", i] = y.flatten(0, 1)
        if ("complex", i) in plan.readout.inputs:
            values["complex", i] = torch.view_as_complex(values["next", i].contiguous())
        if ("state", i) in plan.readout.inputs:
            values["state", i] = before(s, y).flatten(0, 1)
    for key in plan.read:
        if key[0] == "stream" and key not in values:
            values[key] = values["x", plan.direct[key[1]]]
    outputs = owned(values.of(plan.readout), values.x)
    same = {id(values["next", i]): y for i, y in enumerate(states)}  # outputs that are states
    return [same[id(o)] if id(o) in same else o.reshape(values.batch, values.steps, *o.shape[1:]) for o in outputs]


def owned(made: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """Results in memory of their own, as those of a loop are, also where they are what a cell was given."""
    if not plain((*made, *x)):
        return list(made)
    given = {v.untyped_storage()._cdata for v in x}
    return [t.clone() if t.untyped_storage()._cdata in given else t for t in made]


def staged(
    engine: Engine, x: list[Tensor], start: list[Tensor], values: Values
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """States [batch, time, ...], last states [batch, ...] and the same as the core has them, stage by stage."""
    batch, steps = x[0].shape[:2]
    engine.own = engine.told = None
    states: dict[int, Tensor] = {}
    last: dict[int, Tensor] = {}
    whole: dict[int, Tensor] = {}
    for stage, inner in zip(engine.plan.stages, engine.stages, strict=True):
        given = list(x)
        for j in stage.earlier:
            given += [before(start[j], states[j]) if len(given) in stage.uses else states[j], states[j]]
        if inner is not None:
            done = run(inner, given, [start[i] for i in stage.leaves])
            found, last_found, ends = done.states, done.last, done.end
        else:
            flat = {("x", i): given[i].flatten(0, 1) for i in stage.uses}
            made = stage.piece.run(*(flat[key] if key in flat else values[key] for key in stage.piece.inputs))
            shapes = [(engine.plan.states[i].shape, engine.plan.states[i].dtype) for i in stage.leaves]
            found = [m.to(d).expand(batch * steps, *s).reshape(batch, steps, *s) for m, (s, d) in zip(made, shapes, strict=True)]
            found = owned(found, x)
            ends = last_found = [m[:, -1] for m in found]
        states |= dict(zip(stage.leaves, found, strict=True))
        last |= dict(zip(stage.leaves, last_found, strict=True))
        whole |= dict(zip(stage.leaves, ends, strict=True))
    every = range(len(start))
    return [states[i] for i in every], [last[i] for i in every], [whole[i] for i in every]


def before(start: Tensor, states: Tensor) -> Tensor:
    """The state before each step, [batch, time, ...]."""
    return torch.cat((start.unsqueeze(1).to(states.dtype), states[:, :-1]), 1)


def _shaped(flat: Tensor, state: StateShape, *lead: int) -> Tensor:
    """States as the cell has them. Where nothing changes nothing is called: each call costs a short run a percent."""
    if len(state.shape) != 1:
        flat = flat.reshape(*lead, *state.shape)
    return flat if flat.dtype == state.dtype else flat.to(state.dtype)


def _ready(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """A stream as kernels are given it: the arithmetic's dtype or 16 bits of it, which half the memory holds, and unit last stride."""
    if stream.dtype != dtype and not (stream.dtype in HALVES and dtype == torch.float32):
        stream = stream.to(dtype)
    return unit(stream)
