"""The recurrence as a function that autograd knows, whole states and their parts, and gradients that cannot be differentiated again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from seqparc.errors import SeqparcError
from seqparc.runtime.engine import Engine, whole
from seqparc.runtime.pages import room
from seqparc.surroundings import batched, plain, recast

FORWARD = (
    "a derivative in forward mode (torch.func.jvp, jacfwd, hessian, or dual tensors) through a compiled cell was asked for, which is not "
    "there; use torch.func.vjp or jacrev, or rnn.sequential(x, state)."
)


class Solve(torch.autograd.Function):
    """The recurrence as a differentiable function: (start per slot, streams, parameters) -> (states per slot, last per slot)."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, steps: int, counts: tuple[int, int], *tensors: Tensor) -> tuple[Tensor, ...]:
        n_state, n_stream = counts
        start, streams, params = tensors[:n_state], tensors[n_state : n_state + n_stream], tensors[n_state + n_stream :]
        # The start state in front, so that the states before each step are a view of the same memory.
        kept = [room(s, s.shape[0], steps + 1, s.shape[1]) for s in start]
        for r, s in zip(kept, start, strict=True):
            r.select(1, 0).copy_(s)
        states = [r.narrow(1, 1, steps) for r in kept]
        stored = [] if engine.stored is None else [room(start[0], start[0].shape[0], steps, engine.stored.numbers)]
        end = engine.forward(start, streams, params, [*states, *stored], steps, bool(stored))
        ctx.engine, ctx.counts, ctx.stored = engine, counts, len(stored)
        ctx.save_for_backward(*stored, *tensors, *kept)
        return (*states, *parts(end, start))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n_state, n_stream = ctx.counts
        kept = ctx.saved_tensors  # asked for once: a checkpoint gives them out once
        stored, saved = kept[: ctx.stored], kept[ctx.stored :]
        tensors, states = saved[:-n_state], saved[-n_state:]  # the start state in front of those
        if torch.compiler.is_compiling():  # compiled autograd
            from seqparc.runtime import traced

            return traced.backward(ctx, grads, tensors, states)
        if not plain([g for g in grads if g is not None]) or batched(grads):  # traced, or many gradients at once
            from seqparc.runtime.lifted import backward

            after = [r.narrow(1, 1, r.shape[1] - 1) for r in states]
            given = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, (*after, *tensors[:n_state]), strict=True)]
            return None, None, None, *backward(ctx.engine, ctx.counts, tensors, after, [*given[:n_state], whole(given[n_state:])])
        start, streams, params = tensors[:n_state], tensors[n_state : n_state + n_stream], tensors[n_state + n_stream :]
        with recast(states[0].device.type, None), torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            before = [r.narrow(1, 0, r.shape[1] - 1) for r in states]
            g_last = whole([g if g is not None else torch.zeros_like(s) for g, s in zip(grads[n_state:], start, strict=True)])
            wanted = ctx.needs_input_grad[3 + n_state : 3 + n_state + n_stream]
            found = gradients(ctx.engine, start, before, streams, params, grads[:n_state], g_last, stored=stored, wanted=wanted)
            results = (None, None, None, *found)
        return once(results, tensors) if torch.is_grad_enabled() else results


def gradients(
    engine: Engine, start: Sequence[Tensor], before: Sequence[Tensor], streams: Sequence[Tensor], params: Sequence[Tensor],
    g_states: Sequence[Tensor | None], g_last: Tensor, groups: int = 0, stored: Sequence[Tensor] = (),
    wanted: tuple[bool, ...] | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the start state per slot, the streams and the parameters, from those of the states after each step and of the last.

    groups: if given, those of the parameters are [groups, ...], of as many parts of the batch.
    stored: what forward wrote beside the states, if it did; wanted: which streams' gradients are, all if not given.
    """
    given = [unit(g) if g is not None else b.new_zeros(b.shape[-1]).expand_as(b) for g, b in zip(g_states, before, strict=True)]
    g_start, g_streams, g_params = engine.backward(before, streams, params, given, g_last, groups, stored, wanted)
    lead = (groups,) if groups else ()
    shaped = [g if g is None or (p.dim() == 1 and not groups) else g.view((*lead, *p.shape)) for g, p in zip(g_params, params, strict=True)]
    cast = [g if g is None or g.dtype == s.dtype else g.to(s.dtype) for g, s in zip(g_streams, streams, strict=True)]
    return [*parts(g_start, start), *cast, *shaped]


def parts(together: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """What rows of a whole state are per slot, each slot as wide as in `like`."""
    return (together,) if len(like) == 1 else together.split_with_sizes([s.shape[1] for s in like], -1)


def unit(g: Tensor) -> Tensor:
    """A tensor with a unit last stride, as kernels read it."""
    return g if g.stride(-1) == 1 or g.shape[-1] == 1 else g.contiguous()


def once(results: Sequence[Tensor | None], parents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients made with create_graph=True: a second derivative through them would be silently zero without this."""
    return tuple(r if r is None else _Once.apply(r, *[t for t in parents if t.requires_grad]) for r in results)


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so when that is tried."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, *parents: Tensor) -> Tensor:
        return g.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse(ctx, *grads)


def refuse(ctx: Any, *grads: Any) -> NoReturn:
    """The derivative of a gradient."""
    raise SeqparcError(
        "a second derivative through a compiled cell was asked for (create_graph=True). The compiled backward is not itself "
        "differentiable; use rnn.sequential(x, state) where you need second derivatives."
    )
