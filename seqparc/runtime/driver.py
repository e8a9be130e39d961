"""Multiple shooting: one driver for forward and backward, for one chunk (sequential) and for chunks of one step (DEER).

Time is cut into chunks; the unknowns are the chunks' start states S_c. One pass runs every chunk from its start state to
its end state E_c with the non-linear cell; the update sets S_{c+1} = E_c (Picard), or adds A_c (S'_c - S_c) to it, where
A_c is the Jacobian of the chunk (Newton). When no start state moves, the outputs satisfy the recurrence everywhere; the
largest move is the *gap*. Chunks whose start did not move are not run again. After p passes the first p chunks are exact,
so the sequential kernel can finish from there at any time, and does when the passes do not pay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from seqparc.errors import ConvergenceError
from seqparc.runtime.budget import TRUST, Budget, Tally
from seqparc.spans import LATELY, Spans, span

#: Times the tolerance at which a gap counts as near: Newton's last step took it there, and the next would only stir the rounding.
NEAR = 64
#: Times by which Newton's steps make the gap smaller as long as there is more than rounding in it.
FAST = 4
#: A gap that falls this many times less than it did is no longer that of a state which is being forgotten.
LESS = 2
#: A pass that makes the gap this many times smaller is one of a run that converges.
SURE = 3
#: Steps of the sequential kernel at one go.
PIECE = 1 << 16
#: The first run of a shape begins with this part of its steps, if it is to be known how long they take.
FIRST = 32
#: Until there is one, passes may cost what the budget says, and another update is tried if so many of its passes may.
TRIED = 2


class Kernel(Protocol):
    """Something that runs chunks of a lane program; `source` is its text."""

    @property
    def source(self) -> str: ...

    @property
    def chunk_per_warmup(self) -> int:
        """A chunk is at least this many warm-ups long: what a longer one saves where the device is full, it costs where it is not."""

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """Chunks of a batch that fill the device, at least 1; `threads` are those that kernels on a processor run on."""

    def pace(self, chunks: int, batch: int, threads: int) -> float:
        """How long a step of so many chunks takes, times that of one."""

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and streams as `sweep` wants them, once per run. Streams may come in 16 bits."""

    def sweep(
        self, spans: Spans, start: Tensor, streams: Sequence[Tensor], params: Sequence[Tensor], emits: Sequence[Tensor | None],
        sums: Sequence[Tensor | None], backwards: bool, reached: Tensor | None = None, sizes: Tensor | None = None, fade: float = LATELY,
    ) -> Tensor:  # fmt: skip
        """Run every chunk over its span from its start state; returns the end states.

        start, end [chunks, batch, state numbers], or start [batch, state numbers] for all chunks; streams and emits [batch, time,
        numbers] with a unit last stride, written in place; sums [chunks, batch, numbers], in double, overwritten. A None is not written.
        `backwards`: step t is the tensors' step time - 1 - t. The steps that lead up to a chunk write nothing but the states they
        reach, `reached`. `sizes`, like end: how large each state number was lately, the largest of |s| k steps ago · fade**k.
        """

    def scan(self, a: Tensor, r: Tensor, largest: bool) -> Tensor:
        """d_0 = r_0, d_c = r_c + a_{c-1} d_{c-1}; see `seqparc.scan.doubling`."""

    def gap(self, start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
        """How far the start states of chunks 1 … are from the end states of those before them: the largest of all, and [chunks - 1].

        In units of atol · most + rtol · size, where size is how large the number was lately, and most the largest size in this chunk and
        those before it; NaN is no way from NaN. A number that crosses zero is judged by what it was just before; one that has
        decayed from large values, as cotangents do, by what it is now, down to the fraction atol of what it was.
        """


@dataclass(frozen=True)
class Cut:
    """How a run is cut: chunk boundaries, warm-up steps, the update, and when to stop."""

    spans: Spans  # led up to by the warm-up
    updates: tuple[str, ...] = ("none",)  # the first is made until the gap falls too slowly, then the next
    atol: float = 0.0
    rtol: float = 0.0
    fill: float = 1  # chunks that run in the time of one
    slack: float = 1.0  # times rtol for a state that remembers long: more than a chunk, as where Jacobians are needed, or much of one
    fade: float = LATELY  # what is left of an earlier state after a step, as far as it is known
    floor: float = 0.0  # a gap up to this may be rounding, see `_is_rounding`
    max_passes: int | None = None
    on_divergence: str = "sequential"
    patient: bool = False  # the user asked for this cut: passes go on as long as the gap falls

    def spent(self, passes: int) -> bool:
        """Whether no more passes are allowed."""
        return self.max_passes is not None and passes >= self.max_passes


@dataclass
class Head:
    """The first steps of a run, done for good: how many, the seconds they took, the state after them, and their sums."""

    steps: int
    seconds: float
    state: Tensor
    sums: list[Tensor]


@dataclass
class Problem:
    """One recurrence: a kernel, its inputs and where its outputs go."""

    kernel: Kernel
    start: Tensor  # [batch, numbers]
    steps: int
    streams: Sequence[Tensor]
    params: Sequence[Tensor]
    emits: Sequence[Tensor | None]
    sum_sizes: Sequence[int] = ()
    backwards: bool = False
    group: int = 1  # state numbers of a lane, which meet
    #: update -> the kernel of the program that carries A as well, and [groups, n], where the numbers that A mixes lie in the flat state
    correction: Callable[[str], tuple[Kernel, np.ndarray]] | None = None
    head: Head | None = None  # what the sequential kernel has done of it


NOTHING = torch.empty(0)


@dataclass
class Outcome:
    end: Tensor
    sums: list[Tensor]  # [chunks, batch, numbers] each
    passes: int = 1
    gaps: list[float] = field(default_factory=list)
    converged: bool = True
    fallback: str | None = None
    update: str = "none"
    fade: float = LATELY  # what is left of an earlier state after a step, at most
    cost: float = 0.0  # of all passes, in steps of the sequential kernel: timed where its pace is known, else counted
    batch: int = 0
    seconds: float | None = None  # that the run took; None where it was only begun
    waste: float = 0.0  # what the run has cost beyond what the sequential kernel would have, in its steps
    cut_short: bool = False  # given up for what it cost by the clock, which by counted steps would have been little

    @property
    def gap(self) -> float:
        return self.gaps[-1] if self.gaps else 0.0

    def seen(self) -> Outcome:
        """With everything known."""
        return self

    def taken(self) -> tuple[Tensor, list[Tensor]]:
        """The last state and the sums, which what is kept of the run then no longer holds."""
        end, sums = self.end, self.sums
        self.end, self.sums = NOTHING, []
        return end, sums


def solve(p: Problem, cut: Cut, budget: Budget | None = None) -> Outcome:
    """Run a recurrence over all its steps; exact to the cut's tolerance, or finished by the sequential kernel.

    budget: what passes may cost; two fifths of the steps if none is given.
    """
    spans, chunks = cut.spans, len(cut.spans)
    if chunks == 1:
        return _whole(p, cut)
    tally = Tally(budget or Budget(TRUST * p.steps))
    params, streams = p.kernel.prepare(p.params, p.streams)
    sums = sums_of(p, chunks)

    def sweep(which: Spans, start: Tensor, sums: list[Tensor], reached: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run chunks, outputs and all: their end states, and how large the state was lately. `reached`: warm up first."""
        sizes = p.start.new_empty(len(which), *p.start.shape)
        end = p.kernel.sweep(which, start, streams, params, p.emits, sums, p.backwards, reached, sizes, outcome.fade)
        return end, sizes

    def cost(some: int, update: str) -> float:
        """Of a pass over some chunks, in steps of the sequential kernel: with an update, a pass of the state and its tangents as well."""
        tangents = {"none": -1, "diagonal": 1, "exact": p.group}[update]
        return spans.longest * max(1.0, some / cut.fill) * (tangents + 2)

    outcome = Outcome(p.start, sums, fade=cut.fade)
    active: Tensor | None = None  # the chunks to run, None for all
    start = p.start.new_empty(chunks, *p.start.shape)
    if spans.lead is None:
        start.copy_(p.start)
    updates = list(cut.updates)
    newton = _newton(p, updates.pop(0))
    since = 0  # passes before this update
    warm = spans.lead is not None
    if warm and newton is not None:  # whose Jacobians begin where the warm-up ends
        nothing = [None] * len(p.emits)
        p.kernel.sweep(spans.before, p.start, streams, params, nothing, [None] * len(sums), p.backwards, start)
        warm = False
    end = sizes = start  # until the first sweep
    near = measured = False
    rounding = NEAR * (cut.rtol or cut.atol)  # a gap in which there is little else
    while True:
        # Where close by the gap no longer falls fast, what is left is rounding, which Jacobians do not mend and plain passes do.
        gaps, begin = outcome.gaps, time.perf_counter()
        near = near or (len(gaps) > 1 and gaps[-1] <= rounding and gaps[-1] * FAST > gaps[-2])
        correct = None if near else newton
        if correct is not None:
            correct.run(cut, active, start)
        if active is None:
            (end, sizes), warm = sweep(spans, p.start, sums, start) if warm else sweep(spans.apart, start, sums), False
        else:
            at = active.to(start.device)
            part = [z.new_empty(len(at), *z.shape[1:]) for z in sums]
            for whole, new in zip((end, sizes, *sums), (*sweep(spans.pick(active), start.index_select(0, at), part), *part), strict=True):
                whole.index_copy_(0, at, new)
        scale, rtol = (sizes, cut.rtol) if newton is None else (newton.remembered(sizes), cut.rtol * cut.slack)
        largest, worst = p.kernel.gap(start, end, scale, cut.atol, rtol)
        outcome.gaps.append(largest * (rtol or cut.atol))
        outcome.passes = len(outcome.gaps)
        kind = "none" if correct is None else correct.kind
        tally.add(cost(chunks if active is None else len(active), kind), time.perf_counter() - begin)
        outcome.update = newton.kind if newton is not None else "none"
        # How fast the slowest numbers forget shows as long as there is more than rounding in the gap.
        if correct is None and len(gaps) - since > 1 and gaps[-2] > max(rounding, gaps[-1]) and (gaps[-1] > rounding or not measured):
            outcome.fade, measured = max(LATELY, (gaps[-1] / gaps[-2]) ** (1 / spans.longest)), True
        if not largest > 1 or _is_rounding(p.kernel, cut, outcome, start, end, sizes):
            break
        moved = torch.nonzero(worst > 1).view(-1)
        first_moved = int(moved[0])
        target = end
        if correct is not None:
            target = correct.update(start, end)
            again = p.kernel.gap(start, target, scale, cut.atol, rtol)[1]
            moved = torch.nonzero(torch.fmax(again, worst) > 1).view(-1)
        active = moved + 1
        start.index_copy_(0, active.to(start.device), target.index_select(0, moved.to(start.device)))
        tally.exact = int(spans.t0[first_moved + 1])
        following = cost(len(active), kind)
        why, dear = _give_up(p, cut, outcome, since, tally, following)
        if why is not None and updates and not cut.spent(outcome.passes):  # before giving up: what forgets less
            following, dear = TRIED * cost(chunks, updates[0]), not cut.patient
            if cut.patient or tally.affords(following):
                newton, why, active = _newton(p, updates.pop(0)), None, None
                since = outcome.passes
        if why is not None:
            outcome.converged, outcome.fallback = False, why
            outcome.cut_short = dear and tally.by_the_clock(following, TRUST * p.steps)
            outcome.cost, outcome.waste = tally.cost, tally.cost - tally.exact
            if cut.on_divergence == "raise":
                raise ConvergenceError(
                    f"the chunk start states still move by {outcome.gap:.3g} after {outcome.passes} passes ({why}). "
                    'Use Options(on_divergence="sequential") to let the sequential kernel finish.',
                    best=start,
                    gap=outcome.gap,
                )
            return _finish(p, cut, params, streams, outcome, first_moved + 1, end[first_moved])
    outcome.end = end.select(0, -1)
    outcome.cost, outcome.waste = tally.cost, tally.cost - p.steps
    return outcome


def _whole(p: Problem, cut: Cut) -> Outcome:
    """A run by the sequential kernel alone."""
    params, streams = p.kernel.prepare(p.params, p.streams)
    sums, head = sums_of(p, 1), p.head or Head(0, 0.0, p.start, [])
    outcome = Outcome(_alone(p, params, streams, head.steps, head.state, sums), sums, fade=cut.fade)
    for z, before in zip(sums, head.sums, strict=False):
        z += before
    return outcome


def begin(p: Problem) -> Head:
    """Run the first steps of a run sequentially."""
    params, streams = p.kernel.prepare(p.params, p.streams)
    sums, steps = sums_of(p, 1), max(1, p.steps // FIRST)
    before = time.perf_counter()
    state = p.kernel.sweep(span(0, steps), p.start[None], streams, params, p.emits, sums, p.backwards)[0]
    return Head(steps, time.perf_counter() - before, state, sums)


def sums_of(p: Problem, chunks: int) -> list[Tensor]:
    """Room for the sums of every chunk."""
    if not p.sum_sizes:
        return []
    dtype = p.start.dtype if p.start.device.type == "mps" else torch.float64  # which has no double
    return [p.start.new_empty(chunks, p.start.shape[0], n, dtype=dtype) for n in p.sum_sizes]


def _finish(
    p: Problem, cut: Cut, params: Sequence[Tensor], streams: Sequence[Tensor], outcome: Outcome, first: int, start: Tensor
) -> Outcome:
    """Run sequentially from chunk `first`, whose start state is the end of what is consistent before it."""
    tail = [z.new_empty(1, *z.shape[1:]) for z in outcome.sums]
    outcome.end = _alone(p, params, streams, int(cut.spans.t0[first]), start, tail)
    outcome.sums = [torch.cat((z[:first], rest)) for z, rest in zip(outcome.sums, tail, strict=True)]
    return outcome


def _alone(p: Problem, params: Sequence[Tensor], streams: Sequence[Tensor], t0: int, state: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """Run the steps from t0 on with the sequential kernel, in pieces, between which an interrupt is heard: the last state."""
    for begin in range(t0, p.steps, PIECE):
        part = sums if begin == t0 else [torch.empty_like(z) for z in sums]
        state = p.kernel.sweep(span(begin, min(PIECE, p.steps - begin)), state[None], streams, params, p.emits, part, p.backwards)[0]
        if begin != t0:
            for z, more in zip(sums, part, strict=True):
                z += more
    return state


def _give_up(p: Problem, cut: Cut, outcome: Outcome, since: int, tally: Tally, steps: float) -> tuple[str | None, bool]:
    """Why the sequential kernel should do the steps that are left, or None while passes that count so many steps are expected to pay;
    and whether it is for their cost alone.
    """
    if cut.spent(outcome.passes):
        return f"max_passes={cut.max_passes} reached", False
    gaps, left = outcome.gaps[since:], p.steps - tally.exact
    stays = f"the gap does not fall ({gaps[-1]:.3g} after {len(outcome.gaps)} passes)"
    if cut.patient:
        return (stays if len(gaps) >= 4 and not min(gaps[-3:]) < gaps[-4] else None), False  # also when it is not a number
    ratio = 1.0
    if len(gaps) >= 2 and gaps[-2] > 0:
        ratio = gaps[-1] / gaps[-2]
    elif not since and cut.spans.lead is not None:  # what the warm-up has left of a state it knew nothing of; a chunk is longer
        ratio = gaps[0] ** (cut.spans.longest / int(cut.spans.lead.max()))
    remaining: float = 1
    if ratio < 0.9:
        remaining = max(1.0, math.log((cut.rtol or cut.atol or 1e-300) / gaps[-1]) / math.log(ratio)) if ratio > 0 else 1
    elif len(gaps) >= 2:  # also when it is not a number
        remaining = math.inf if len(gaps) >= 3 else 2
    if math.isinf(remaining):
        return stays, False
    remaining = min(remaining, left / cut.spans.longest)  # each pass settles one more chunk, whatever else it does
    if remaining * steps > left:
        return f"{remaining:.0f} more passes expected, of about {steps:.0f} steps each, where {left} steps remain", False
    judged = len(gaps) >= 2 or (tally.budget.pace is not None and cut.spans.lead is not None)
    if judged and not ratio * SURE < 1 and not tally.affords(steps):
        cost = f"another pass would cost {tally.rate * steps:.0f} steps"
        return f"the gap hardly falls ({gaps[-1]:.3g} after {len(outcome.gaps)} passes), and {cost}", True
    return None, False


def _is_rounding(kernel: Kernel, cut: Cut, outcome: Outcome, start: Tensor, end: Tensor, sizes: Tensor) -> bool:
    """Whether what is left of the gap is rounding: small, falling no longer as it did, and within the tolerance of what each number has
    ever been. A number that is a sum which cancels holds the rounding of the terms.
    """
    gaps, left = outcome.gaps, outcome.fade**cut.spans.longest  # of an earlier state, after a chunk
    if not (len(gaps) > 1 and gaps[-1] <= cut.floor and gaps[-1] > max(1 / FAST, LESS * left) * gaps[-2]):
        return False
    return not kernel.gap(start, end, sizes, cut.rtol * cut.slack, 0.0)[0] > 1


def _newton(p: Problem, update: str) -> _Newton | None:
    return None if update == "none" or p.correction is None else _Newton(p, update)


class _Newton:
    """Chunk Jacobians and the update S'_{c+1} = E_c + A_c (S'_c - S_c); with "diagonal", every number is a group of its own."""

    def __init__(self, p: Problem, update: str) -> None:
        assert p.correction is not None
        self.p, self.kind = p, update
        self.kernel, place = p.correction(update)
        self.groups, self.n = place.shape
        self.place = torch.from_numpy(place.astype(np.int64)).to(p.start.device)
        self.params, self.streams = self.kernel.prepare(p.params, p.streams)
        self.a = NOTHING  # until the first run, which is of all chunks
        self.eye = torch.eye(self.n, dtype=p.start.dtype, device=p.start.device).expand(self.groups, self.n, self.n).reshape(-1)

    def run(self, cut: Cut, active: Tensor | None, start: Tensor) -> None:
        """Jacobians of some chunks, or of all, from their start states."""
        spans, at = (cut.spans.apart, None) if active is None else (cut.spans.pick(active), active.to(start.device))
        start = start if at is None else start.index_select(0, at)
        wide = torch.cat((start, self.eye.expand(*start.shape[:2], -1)), -1)
        nothing = [None] * len(self.p.emits)
        end = self.kernel.sweep(
            spans, wide, self.streams, self.params, nothing, [None] * len(self.p.sum_sizes), self.p.backwards
        )
        a = end[..., start.shape[-1] :].reshape(*start.shape[:2], self.groups, self.n, self.n)
        if at is None:
            self.a = a
        else:
            self.a.index_copy_(0, at, a)

    def update(self, start: Tensor, end: Tensor) -> Tensor:
        """End states corrected for the moves of the start states; where the correction overflows, as they are."""
        residual = (end[:-1] - start[1:])[..., self.place]  # [chunks - 1, batch, groups, n]
        move = self.kernel.scan(self.a[1:-1], residual, False)
        target = end.clone()
        target[:-1, ..., self.place] += move - residual
        return torch.where(target.isfinite(), target, end)


    def remembered(self, sizes: Tensor) -> Tensor:
        """How large the state was as far as it remembers: the rounding of a slow number is that of its past.

        Never more than it ever was: an unstable cell's Jacobians would excuse anything.
        """
        if self.a is NOTHING:
            return sizes
        far = sizes.clone()
        far[..., self.place] = self.kernel.scan(self.a[1:].abs(), sizes[..., self.place], True)
        return torch.fmax(torch.fmin(far, sizes.nan_to_num(0.0).cummax(0).values), sizes)
