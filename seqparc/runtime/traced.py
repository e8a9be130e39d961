"""Calls of compiled cells and layers that torch.compile or torch.export trace.

Dynamo does not look into a call (`nonstrict_trace`), autograd's tracing goes through it: the prelude and the readout become part of the
graph as anything does, and the recurrence between them is one operator. This is imported when needed, as Dynamo takes two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc import signature as sig
from seqparc.errors import SeqparcError
from seqparc.runtime.calls import MODULES
from seqparc.runtime.engine import Engine, whole
from seqparc.runtime.lifted import split
from seqparc.runtime.module import CompiledRNN
from seqparc.runtime.operator import number, solve_backward
from seqparc.surroundings import holding, places


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def objection(at: int, stateless: bool) -> str | None:
    """Why a graph cannot hold calls of a module; of one that has not been called yet as far as that is known."""
    module = MODULES[at]
    if not isinstance(module, CompiledRNN):
        return next((why for step in module.steps().values() for e in step._engines.values() if (why := _objection(step, e))), None)
    if not isinstance(module.cell, torch.nn.Module):
        return "it is a function, whose tensors a graph does not see"
    if stateless and (module._given is not None or any(hasattr(module.cell, m) for m in sig.METHODS)):
        return "it makes its initial state itself; give the state"
    if stateless and any(known.convention.held for known in module._understood.values()):
        return "it keeps its state on itself; give the state"
    return next((why for e in module._engines.values() if (why := _objection(module, e)) is not None), None)


def _objection(rnn: CompiledRNN, engine: Engine | str) -> str | None:
    """The same of calls that one engine runs."""
    if isinstance(engine, str):
        return engine
    if engine.plan.own_gradient:
        return f"it has a gradient of its own ({engine.plan.own_gradient[0]})"
    if engine.plan.draws:
        return f"it draws random numbers ({engine.plan.draws[0].source})"
    own = {id(t) for t in (*rnn.parameters(), *rnn.buffers())}
    foreign = [name for name, get in engine.plan.attributes.items() if id(get()) not in own]
    return f"it uses {foreign[0]}, which is neither a parameter nor a buffer of it" if foreign else None


def admit(rnn: CompiledRNN, engine: Engine | str) -> None:
    """Raises SeqparcError where a graph that is being made cannot hold what an engine does."""
    if (why := _objection(rnn, engine)) is not None:
        raise SeqparcError(
            f"a graph cannot hold calls of {rnn.name}: {why}. Under torch.compile call it once before; graphs then end before each call "
            "and go on after it."
        )


def call(module: Any, name: str, stateless: bool, **given: Any) -> Any:
    """A call of a module as torch.compile traces it. Where a graph cannot hold it, one ends before it and another goes on after it."""
    exporting = torch.compiler.is_exporting()
    if exporting and torch.compiler.is_dynamo_compiling():
        raise SeqparcError("torch.export takes a compiled cell with strict=False, which is its default, not with strict=True")
    why = objection(module._number, stateless)
    if why is None:
        training = [m.training for m in module.modules()]  # read here, so that the graph depends on it
        some = {k: v for k, v in given.items() if v is not None}
        return _through(module._number, [*module.parameters(), *module.buffers()], training, some)
    if exporting:
        raise SeqparcError(f"torch.export cannot hold calls of {name}: {why}")
    torch._dynamo.graph_break()
    return torch.compiler.disable(type(module).forward)(module, **given)


@torch._dynamo.nonstrict_trace
def _through(at: int, tensors: list[Tensor], training: list[bool], given: dict[str, Any]) -> Any:
    """Run on tensors that stand for others. `tensors`: for the parameters and buffers."""
    module = MODULES[at]
    by = {id(own): t for own, t in zip((*module.parameters(), *module.buffers()), tensors, strict=True)}
    with holding([(table, name, by[id(own)]) for table, name, own in places(module.modules())]):
        return module.compute(**given, admit=admit)


def backward(ctx: Any, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], room: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The backward of an eager call as compiled autograd traces it."""
    start, streams, params = split(tensors, ctx.counts)
    states = [r.narrow(1, 1, r.shape[1] - 1) for r in room]
    given = [torch.zeros_like(y) if g is None else g for g, y in zip(grads, (*states, *start), strict=True)]
    given[len(start) :] = [whole(given[len(start) :])]
    return None, None, None, *solve_backward(start, states, streams, params, given, _number_of(ctx.engine))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(engine: Engine) -> int:
    return number(engine)
