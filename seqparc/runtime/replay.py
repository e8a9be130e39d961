"""Calls that go as an earlier one went, with other numbers: what is short is mostly Python, and most of that only finds out what to do.

Only on a processor, where the run has become routine (`seqparc.runtime.routine`). All that could make the call another one is looked at:
what surrounds it, the cell's parts and settings, shapes, dtypes, and the numbers of small weights, bit for bit. Where a gradient may be
asked for, only what leads up to the run is left out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc.kept import Kept, Prepared, worth_keeping
from seqparc.runtime.calls import Call
from seqparc.runtime.differentiable import Solve, parts, unit
from seqparc.runtime.engine import Engine, whole
from seqparc.runtime.pages import room
from seqparc.runtime.routine import swept
from seqparc.runtime.run import Values, read, streams_of
from seqparc.runtime.slabs import count
from seqparc.surroundings import PLAIN, autocast, modes, places, surrounded
from seqparc.tree import LEAF, Structure, flatten

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
        if not self._known:
            return None
        leaves, structure = ([x], LEAF) if type(x) is Tensor else flatten(x)
        given = None if state is None else flatten(state)
        if given is None and rnn.start_learns():
            return None
        replay = self._known.get(_key(leaves, structure, given))
        return None if replay is None else replay.run(rnn, leaves, replay.start if given is None else given[0])

    def note(self, rnn: Any, call: Call, engine: Any, x: Any, state: Any) -> None:
        """Remember a call that has just been answered, if the next ones like it may be replayed."""
        if not isinstance(engine, Engine) or not repeatable(engine, call):
            return
        structure, given = flatten(x)[1], None if state is None else flatten(state)
        if given is None and not any(k.start is call.start and k.watch is None for k in rnn._understood.values()):
            return  # the start state may be another each time
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[_key(call.leaves, structure, given)] = Replay(rnn, call, engine, given is not None)


def _key(leaves: Sequence[Tensor], structure: Structure, given: tuple[list[Tensor], Structure] | None) -> Any:
    if given is None and structure is LEAF:
        return leaves[0].shape
    return (structure, *[v.shape for v in leaves], None if given is None else (given[1], *[s.shape for s in given[0]]))


def repeatable(engine: Engine, call: Call) -> bool:
    """Whether calls of this kind are simple enough, and runs of this shape have become routine."""
    plan, (batch, steps) = engine.plan, call.leaves[0].shape[:2]
    simple = not (plan.stages or plan.draws or plan.frozen or plan.twins or plan.step) and all(k[0] == "attr" for k in plan.weights.inputs)
    simple = simple and plan.given is None  # integers are looked at in every call
    flat = all(len(s.shape) == 1 and s.dtype == plan.dtype for s in plan.states) and not any(s.is_complex() for s in call.start)
    at_once = not engine.row_bytes or count(batch, steps, engine.row_bytes) == 1
    usual = autocast("cpu") is None and not modes()
    return simple and flat and at_once and usual and engine.routines.ready("forward", batch, steps) is not None


def _copied(own: dict[str, Any]) -> dict[str, Any]:
    """What a module holds, and the tables in it."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in own.items()}


class Replay:
    """One such call."""

    def __init__(self, rnn: Any, call: Call, engine: Engine, given: bool) -> None:
        plan, (batch, steps) = engine.plan, call.leaves[0].shape[:2]
        self.engine, self.convention, self.start = engine, call.convention, [] if given else call.start
        self.batch, self.steps = batch, steps
        row = None if given else whole(call.start).contiguous()
        # What it starts from, if that is always the same memory, and not a copy.
        self.row = row if row is not None and row.data_ptr() == call.start[0].data_ptr() and len(call.start) == 1 else None
        self.made = rnn._made
        # What modules hold is compared as a whole, which is quick where it is the very same.
        self.held = [(m, type(m), _copied(m.__dict__)) for m in self.made.modules]
        self.dtypes, self.home = [t.dtype for t in (*call.leaves, *call.start)], call.leaves[0].device.type
        self.counts = len(call.start), len(plan.core.stream_sizes)
        # Where a module has it among its parameters or buffers a tensor is looked up there, else as it was found.
        own = {id(t): functools.partial(table.get, name) for table, name, t in places(self.made.modules)}
        self.attributes = [(name, own.get(id(t := get()), get), t.shape, t.dtype) for name, get in plan.attributes.items()]
        self.weights = [key[1] for key in plan.weights.inputs]
        x, sizes = call.leaves, plan.core.stream_sizes
        self.direct = [
            d for d, n in zip(plan.direct, sizes, strict=True) if d is not None and x[d].shape[2:] == (n,) and x[d].dtype == plan.dtype
        ]  # fmt: skip
        self.reads = plan.readout is not None and any(k[0] == "param" for k in plan.readout.inputs)  # weights that the core reads too
        self.simple = len(self.direct) == len(plan.direct) and plan.readout is None  # nothing for torch to do

    def run(self, rnn: Any, x: list[Tensor], start: Sequence[Tensor]) -> tuple[Any, Any] | None:
        """The call's answer, or None where it has to go another way."""
        engine = self.engine
        routine = engine.routines.ready("forward", self.batch, self.steps)
        if routine is None or (now := self._as_it_was(rnn, x, start)) is None:
            return None
        plan, weights = engine.plan, [now[name] for name in self.weights]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (*x, *start, *now.values()))
        if learns and plan.own_gradient:
            return None
        rnn.__dict__["_last"] = engine
        values = None if self.simple else Values(x, now.__getitem__)
        streams = [unit(x[d]) for d in self.direct] if values is None else streams_of(plan, values)
        made: Sequence[Tensor] = ()
        if learns or self.reads:
            made = plan.weights.run(*weights)
        if learns:  # the recurrence, and not only what is made of its states
            params = [w if w.dtype == plan.dtype else w.to(plan.dtype) for w in made]
            learns = any(t.requires_grad for t in (*start, *streams, *params))
        if learns:
            engine.begin_backward(start[0].device)
            results = Solve.apply(engine, self.steps, self.counts, *start, *streams, *params)
            states, last = list(results[: len(start)]), list(results[len(start) :])
        else:
            kernel: Any = engine.kernels["forward"][1]
            params, streams = kernel.prepare(self._params(weights), streams)
            row = self.row if self.row is not None else whole(start).contiguous()
            states = [room(s, self.batch, self.steps, s.shape[1]) for s in start]
            begin = time.perf_counter()
            end, gap = swept(kernel, routine, row, streams, params, states)
            if not engine.went("forward", routine, gap, self.batch, time.perf_counter() - begin):
                return None
            last = list(parts(end, start))
        if values is None:
            return self.convention.unflatten(states, last)
        if self.reads:
            values |= {("param", i): w for i, w in enumerate(made)}
        return self.convention.unflatten(read(plan, values, states, start), last)

    def _as_it_was(self, rnn: Any, x: Sequence[Tensor], start: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """The tensors that the cell uses, by name; None if anything that decides about the call is not as it was."""
        if surrounded(self.home):
            return None
        for t, dtype in zip((*x, *start), self.dtypes, strict=True):
            if type(t) not in PLAIN or t.dtype is not dtype or not t.is_cpu or t.is_neg():
                return None
        try:
            for m, kind, was in self.held:
                if type(m) is not kind or m.__dict__ != was:
                    return None
        except Exception:  # of whatever is another object now, which need not be one that can be compared
            return None
        if rnn._made is not self.made or not self.made.same_outside():
            return None
        now: dict[str, Any] = {}
        for name, get, shape, dtype in self.attributes:
            here: Any = get()
            if type(here) not in PLAIN or here.shape != shape or here.dtype is not dtype or not here.is_cpu or here.is_neg():
                return None
            now[name] = here
        return now

    def _params(self, now: list[Tensor]) -> Prepared:
        """The weights as the kernel is given them."""
        engine, kept = self.engine, self.engine.kept
        if kept is None or not kept.still(now):
            keep, plan = worth_keeping(now), engine.plan
            weights = [w.to(plan.dtype, copy=keep) for w in plan.weights.run(*now)]  # what is kept must not be memory of the user's
            kernel: Any = engine.kernels["forward"][1]
            made: Prepared = kernel.prepare(weights, ())[0]
            engine.kept = Kept(now, made) if keep else None
            return made
        return kept.made
