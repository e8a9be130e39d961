"""Calls of compiled cells that torch.compile or torch.export trace.

Dynamo does not look into a call (`nonstrict_trace`), autograd's tracing goes through it: the prelude and the readout become part of the
graph as anything does, and the recurrence between them is one operator. This is imported when needed, as Dynamo takes two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from seqparc import signature as sig
from seqparc.errors import SeqparcError, ShapeError
from seqparc.runtime.derived import Paired, as_real
from seqparc.runtime.engine import Engine
from seqparc.runtime.module import MODULES, CompiledRNN, paired
from seqparc.runtime.run import run


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def objection(at: int, stateless: bool) -> str | None:
    """Why a graph cannot hold calls of a module; of one that has not been called yet as far as that is known."""
    rnn = MODULES[at]
    if not isinstance(rnn.cell, torch.nn.Module):
        return "it is a function, whose tensors a graph does not see"
    if stateless and (rnn._given is not None or any(hasattr(rnn.cell, m) for m in sig.METHODS)):
        return "it makes its initial state itself; give the state"
    if stateless and any(known.convention.held for known in rnn._understood.values()):
        return "it keeps its state on itself; give the state"
    return next((why for e in rnn._engines.values() if (why := _objection(rnn, e)) is not None), None)


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


def call(rnn: CompiledRNN, x: Any, state: Any) -> Any:
    """A call of a module as torch.compile traces it. Where a graph cannot hold it, one ends before it and another goes on after it."""
    exporting = torch.compiler.is_exporting()
    if exporting and torch.compiler.is_dynamo_compiling():
        raise SeqparcError("torch.export takes a compiled cell with strict=False, which is its default, not with strict=True")
    why = objection(rnn._number, state is None)
    if why is None:
        return _through(rnn._number, [*rnn.parameters(), *rnn.buffers()], x, () if state is None else (state,))
    if exporting:
        raise SeqparcError(f"torch.export cannot hold calls of {rnn.name}: {why}")
    torch._dynamo.graph_break()
    return torch.compiler.disable(type(rnn).forward)(rnn, x, state)


@torch._dynamo.nonstrict_trace
def _through(at: int, tensors: list[Tensor], x: Any, state: tuple[Any, ...]) -> Any:
    """Run on tensors that stand for others. `tensors`: for the parameters and buffers; `state`: one or none."""
    rnn = MODULES[at]
    leaves, structure = sig.flatten(x)
    start, nested = sig.flatten(state[0]) if state else ([], None)
    _check(leaves, start)
    own = [*rnn.parameters(), *rnn.buffers()]
    batch = _size(leaves[0].shape[0])
    with _disable_current_modes():  # to find out about the cell takes tensors that hold something
        like = structure.unflatten([_zeros((batch, 2, *v.shape[2:]), v) for v in leaves])
        try:
            asked = rnn._call(like, None if nested is None else nested.unflatten([_zeros((batch, *s.shape[1:]), s) for s in start]))
            real, step = paired(asked, rnn.cell)
            engine = rnn._engine(real, step)
        except Exception as error:
            if any(isinstance(t, FakeTensor) for t in own):
                raise SeqparcError(
                    f"{rnn.name} is exported with parameters that hold no numbers, and has not been called with this batch before; "
                    "call the model once, on what it is exported with"
                ) from error
            raise
        why = _objection(rnn, engine)
    if why is not None or isinstance(engine, str):
        raise SeqparcError(
            f"a graph cannot hold calls of {rnn.name}: {why}. Under torch.compile call it once before; graphs then end before each call "
            "and go on after it."
        )
    if nested is None:  # others than zeros are not traceable
        start = [leaves[0].new_zeros(leaves[0].shape[0], *s.shape[1:], dtype=s.dtype) for s in asked.start]
    done = run(engine, leaves, as_real(start), {id(mine): t for mine, t in zip(own, tensors, strict=True)})
    outputs, last = step.own(done.outputs, done.last) if isinstance(step, Paired) else (done.outputs, done.last)
    return asked.convention.unflatten(outputs, last)


def _check(leaves: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    """What would be out of bounds at run time: x without its axes, and batches or lengths that differ."""
    if any(v.dim() < 2 for v in leaves) or any(s.dim() < 1 for s in start):
        raise ShapeError("x must be [batch, time, ...] and a state [batch, ...]")
    lead = leaves[0].shape[:2]
    if any(v.shape[:2] != lead for v in leaves) or any(s.shape[0] != lead[0] for s in start) or 0 in lead:
        about = ", ".join(str(list(t.shape)) for t in (*leaves, *start))
        raise ShapeError(f"x's leaves must agree about batch and time, and the state about batch, and neither may be empty; got {about}")


def _size(n: Any) -> int:
    """A size as it was when tracing began: what is found out does not depend on it."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) and n.node.hint is not None else int(n)


def _zeros(shape: Sequence[Any], like: Tensor) -> Tensor:
    return torch.zeros([int(n) for n in shape], dtype=like.dtype, device=like.device)
