"""Long sequences, where no gradient is wanted: stretches of time one after the other, so that what is made on the way stays small.

What torch makes of x before the recurrence, and what it makes of the states after it, is three numbers a step and unit for a GRU: of
ten million steps more than x and y together. A gradient would have to keep all of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqparc.plan import Plan, Stats, combined
from seqparc.runtime.pages import room
from seqparc.surroundings import plain

#: Bytes that a call without gradients may make beside its inputs and outputs before time is taken in slabs.
MOST = 256 << 20
#: Steps of a slab at least: a shorter one leaves too little to be run in parallel.
LEAST = 4096


def row_bytes(plan: Plan) -> int:
    """Bytes that a call makes for every sample and step beside x and outputs: at most, as if nothing were freed on the way."""
    made = sum(math.prod(draw.shape[1:]) * draw.dtype.itemsize for draw in plan.draws)
    if plan.stages:
        for stage in plan.stages:
            earlier = sum(plan.core.state_sizes[i] for i in stage.earlier)  # as they were before each step
            made += plan.dtype.itemsize * earlier + (row_bytes(stage.plan) if stage.plan is not None else piece_bytes(stage.piece))
    elif any(d is None for d in plan.direct):
        made += piece_bytes(plan.prelude)
    if plan.readout is not None:
        made += piece_bytes(plan.readout)
    return made + plan.dtype.itemsize * sum(plan.core.state_sizes) if made or plan.readout is not None else 0


def piece_bytes(piece: Any) -> int:
    """Bytes a row of all that a piece makes, and of the inputs that it wants flat. Views make nothing."""
    given = {a for node in piece.operations for a in node.all_input_nodes if a.op == "placeholder" and a.meta["kind"] == "x"}
    made = [n for n in piece.operations if n.meta["kind"] in ("x", "state") and not getattr(n.target, "is_view", False)]
    values = [n.meta["val"] for n in (*given, *made)]
    return sum(v.numel() * v.element_size() // v.shape[0] for v in values if isinstance(v, Tensor) and v.dim())


def count(batch: int, steps: int, each: int) -> int:
    """Slabs that a run is to be cut into, where each sample and step makes so many bytes."""
    return max(1, min(-(-batch * steps * each // MOST), steps // LEAST))


def answer(run: Callable[..., Any], engine: Any, x: list[Tensor], start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output leaves [batch, time, ...] and last state leaves [batch, ...] by `run` of `seqparc.runtime.run`; in slabs where called for."""
    batch, steps = x[0].shape[:2]
    if type(steps) is int and engine.row_bytes and (number := count(batch, steps, engine.row_bytes)) > 1 and plain((*x, *start)):
        plan = engine.plan
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*x, *start, *(get() for get in plan.attributes.values()))):
            return in_slabs(number, run, engine, x, start)
    done = run(engine, x, start)
    return done.outputs, done.last


def in_slabs(
    number: int, run: Callable[..., Any], engine: Any, x: Sequence[Tensor], start: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same in so many; each starts from the state that the one before ended in, as it was before it was rounded to a narrow dtype."""
    batch, steps = x[0].shape[:2]
    edges = [steps * k // number for k in range(number + 1)]
    outputs: list[Tensor] = []
    told: list[Stats] = []
    last: list[Tensor] = []
    for a, b in itertools.pairwise(edges):
        done = run(engine, [v[:, a:b] for v in x], start)
        if not outputs:
            outputs = [room(o, batch, steps, *o.shape[2:]) for o in done.outputs]
        for whole, part in zip(outputs, done.outputs, strict=True):
            whole[:, a:b] = part
        start, last = [e.reshape(batch, *s.shape) for e, s in zip(done.end, engine.plan.states, strict=True)], done.last
        del done  # before the next is made
        told.append(engine.stats)
    s = combined(told)
    why = f"{number} slabs of about {steps // number} steps, one after the other, as there would be more than {MOST >> 20} MiB on the way"
    engine.told = replace(s, reasons=(*s.reasons, why), history=told[-1].history)
    return outputs, last
