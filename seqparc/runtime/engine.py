"""A plan with its kernels: runs the recurrence forward and its adjoint backward, as one autograd function."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqparc.errors import SeqparcWarning, ToolchainError
from seqparc.ir import Program
from seqparc.kept import Kept
from seqparc.locks import Lock
from seqparc.options import Options
from seqparc.plan import Choice, History, Plan, Stats, combined
from seqparc.runtime.alone import MOST_PASSES, Unseen, solve_alone
from seqparc.runtime.budget import Account
from seqparc.runtime.cuts import Cuts
from seqparc.runtime.driver import NOTHING, Cut, Kernel, Outcome, Problem, begin, solve
from seqparc.runtime.experience import FLOOR, RETRY, Experience, Shape
from seqparc.runtime.making import Begun, uncollected
from seqparc.runtime.opaque import OpaqueKernel
from seqparc.runtime.pages import room
from seqparc.runtime.routine import Routine, Routines, once
from seqparc.runtime.slabs import row_bytes
from seqparc.runtime.tuning import Tuner
from seqparc.runtime.weights import Places, of_params

#: Of so many runs that nobody watched one is looked at afterwards.
LOOK = 16

#: Of a shape that nothing is known about.
UNKNOWN = Experience()

_cuda = functools.cache(torch.cuda.is_available)  # slow to ask, and asked at every call
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_listing = Lock()

MakeKernel = Callable[[Program, torch.dtype, torch.device], Kernel]


def engines() -> list[Engine]:
    """All that are there."""
    with _listing():
        return list(_engines)


class Engine:
    """Kernels of one plan on one backend, made when first needed."""

    def __init__(self, plan: Plan, backends: Sequence[tuple[str, MakeKernel]], options: Options, choose: Callable[..., Any]) -> None:
        if plan.step is not None:
            backends, options = [("torch", functools.partial(OpaqueKernel, plan.step))], replace(options, update="none")
        self.plan, self.options = plan, options
        self.backends = list(backends)
        self.offered = tuple(name for name, _ in backends)
        self.kernels: dict[str, tuple[str, Kernel]] = {}
        self.experience: dict[Shape, Experience] = {}
        self.cuts = Cuts(plan, options, choose)
        self._begun: dict[str, tuple[str, Begun[Kernel]]] = {}
        self._making, self._learning = Lock(), Lock()  # kernels; from runs
        self.last: dict[str, tuple[str, Choice, Cut, Outcome]] = {}  # by direction: what the last call did
        self.sure: dict[Shape, tuple[Cut, int, Outcome]] = {}  # shapes that converge, by which cut and in how many passes
        self.unwatched = 0
        self.routines = Routines()
        self.kept: Kept | None = None  # the weights as they were in the last call that was replayed, and as its kernel was given them
        self.history = {"forward": History(), "backward": History()}
        self.converged: set[Shape] = set()  # shapes that did in chunks, once at least
        self.name = "the cell"
        self.warned = False  # that it has become sequential
        self.changed: Callable[[], bool] = lambda: False  # whether the cell is another than the one that was traced
        self.tuner = Tuner(options)
        self._places = Places()
        self.own: Stats | None = None  # of the adjoint that a cell brings itself
        self.told: Stats | None = None  # of a call in slabs
        self.compile_seconds = plan.compile_seconds
        self.stages = [None if s.plan is None else Engine(s.plan, backends, options, choose) for s in plan.stages]
        with _listing():
            _engines.add(self)

    @functools.cached_property
    def row_bytes(self) -> int:
        """See `seqparc.runtime.slabs`."""
        return row_bytes(self.plan)

    @property
    def parts(self) -> list[tuple[str, Engine]]:
        """The engines that do the work, each with what its kernels' names end in."""
        inner = [e for e in self.stages if e is not None]
        return [(f" {k}" if k > 1 else "", e) for k, e in enumerate(inner, 1)] if self.stages else [("", self)]

    def kernel(self, direction: str, program: Program, device: torch.device) -> tuple[str, Kernel]:
        """The kernel of a program on the first backend that takes it; said once if that is not the first."""
        with self._making():  # whoever comes second waits
            if direction not in self.kernels:
                self.kernels[direction] = self._make(direction, program, device)
            return self.kernels[direction]

    def _make(self, direction: str, program: Program, device: torch.device) -> tuple[str, Kernel]:
        begin = time.perf_counter()
        try:
            while True:
                name, make = self.backends[0]
                by, begun = self._begun.pop(direction, ("", None))
                try:
                    with uncollected():
                        return name, (begun.result() if begun and by == name else None) or make(program, self.plan.dtype, device)
                except (ToolchainError, ValueError) as error:
                    if len(self.backends) == 1:
                        raise
                    self.backends.pop(0)
                    message = f"the {name} backend cannot run this cell and hands it to {self.backends[0][0]}: {error}"
                    self.plan.notes.append(message)
                    warnings.warn(message, SeqparcWarning, stacklevel=2)
        finally:
            self.compile_seconds += time.perf_counter() - begin

    @functools.cached_property
    def stored(self) -> Any:
        """The programs of save="store" (`seqparc.passes.stored.Stored`); None where backward recomputes."""
        return self.plan.stored() if self.options.save == "store" else None

    def begin_backward(self, device: torch.device) -> None:
        """Make the backward kernel beside whatever comes next."""
        key = "backward" if self.stored is None else "backward stored"
        if key not in self.kernels and key not in self._begun:
            name, make = self.backends[0]
            adjoint = self.plan.adjoint if self.stored is None else lambda: self.stored.adjoint
            self._begun[key] = name, Begun(lambda: make(adjoint().program, self.plan.dtype, device))

    def _decide(self, direction: str, kernel: Kernel, batch: int, steps: int, watched: bool = True) -> tuple[Choice, Cut, Shape]:
        """How to run, the cut that follows from it, and the key that a better warm-up is remembered under; see `Cuts`."""
        shape = direction, batch, steps.bit_length()
        known = self.experience.get(shape, UNKNOWN)
        choice, cut = self.cuts.decide(direction, kernel, batch, steps, known, watched)
        if known.why and choice.given_up and shape in self.converged and not self.warned:
            self.warned = True
            message = (
                f"{self.name} has become sequential: its {direction} runs of {steps} steps used to converge in parallel and no longer "
                f"do ({known.why}). Results are exact as before; it is tried again every {RETRY} calls. "
                "rnn.stats.history has counts, rnn.explain(x) says how far the cell remembers."
            )
            warnings.warn(message, SeqparcWarning, stacklevel=2)
        return choice, cut, shape

    def correction(self, key: str, device: torch.device, update: str) -> tuple[Kernel, np.ndarray]:
        """See `seqparc.runtime.driver.Problem`."""
        begin = time.perf_counter()
        program = self.plan.jacobian(key, update)
        self.compile_seconds += time.perf_counter() - begin
        made = self.kernel(f"{key} {update}", program, device)[1]
        return made, self.plan.place if update == "exact" else self.plan.place.reshape(-1, 1)

    def solve(
        self, direction: str, program: Program, start: Tensor, steps: int, stored: bool = False, **problem: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one recurrence: decide, cut, solve, remember. The last state [batch, numbers] and the sums [chunks, batch, numbers]."""
        key = f"{direction} stored" if stored else direction
        start, batch = start.resolve_neg(), start.shape[0]
        problem["streams"], problem["params"] = ([t.resolve_neg() for t in problem[name]] for name in ("streams", "params"))
        if not batch:  # an empty one
            self.last.pop(direction, None)
            return start.clone(), [start.new_zeros(1, 0, n) for n in problem.get("sum_sizes", ())]
        name, kernel = self.kernels.get(key) or self.kernel(key, program, start.device)
        if (done := self.by_routine(key, start, steps, **problem)) is not None:
            return done
        alike = self.tuner.adopt(kernel, direction, start.shape[0], steps) if hasattr(kernel, "settings") else None
        choice, cut, shape = self._decide(direction, kernel, start.shape[0], steps)
        correction = functools.partial(self.correction, key, start.device)
        p = Problem(kernel=kernel, start=start, steps=steps, correction=correction, group=self.plan.program.n, **problem)
        if self.by_the_clock and name == "c" and len(cut.spans) > 1 and shape not in self.experience:
            p.head = begin(p)
            with self._learning():
                opened = Account.opened(p.head.seconds, p.head.steps, cut)
                self.experience.setdefault(shape, Experience(choice.warmup or None, account=opened))
            choice, cut, shape = self._decide(direction, kernel, start.shape[0], steps)
        passes = self._unwatched(shape, cut) if hasattr(kernel, "alone") else 0
        if self.capturing() and not passes and len(cut.spans) > 1:
            choice, cut, shape = self._decide(direction, kernel, start.shape[0], steps, watched=False)
        if passes:
            outcome: Outcome = solve_alone(p, cut, passes)
            if not self.capturing():  # a graph's figures are those of its last replay, and teach nothing
                self.history[direction].calls += 1
                self.sure[shape] = cut, passes, outcome
                if alike is not None and self.tuner.searching:

                    def run() -> bool:
                        now = self._decide(direction, kernel, start.shape[0], steps)[1]
                        return len(now.spans) > 1 and solve_alone(p, now, passes).seen().converged

                    self.tuner.search(kernel, alike, run)
        else:
            outcome = self._watched(p, shape, choice, cut)
            if name == "c":
                self.routines.follow(key, batch, steps, choice, cut, outcome, self.experience.get(shape))
        self.last[direction] = name, choice, cut, outcome
        return outcome.taken()

    def by_routine(self, key: str, start: Tensor, steps: int, **problem: Any) -> tuple[Tensor, list[Tensor]] | None:
        """`solve` for a shape that has become routine; None where it has not, or where this run is another."""
        batch, direction = start.shape[0], key.partition(" ")[0]
        routine = self.routines.ready(key, batch, steps)
        if routine is None:
            return None
        begin = time.perf_counter()
        end, sums, gap = once(Problem(kernel=self.kernels[key][1], start=start, steps=steps, **problem), routine)
        return (end, sums) if self.went(direction, routine, gap, batch, time.perf_counter() - begin) else None

    def went(self, direction: str, routine: Routine, gap: float, batch: int, seconds: float) -> bool:
        """Whether a pass by routine, which ended with this gap in units of the tolerance, was the run; it is then entered as that."""
        choice, cut = routine.choice, routine.cut
        if gap > 1:
            routine.left = routine.alike = 0
            return False
        routine.left -= 1
        if routine.patience:
            known = self.experience.get((direction, batch, cut.spans.steps.bit_length()))
            if known is not None and known.calls + 1 < routine.patience:
                known.calls += 1
            else:  # other lengths have counted too: the next run is watched, and the one after which it is tried again
                routine.left = 0
        gap *= cut.rtol or cut.atol
        if direction == "forward":
            self.last.pop("backward", None)
            self.own = self.told = None
        gaps = [gap] if choice.chunks > 1 else []
        self.last[direction] = "c", choice, cut, Outcome(NOTHING, [], gaps=gaps, fade=cut.fade, batch=batch, seconds=seconds)
        self.history[direction].add(1, gap, True, choice.given_up)
        return True

    @staticmethod
    def capturing() -> bool:
        """Whether a CUDA graph is being made, in which nothing can be waited for."""
        return _cuda() and torch.cuda.is_current_stream_capturing()

    @functools.cached_property
    def by_the_clock(self) -> bool:
        """Whether what passes may cost is judged by the clock: where they are this library's choice, and may differ from run to run."""
        asked = Options(backend=(o := self.options).backend, atol=o.atol, rtol=o.rtol, precision=o.precision, save=o.save, tune=o.tune)
        return o == asked

    def _unwatched(self, shape: Shape, cut: Cut) -> int:
        """Passes to enqueue without waiting for them, 0 to wait."""
        if self.options.on_divergence != "sequential" or len(cut.spans) == 1 or cut.updates[0] != "none":
            return 0
        before: Any
        known, passes, before = self.sure.get(shape, (None, min(MOST_PASSES, cut.max_passes or MOST_PASSES), None))
        if self.capturing():
            return passes
        if self.options.deterministic:  # watched and unwatched runs go on with other chunks, and so round differently
            return 0
        self.unwatched += 1
        # To look costs as much as a launch, so after the first runs it is done now and then.
        look = isinstance(before, Unseen) and (before.worst is None or self.unwatched < 4 or self.unwatched % LOOK == 0)
        if look and before.ready() and not before.seen().converged:
            self.history[shape[0]].fallbacks += 1
            self.sure.pop(shape, None)  # to be watched again, and learnt from
            return 0
        return passes if known is cut else 0

    def _watched(self, p: Problem, shape: Shape, choice: Choice, cut: Cut) -> Outcome:
        """Run with the gap read after every pass, and learn from it."""
        options = self.options
        begin = time.perf_counter()
        known = self.experience.get(shape)
        outcome = solve(p, cut, None if known is None else known.account.budget(p.steps))
        seconds = time.perf_counter() - begin + (p.head.seconds if p.head is not None and len(cut.spans) == 1 else 0.0)
        outcome.batch, outcome.seconds = p.start.shape[0], seconds if p.start.device.type == "cpu" else None
        with self._learning():
            if not options.deterministic and options.warmup is None:
                self._learn(p, shape, choice, cut, outcome, seconds)
            if outcome.converged and len(cut.spans) > 1:
                self.converged.add(shape)
            # What was taken for rounding is not seen from inside a run.
            if outcome.converged and outcome.update == "none" and outcome.passes <= MOST_PASSES and outcome.gap <= (cut.rtol or cut.atol):
                self.sure[shape] = cut, outcome.passes, outcome
            self.history[shape[0]].add(outcome.passes, outcome.gap, outcome.converged, choice.given_up)
        if outcome.fallback and options.on_divergence == "warn":
            message = f"the {shape[0]} run did not converge and was finished sequentially: {outcome.fallback}"
            warnings.warn(message, SeqparcWarning, stacklevel=2)
        return outcome

    @property
    def stats(self) -> Stats:
        """What the last call did, in words made only when asked for."""
        if self.told is not None:
            return self.told
        if self.stages:
            told = [e.stats for _, e in self.parts if e.last]
            whole = combined(told) if told else Stats()
            return replace(whole, compile_seconds=whole.compile_seconds + self.compile_seconds, backward=self.own or whole.backward)
        forward, backward = (self._told(direction) for direction in ("forward", "backward"))
        return Stats() if forward is None else replace(forward, backward=self.own or backward)

    def _told(self, direction: str) -> Stats | None:
        last = self.last.get(direction)
        if last is None:
            return None
        name, choice, cut, unseen = last
        outcome = unseen.seen()
        return Stats(
            backend=name, strategy=choice.strategy, chunks=choice.chunks, chunk_length=cut.spans.longest, warmup=choice.warmup,
            update=outcome.update, passes=outcome.passes, gap=outcome.gap, gaps=tuple(outcome.gaps), converged=outcome.converged,
            fallback=outcome.fallback, reasons=choice.reasons, compile_seconds=self.compile_seconds,
            batch=outcome.batch, steps=cut.spans.steps, seconds=outcome.seconds,
            history=replace(self.history[direction]),
        )  # fmt: skip

    def _learn(self, p: Problem, shape: Shape, choice: Choice, cut: Cut, outcome: Outcome, seconds: float) -> None:
        known = self.experience.get(shape)
        if choice.strategy == "sequential":
            if known is not None:
                known.timed(seconds, outcome, p.steps)
                forget = known.ran_alone(p.steps)
                known.account.settle(p.steps, outcome, seconds)
                if forget:
                    self.experience.pop(shape, None)
            return
        if self._decide(shape[0], p.kernel, p.start.shape[0], p.steps)[1] is not cut:
            return  # another thread's run has taught something since, and this one says nothing about that
        if known is not None:
            known.account.settle(p.steps, outcome, seconds)
            if outcome.cut_short:
                return  # of what it would have taken nothing is known
        several = choice.strategy == "shooting" and choice.updates != ("exact",) and (outcome.passes > 1 or not outcome.converged)
        clocked = self.options.strategy == "auto" and p.start.device.type == "cpu"  # elsewhere a run is only begun here
        if not several and not clocked:
            return
        if known is None:
            known = self.experience[shape] = Experience(choice.warmup or None)
        if several:
            known.learn(outcome, choice.warmup, cut.spans.longest, FLOOR * torch.finfo(self.plan.dtype).eps)
        if clocked and outcome.converged and (known.settled or outcome.passes == 1):
            known.timed(seconds, outcome, p.steps)

    # -- forward ---------------------------------------------------------------------------------------------------------

    def forward(
        self, start: Sequence[Tensor], streams: Sequence[Tensor], params: Sequence[Tensor], emits: Sequence[Tensor], steps: int,
        stored: bool = False,
    ) -> Tensor:  # fmt: skip
        """Write the states to `emits`, [batch, time, numbers] per slot; returns the last state.

        stored: the last of `emits` is for what backward is to read.
        """
        self.last.pop("backward", None)
        self.own = self.told = None
        program = self.stored.program if stored else self.plan.program
        return self.solve("forward", program, whole(start), steps, stored, streams=streams, params=params, emits=emits)[0]

    # -- backward --------------------------------------------------------------------------------------------------------

    def backward(
        self, before: Sequence[Tensor], streams: Sequence[Tensor], params: Sequence[Tensor], g_states: Sequence[Tensor], g_last: Tensor,
        groups: int = 0, stored: Sequence[Tensor] = (), wanted: tuple[bool, ...] | None = None,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Gradients of the start state (flat), the streams and the parameters (flat). `before`: the state before each step.

        groups: if given, those of the parameters are [groups, ...], of as many parts of the batch.
        stored: what forward wrote beside the states, if it did; wanted: which streams' gradients are, all if not given.
        """
        adjoint = self.stored.adjoint if stored else self.plan.adjoint()
        program = adjoint.program
        batch, steps = before[0].shape[:2]
        n_streams = len(streams)
        idle = adjoint.idle(wanted)
        emits: list[Tensor | None] = [
            None if not filled or k in idle else room(g_last, batch, steps, n) if filled == 1 else g_last.new_zeros(batch, steps, n)
            for k, (filled, n) in enumerate(zip(program.filled, program.emit_sizes, strict=True))
        ]
        read = [*streams, *before, *g_states, *stored]
        end, sums = self.solve(
            "backward", program, g_last, steps, bool(stored), streams=read, params=params, emits=emits, sum_sizes=program.sum_sizes,
            backwards=True,
        )  # fmt: skip
        g_streams: list[Tensor | None] = [None] * n_streams
        for e in adjoint.streams:
            out = emits[e.slot]
            if out is not None and not e.direct:
                wide = out.new_zeros(batch, steps, streams[e.target].shape[-1])
                out = wide.index_add_(-1, self._places(e.columns, out.device), out)
            g_streams[e.target] = out
        if not groups:
            return end, g_streams, of_params(adjoint, emits, sums, read, params, self._places)
        own = [
            of_params(adjoint, _group(emits, k, groups), _group(sums, k, groups, 1), _group(read, k, groups), params, self._places)
            for k in range(groups)
        ]
        return end, g_streams, [None if column[0] is None else torch.stack(list(column)) for column in zip(*own, strict=True)]


def _group(of: Sequence[Tensor | None], k: int, groups: int, axis: int = 0) -> list[Any]:
    """A part of the batch."""
    return [None if t is None else t.unflatten(axis, (groups, t.shape[axis] // groups)).select(axis, k) for t in of]


def whole(parts: Sequence[Tensor]) -> Tensor:
    """The state as one row per sample, from what it is per slot."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
