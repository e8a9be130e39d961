"""Backward of a cell that carries a gradient of its own: its adjoint recurrence compiled, then one eager call over all steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqparc.convention import Convention, called
from seqparc.errors import SeqparcError
from seqparc.locks import LOOKING
from seqparc.runtime.differentiable import once
from seqparc.runtime.engine import Engine
from seqparc.runtime.run import Run, before, run
from seqparc.surroundings import Place, batched, holding, recast, transformed

TRANSFORMED = (
    "which torch.func's transforms, and many gradients at once (is_grads_batched), cannot look through; use rnn.sequential(x, state), or "
    "torch.no_grad() where no gradient is wanted."
)


@dataclass
class OwnGradientCall:
    """What backward needs to know about the call: `adjoint(x leaves, state leaves)` gives the engine of the traced adjoint step."""

    cell: Any
    convention: Convention
    engine: Engine
    adjoint: Callable[[list[Tensor], list[Tensor]], Engine]
    used: list[tuple[Callable[[], Any], Tensor]]  # tensors of the cell that it uses, and how they are looked up
    places: list[Place]  # where modules keep such
    cast: torch.dtype | None  # what autocast cast to

    def __call__(self, x: list[Tensor], start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(output leaves, last state leaves), differentiable."""
        results = OwnGradient.apply(self, len(x), len(start), *x, *start, *(t for _, t in self.used))
        return list(results[: -len(start)]), list(results[-len(start) :])

    @contextlib.contextmanager
    def again(self, saved: Sequence[Tensor], asked: Sequence[bool]) -> Iterator[list[Tensor]]:
        """The cell as it was when it was called, with these in the places of the tensors it used; gives the tensors it now uses.

        Parameters may be others meanwhile: those of torch.func.functional_call are back in their places, or one has been replaced.
        """
        if any(part.changed() for _, part in self.engine.parts):
            raise SeqparcError(
                f"{self.engine.name} was changed between a call and its backward (a setting, a part, or train() and eval()), which runs "
                "the cell again as it has a gradient of its own; change it after backward"
            )
        leaves = {id(t): s.detach().requires_grad_(a) for (_, t), s, a in zip(self.used, saved, asked, strict=True)}
        with holding([(table, name, leaves[id(t)]) for table, name, t in self.places if id(t) in leaves]):
            placed = {id(t) for _, _, t in self.places}
            now = [leaves[id(t)] if id(t) in placed else t for _, t in self.used]
            if any(get() is not t for (get, _), t in zip(self.used, now, strict=True)):
                raise SeqparcError(
                    f"a tensor that {called(self.cell)} uses, or the module that holds it, was replaced between a call and its backward, "
                    "which runs the cell again as it has a gradient of its own; replace it after backward"
                )
            yield now


class OwnGradient(torch.autograd.Function):
    """(x leaves, start leaves, captured tensors) -> (output leaves, last state leaves)."""

    @staticmethod
    def forward(ctx: Any, call: OwnGradientCall, n_x: int, n_s: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, start = list(tensors[:n_x]), list(tensors[n_x : n_x + n_s])
        done: Run = run(call.engine, x, start)
        ctx.call, ctx.counts = call, (n_x, n_s)
        ctx.save_for_backward(*tensors, *done.states)
        # Outputs that are the states themselves must not be returned as the tensors saved above.
        results = (*(t.view_as(t) for t in done.outputs), *done.last)
        cut = call.engine.plan.cut if call.convention.out is not None else call.engine.plan.cut * 2
        ctx.mark_non_differentiable(*(t for t, c in zip(results, cut, strict=True) if c))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, (n_x, n_s) = ctx.call, ctx.counts
        saved = ctx.saved_tensors
        tensors, states = saved[:-n_s], saved[-n_s:]
        x, start, captured = tensors[:n_x], tensors[n_x : n_x + n_s], tensors[n_x + n_s :]
        create_graph = torch.is_grad_enabled()
        if transformed() or batched(grads):
            raise SeqparcError(f"{called(call.cell)} has a gradient of its own, {TRANSFORMED}")
        asked = ctx.needs_input_grad[3 + n_x + n_s :]
        with LOOKING(), torch.no_grad(), recast(x[0].device.type, call.cast), call.again(captured, asked) as used:
            found = _gradients(call, x, start, used, states, grads[:-n_s], grads[-n_s:])
        results = (None, None, None, *found)
        return once(results, tensors) if create_graph else results


def _gradients(
    call: OwnGradientCall, x: Sequence[Tensor], start: Sequence[Tensor], captured: Sequence[Tensor], states: Sequence[Tensor],
    g_out: Sequence[Tensor], g_last: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, the start state and the captured tensors. λ_t, the cotangent of the state after step t, solves
    λ_{t-1} = ḡ_{t-1} + vjp_t(λ_t, ḡ_out,t), run from the right by the same driver as any recurrence."""
    floating = [s.dtype.is_floating_point for s in start]
    earlier = [before(s, y) for s, y in zip(start, states, strict=True)]
    of_states = call.convention.out is None
    g_states = list(g_out) if of_states else [torch.zeros_like(y) for y in states]
    outs = [] if of_states else list(g_out)
    given = [*x, *earlier, *(g for g, f in zip(g_states, floating, strict=True) if f), *outs]
    mu = [g for g, f in zip(g_last, floating, strict=True) if f]
    reverse = [t.flip(1) for t in given]
    engine = call.adjoint(reverse, mu)
    done = run(engine, reverse, mu)
    call.engine.own = engine.stats
    arriving = [before(m, r).flip(1) for m, r in zip(mu, done.states, strict=True)]  # at the state after each step

    flat_x = [t.flatten(0, 1).detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in x]
    flat_s = [t.flatten(0, 1).detach().requires_grad_(f) for t, f in zip(earlier, floating, strict=True)]
    with torch.enable_grad():
        out, following = call.convention.call(call.cell, flat_x, flat_s)
        after = [t for t, f in zip(following, floating, strict=True) if f]
        own = [g for g, f in zip(g_states, floating, strict=True) if f]
        cotangents = [(m + g).flatten(0, 1) for m, g in zip(arriving, own, strict=True)]
        pairs = [*zip(after, cotangents, strict=True), *zip(out or (), (g.flatten(0, 1) for g in outs), strict=True)]
        pairs = [(t, c) for t, c in pairs if t.requires_grad]
        wanted = [t for t in (*flat_x, *captured) if t.requires_grad]
        grads = torch.autograd.grad([t for t, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True) if pairs and wanted else ()
    by_tensor = {id(t): g for t, g in zip(wanted, grads, strict=True)} if grads else {}
    g_x = [g if (g := by_tensor.get(id(f))) is None else g.reshape(t.shape) for f, t in zip(flat_x, x, strict=True)]
    ends = iter(done.last)
    g_start = [next(ends) if f else None for f in floating]
    return [*g_x, *g_start, *(by_tensor.get(id(t)) for t in captured)]
