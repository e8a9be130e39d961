"""The recurrence under the transforms of torch.func: each takes it for one function that it knows how to transform.

The members of a vmap become samples of one batch; with parameters of their own each is a run of its own. Forward mode is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from seqparc.errors import SeqparcError
from seqparc.runtime.differentiable import FORWARD, gradients, refuse, unit
from seqparc.runtime.engine import Engine
from seqparc.runtime.operator import number, solve, solve_backward
from seqparc.surroundings import batched, memory


class Lifted(torch.autograd.Function):
    """(start per slot, streams, parameters) -> (states per slot [batch, time, numbers], the last state whole)."""

    @staticmethod
    def forward(engine: Engine, steps: int, counts: tuple[int, int], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        start, streams, params = split(tensors, counts)
        if not memory(tensors):
            return tuple(solve(start, streams, params, number(engine), steps))
        states = [s.new_empty(s.shape[0], steps, s.shape[1]) for s in start]
        return (*states, engine.forward(start, [unit(s) for s in streams], params, states, steps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.engine, _, ctx.counts, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n_state, saved = ctx.counts[0], ctx.saved_tensors
        tensors, states = saved[:-n_state], saved[-n_state:]
        return None, None, None, *backward(ctx.engine, ctx.counts, tensors, states, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise SeqparcError(FORWARD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], engine: Engine, steps: int, counts: tuple[int, int], *tensors: Tensor) -> Any:
        dims, n = in_dims[3:], sum(counts)
        if any(d is not None for d in dims[n:]):
            return apart(info.batch_size, dims, tensors, lambda own: Lifted.apply(engine, steps, counts, *own))
        folded = [fold(t, d, info.batch_size) for t, d in zip(tensors[:n], dims, strict=False)]
        made = Lifted.apply(engine, steps, counts, *folded, *tensors[n:])
        return tuple(unfold(t, info.batch_size) for t in made), (0,) * len(made)


class LiftedBackward(torch.autograd.Function):
    """(start and states per slot, streams, parameters, gradients of the states and of the last) -> gradients of start, streams, parameters.

    Those of parameters are [groups, ...], each group being that many samples of the batch, in order.
    """

    @staticmethod
    def forward(engine: Engine, counts: tuple[int, int], groups: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        n_state, n_stream = counts
        (start, states), rest = (tensors[:n_state], tensors[n_state : 2 * n_state]), tensors[2 * n_state :]
        streams, params, grads = rest[:n_stream], rest[n_stream : -n_state - 1], rest[-n_state - 1 :]
        if not memory(tensors):
            found = []
            for k in range(groups):
                own = [[unfold(t, groups)[k] for t in of] for of in (start, states, streams, grads)]
                found.append(solve_backward(own[0], own[1], own[2], list(params), own[3], number(engine)))
            of_params = [torch.stack(column) for column in list(zip(*found, strict=True))[n_state + n_stream :]]
            return (*(torch.cat(column) for column in list(zip(*found, strict=True))[: n_state + n_stream]), *of_params)
        before = [torch.cat((s.unsqueeze(1), y[:, :-1]), 1) for s, y in zip(start, states, strict=True)]
        given = gradients(engine, start, before, [unit(s) for s in streams], params, grads[:-1], grads[-1], groups)
        like = [*start, *streams, *(p.expand(groups, *p.shape) for p in params)]
        made = [t.new_zeros(t.shape) if g is None else g for g, t in zip(given, like, strict=True)]
        return (*(g.clone() for g in made[:n_state]), *made[n_state:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], engine: Engine, counts: tuple[int, int], groups: int, *tensors: Tensor) -> Any:
        dims, (n_state, n_stream), size = in_dims[3:], counts, info.batch_size
        first, last = 2 * n_state + n_stream, len(tensors) - n_state - 1  # of the parameters
        if any(d is not None for d in dims[first:last]):
            return apart(size, dims, tensors, lambda own: LiftedBackward.apply(engine, counts, groups, *own))
        folded = [t if first <= i < last else fold(t, d, size) for i, (t, d) in enumerate(zip(tensors, dims, strict=True))]
        made = LiftedBackward.apply(engine, counts, groups * size, *folded)
        return tuple(unfold(t, size) for t in made), (0,) * len(made)


def backward(
    engine: Engine, counts: tuple[int, int], tensors: Sequence[Tensor], states: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of start, streams and parameters, `tensors`, from those of the states after each step and of the last state."""
    n_state = counts[0]
    given = (*tensors[:n_state], *states, *tensors[n_state:], *grads)
    if not batched(given):
        found = LiftedBackward.apply(engine, counts, 1, *given)
    else:
        level = torch._C._vmapmode_increment_nesting() - 1  # type: ignore[attr-defined]
        torch._C._vmapmode_decrement_nesting()  # type: ignore[attr-defined]
        axes = [0 if batched((t,)) else None for t in given]
        inside = [t if d is None else torch._remove_batch_dim(t, level, 1, 0) for t, d in zip(given, axes, strict=True)]
        size = next(t.shape[0] for t, d in zip(inside, axes, strict=True) if d == 0)
        made, _ = LiftedBackward.vmap(Members(size), (None, None, None, *axes), engine, counts, 1, *inside)
        found = [torch._add_batch_dim(t, 0, level) for t in made]
    return [*found[: sum(counts)], *(g.squeeze(0) for g in found[sum(counts) :])]


class Members(NamedTuple):
    """Of a vmap."""

    batch_size: int


def split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Start states, streams and parameters."""
    n_state, n_stream = counts
    return list(tensors[:n_state]), list(tensors[n_state : n_state + n_stream]), list(tensors[n_state + n_stream :])


def fold(t: Tensor, axis: int | None, size: int) -> Tensor:
    """The members of a vmap as samples: [size · batch, ...]."""
    return (t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)).flatten(0, 1)


def unfold(t: Tensor, size: int) -> Tensor:
    """The samples of each member: [size, batch, ...]."""
    return t.unflatten(0, (size, t.shape[0] // size))


def apart(size: int, axes: Sequence[int | None], tensors: Sequence[Tensor], run: Any) -> Any:
    """Each member of a vmap by itself."""
    own = [[t if d is None else t.select(d, k) for t, d in zip(tensors, axes, strict=True)] for k in range(size)]
    made = [torch.stack(column) for column in zip(*map(run, own), strict=True)]
    return tuple(made), (0,) * len(made)
