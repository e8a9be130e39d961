"""Calls that go as an earlier one went, with other numbers: what is short is mostly Python, and most of that only finds out what to do.

Only without gradients, on a processor, where the run has become routine (`seqparc.runtime.routine`). All that could make the call another
one is looked at: what surrounds it, the cell's parts and settings, shapes, dtypes, and the numbers of small weights, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc.kept import Kept, Prepared, worth_keeping
from seqparc.runtime.calls import Call
from seqparc.runtime.differentiable import parts
from seqparc.runtime.driver import Cut
from seqparc.runtime.engine import Engine, whole
from seqparc.runtime.pages import room
from seqparc.runtime.run import Values, read, streams_of
from seqparc.runtime.slabs import count
from seqparc.surroundings import autocast, modes, places, plain
from seqparc.tree import Structure, flatten

#: Calls that are remembered, by shapes.
MOST = 64


class Replays:
    """Those of one module."""

    def __init__(self) -> None:
        self._known: dict[Any, Replay] = {}

    def clear(self) -> None:
        self._known.clear()

    def answer(self, rnn: Any, x: Any, state: Any) -> tuple[Any, Any] | None:
        """What the call returns; None if it is not like one that is known, or if something has changed."""
        if not self._known or torch.is_grad_enabled():
            return None
        leaves, structure = flatten(x)
        given = None if state is None else flatten(state)
        replay = self._known.get(_key(leaves, structure, given))
        return None if replay is None else replay.run(rnn, leaves, replay.start if given is None else given[0])

    def note(self, rnn: Any, call: Call, engine: Any, x: Any, state: Any) -> None:
        """Remember a call that has just been answered, if the next ones like it may be replayed."""
        if torch.is_grad_enabled() or not isinstance(engine, Engine) or not repeatable(engine, call):
            return
        structure, given = flatten(x)[1], None if state is None else flatten(state)
        if given is None and not any(k.start is call.start and k.watch is None for k in rnn._understood.values()):
            return  # the start state may be another each time
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[_key(call.leaves, structure, given)] = Replay(rnn, call, engine, given is not None)


def _key(leaves: Sequence[Tensor], structure: Structure, given: tuple[list[Tensor], Structure] | None) -> Any:
    return (structure, *[v.shape for v in leaves], None if given is None else (given[1], *[s.shape for s in given[0]]))


def repeatable(engine: Engine, call: Call) -> bool:
    """Whether calls of this kind are simple enough, and runs of this shape have become routine."""
    plan, (batch, steps) = engine.plan, call.leaves[0].shape[:2]
    simple = not (plan.stages or plan.draws or plan.frozen or plan.twins or plan.step) and all(k[0] == "attr" for k in plan.weights.inputs)
    flat = all(len(s.shape) == 1 and s.dtype == plan.dtype for s in plan.states) and not any(s.is_complex() for s in call.start)
    at_once = not engine.row_bytes or count(batch, steps, engine.row_bytes) == 1
    usual = autocast("cpu") is None and not modes()
    return simple and flat and at_once and usual and engine.routine("forward", batch, steps) is not None


def _copied(own: dict[str, Any]) -> dict[str, Any]:
    """What a module holds, and the tables in it."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in own.items()}


class Replay:
    """One such call."""

    def __init__(self, rnn: Any, call: Call, engine: Engine, given: bool) -> None:
        plan, (batch, steps) = engine.plan, call.leaves[0].shape[:2]
        self.engine, self.convention, self.start = engine, call.convention, call.start
        self.batch, self.steps, self.at = batch, steps, ("forward", batch, steps, torch.get_num_threads())
        self.row = None if given else whole(call.start).contiguous()  # what it starts from, if that is always the same
        self.made = rnn._made
        # What modules hold is compared as a whole, which is quick where it is the very same.
        self.held = [(m, type(m), _copied(m.__dict__)) for m in self.made.modules]
        self.dtypes = [t.dtype for t in (*call.leaves, *call.start)]
        own = {id(t) for _, _, t in places(self.made.modules)}
        # Name, the tensor, how it is looked up if no module has it as its own, shape and dtype.
        self.attributes = [
            (name, t := get(), None if id(t) in own else get, t.shape, t.dtype) for name, get in plan.attributes.items()
        ]  # fmt: skip
        self.weights = [key[1] for key in plan.weights.inputs]
        x, sizes = call.leaves, plan.core.stream_sizes
        self.direct = [d for d, n in zip(plan.direct, sizes, strict=True) if d is not None and x[d].shape[2:] == (n,)]
        self.simple = len(self.direct) == len(plan.direct) and plan.readout is None  # nothing for torch to do
        self.kept: Kept | None = None  # the weights as they were last, and as the kernel is given them
        self.cut: Cut | None = None
        self.again: Any = None  # the sweep of that cut, for streams of these strides
        self.strides: list[tuple[int, ...]] = []

    def run(self, rnn: Any, x: list[Tensor], start: list[Tensor]) -> tuple[Any, Any] | None:
        """The call's answer, or None where it has to go another way."""
        engine, routine = self.engine, self.engine.routines.get(self.at)
        if routine is None or routine.left <= 0 or torch.get_num_threads() != self.at[3]:
            return None
        now = self._as_it_was(rnn, x, start)
        if now is None:
            return None
        begin = time.perf_counter()
        values = None if self.simple else Values(x, now.__getitem__)
        streams = [x[d] for d in self.direct] if values is None else streams_of(engine.plan, values)
        params = self._params([now[name] for name in self.weights])
        row = self.row if self.row is not None else whole(start).contiguous()
        emits = [room(s, self.batch, self.steps, s.shape[1]) for s in start]
        kernel: Any = engine.kernels["forward"][1]
        cut = routine.cut
        if cut is not self.cut:
            self.again, self.cut = kernel.again(cut.spans, row, streams, params, emits, cut.fade), cut
            self.strides = [s.stride() for s in streams]
        if [s.stride() for s in streams] != self.strides:
            return None
        if len(cut.spans) == 1:
            gap, end = 0.0, row.new_empty(row.shape)
            self.again.run(row, streams, params, emits, end)
        else:
            ends, reached, sizes = (row.new_empty(len(cut.spans), *row.shape) for _ in range(3))
            self.again.run(row, streams, params, emits, ends, reached, sizes)
            gap, end = kernel.gap(reached, ends, sizes, cut.atol, cut.rtol)[0], ends.select(0, -1)
        if not engine.went("forward", routine, gap, self.batch, time.perf_counter() - begin):
            return None
        rnn.__dict__["_last"] = engine
        outputs = emits if values is None else read(engine.plan, values, emits, start)
        return self.convention.unflatten(outputs, parts(end, start))

    def _as_it_was(self, rnn: Any, x: Sequence[Tensor], start: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """The tensors that the cell uses, by name; None if anything that decides about the call is not as it was."""
        tensors = (*x, *start)
        if modes() or autocast("cpu") is not None or not plain(tensors) or [t.dtype for t in tensors] != self.dtypes:
            return None
        try:
            for m, kind, was in self.held:
                if type(m) is not kind or m.__dict__ != was:
                    return None
        except (RuntimeError, ValueError, TypeError):  # another tensor, or array, which does not say whether it is equal
            return None
        if rnn._made is not self.made or not self.made.same_outside():
            return None
        now = {}
        for name, t, get, shape, dtype in self.attributes:
            if get is not None and not plain((t := get(),)):
                return None
            now[name] = t
            if t.shape != shape or t.dtype is not dtype or not t.is_cpu:
                return None
        return now if all(t.is_cpu for t in tensors) else None

    def _params(self, now: list[Tensor]) -> Prepared:
        """The weights as the kernel is given them."""
        kept = self.kept
        if kept is None or not kept.still(now):
            keep, plan = worth_keeping(now), self.engine.plan
            weights = [w.to(plan.dtype, copy=keep) for w in plan.weights.run(*now)]  # what is kept must not be memory of the user's
            kernel: Any = self.engine.kernels["forward"][1]
            made: Prepared = kernel.prepare(weights, ())[0]
            self.kept = Kept(now, made) if keep else None
            return made
        return kept.made
