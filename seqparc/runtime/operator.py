"""The recurrence as an operator of torch's, `seqparc::solve`, with a fake and a gradient, for graphs; eager calls are quicker without.

A graph holds numbers and tensors, so the operator knows its engine by number. The number is made of what the engine computes: a graph that
was kept, or loaded in another process, finds an engine that computes the same or none, never another.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqparc.errors import SeqparcError, ShapeError
from seqparc.runtime.differentiable import FORWARD, gradients, refuse, unit
from seqparc.runtime.engine import Engine, engines
from seqparc.surroundings import alone
from seqparc.text import digest

_NUMBERED: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_NUMBERS: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()
#: Those that exported graphs call; torch.export puts a module back to what it was before, and what it learnt meanwhile is gone.
_EXPORTED: set[Engine] = set()
#: Engines of one process that compute the same have numbers that follow each other, of at most so many. All stay below 2^53.
ALIKE = 1 << 12


def number(engine: Engine) -> int:
    """What graphs call an engine: those that torch.export makes, and which stay as they were, by a number below zero."""
    if not torch.compiler.is_exporting():
        return _number(engine)
    _EXPORTED.add(engine)
    return -_number(engine)


def _number(engine: Engine) -> int:
    if engine not in _NUMBERS:
        plan = engine.plan
        with alone():
            frozen = [f"{name} {value.dtype} {value.tolist()}" for name, value in sorted(plan.frozen.items())]
        about = hashlib.sha256(f"{digest(plan.program)} {plan.dtype} {engine.options} {engine.offered}".encode())
        for line in frozen:
            about.update(line.encode())
        first = int.from_bytes(about.digest()[:5], "big") * ALIKE
        made = next(n for n in range(first, first + ALIKE) if n not in _NUMBERED)
        _NUMBERS[engine], _NUMBERED[made] = made, engine
    return _NUMBERS[engine]


def held(at: int) -> Engine:
    """The engine of a number; if it is not there, one that computes the same."""
    at = abs(at)
    found = _NUMBERED.get(at)
    if found is None:
        alike = (engine for engine in engines() if _number(engine) // ALIKE == at // ALIKE)
        found = next(alike, None)
    if found is None:
        raise SeqparcError(
            "a graph made by torch.compile or torch.export calls a compiled cell that is not there, or no longer; make the graph anew, or "
            "in another process compile the cell and call it once before the graph"
        )
    return found


@torch.library.custom_op("seqparc::solve", mutates_args=())
def solve(start: list[Tensor], streams: list[Tensor], params: list[Tensor], engine: int, steps: int) -> list[Tensor]:
    """The states after each step, [batch, time, numbers] per slot, and the last state [batch, all numbers]."""
    run = held(engine)
    if (run.plan.frozen and run.plan.stale()) or (engine > 0 and run.changed()):
        raise SeqparcError(
            "a compiled cell has changed since a graph was made of it (a constant that its structure relies on, a setting, a part, a hook, "
            "or whether it is training); make the graph anew"
        )
    if forward_ad._current_level >= 0:  # what an operator's inputs would say about it is not seen here
        raise SeqparcError(FORWARD)
    batch = start[0].shape[0]
    if any(s.shape[0] != batch for s in start) or any(x.shape[:2] != (batch, steps) for x in streams):  # kernels look at no shapes
        about = ", ".join(str(list(t.shape)) for t in (*start, *streams))
        raise ShapeError(f"a graph calls a compiled cell with shapes that do not belong together: {about}, {steps} steps")
    states = [s.new_empty(batch, steps, s.shape[1]) for s in start]
    end = run.forward(start, [unit(s) for s in streams], params, states, steps)
    return [*states, end]


@solve.register_fake
def _(start: list[Tensor], streams: list[Tensor], params: list[Tensor], engine: int, steps: int) -> list[Tensor]:
    batch = start[0].shape[0]
    return [*(s.new_empty(batch, steps, s.shape[1]) for s in start), start[0].new_empty(batch, sum(s.shape[1] for s in start))]


@torch.library.custom_op("seqparc::solve_backward", mutates_args=())
def solve_backward(
    start: list[Tensor], states: list[Tensor], streams: list[Tensor], params: list[Tensor], grads: list[Tensor], engine: int
) -> list[Tensor]:
    """Gradients of the start state per slot, of the streams and of the parameters."""
    before = [torch.cat((s.unsqueeze(1), y[:, :-1]), 1) for s, y in zip(start, states, strict=True)]
    found = gradients(held(engine), start, before, [unit(s) for s in streams], params, grads[:-1], grads[-1])
    like = (*start, *streams, *params)
    made = [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(found, like, strict=True)]
    return [*(g.clone() for g in made[: len(start)]), *made[len(start) :]]  # parts of one tensor, which an operator may not return


@solve_backward.register_fake
def _(
    start: list[Tensor], states: list[Tensor], streams: list[Tensor], params: list[Tensor], grads: list[Tensor], engine: int
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*start, *streams, *params)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    start, streams, params, ctx.engine, _ = inputs
    ctx.counts = len(start), len(streams)
    ctx.save_for_backward(*start, *output[:-1], *streams, *params)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n_state, n_stream = ctx.counts
    saved = list(ctx.saved_tensors)
    start, states, rest = saved[:n_state], saved[n_state : 2 * n_state], saved[2 * n_state :]
    like = [*states, torch.cat(start, -1)]
    given = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]
    found = solve_backward(start, states, rest[:n_stream], rest[n_stream:], given, ctx.engine)
    return found[:n_state], found[n_state : n_state + n_stream], found[n_state + n_stream :], None, None


solve.register_autograd(_backward, setup_context=_setup)
solve_backward.register_autograd(refuse)
