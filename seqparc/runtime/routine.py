"""Runs that go as those before them went: nothing is decided anew, nothing is learnt, and what is left to do in Python is little.

Of a short run most is not its kernel. Once a shape has gone the same way a few times in a row, in one pass, the next runs go that way at
once, and only the gap is looked at. Now and then one is watched again, so that what changes is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqparc.plan import Choice
from seqparc.runtime.driver import PIECE, Cut, Outcome, Problem, sums_of
from seqparc.runtime.experience import Experience

#: Runs that go alike in a row before the next goes by routine, and runs after which one is watched again.
ALIKE, AGAIN = 4, 256
#: Shapes of an engine that are followed.
MOST = 256
#: Ways in which the tensors of a shape lie that are remembered.
WAYS = 8


@dataclass
class Routine:
    """The way of one shape: why, and how it is cut."""

    choice: Choice
    cut: Cut
    alike: int = 0  # runs that have gone this way in a row
    left: int = 0  # runs that may go this way before one is watched
    patience: int = 0  # where runs are sequential and count towards a retry: how many all lengths that share what is known may make
    sweeps: dict[Any, Any] = field(default_factory=dict)  # by how the tensors lie, ready to be run on others

    @property
    def repeatable(self) -> bool:
        """Whether one pass is all there is to it: chunks that a warm-up leads up to, or steps that are run at one go."""
        spans = self.cut.spans
        return spans.lead is not None or (len(spans) == 1 and spans.steps <= PIECE)

    def saw(self, steps: int, outcome: Outcome, known: Experience | None) -> None:
        """A run that was watched went this way."""
        choice = self.choice
        simple = outcome.converged and outcome.passes == 1 and outcome.update == "none" and self.repeatable
        # A sequential run may be but one of those that passes are compared with, or the last before a trial, or those are saved up for.
        open_yet = choice.given_up and (known is None or known.undecided(steps) or known.due(steps))
        self.alike = self.alike + 1 if simple and not open_yet else 0
        if self.alike >= ALIKE:
            self.left, self.patience = AGAIN, 0
            if choice.given_up and known and not known.account.waits(steps):
                self.left, self.patience = min(AGAIN, known.before_retry(steps)), known.patience


def once(p: Problem, routine: Routine) -> tuple[Tensor, list[Tensor], float]:
    """One pass over chunks that the cut's warm-up leads up to, or one over all steps: the last state, the sums, and the gap in units of the
    tolerance. Up to one it is the whole run.
    """
    params, streams = p.kernel.prepare(p.params, p.streams)
    start, sums = p.start if p.start.is_contiguous() else p.start.contiguous(), sums_of(p, len(routine.cut.spans))
    end, gap = swept(p.kernel, routine, start, streams, params, p.emits, sums, p.backwards)
    return end, sums, gap


def swept(
    kernel: Any, routine: Routine, start: Tensor, streams: Sequence[Tensor], params: Sequence[Tensor], emits: Sequence[Tensor | None],
    sums: Sequence[Tensor] = (), backwards: bool = False,
) -> tuple[Tensor, float]:  # fmt: skip
    """`once`, of what is prepared, by a kernel in C: others have no routines. The last state and the gap."""
    cut, shape = routine.cut, start.shape
    lie = (*[x.stride() for x in streams], *[None if y is None else y.stride() for y in emits])
    sweep = routine.sweeps.get(lie)
    if sweep is None:
        if len(routine.sweeps) >= WAYS:
            routine.sweeps.clear()
        sweep = routine.sweeps[lie] = kernel.again(cut.spans, start, streams, params, emits, sums, backwards, cut.fade)
    if routine.choice.chunks == 1:
        end = start.new_empty(shape)
        sweep.run(start, streams, params, emits, sums, end)
        return end, 0.0
    chunks = len(cut.spans)
    end, reached, sizes = start.new_empty(chunks, *shape), start.new_empty(chunks, *shape), start.new_empty(chunks, *shape)
    sweep.run(start, streams, params, emits, sums, end, reached, sizes)
    return end[chunks - 1], kernel.gap(reached, end, sizes, cut.atol, cut.rtol)[0]


class Routines:
    """Those of one engine: by kernel, batch, steps and threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], Routine] = {}

    def ready(self, key: str, batch: int, steps: int) -> Routine | None:
        """By which the next run of a shape may go; None if it is to be watched."""
        found = self._known.get((key, batch, steps, torch.get_num_threads()))
        return found if found is not None and found.left > 0 else None

    def follow(self, key: str, batch: int, steps: int, choice: Choice, cut: Cut, outcome: Outcome, known: Experience | None) -> None:
        """Learn from a run that was watched whether its shape has become routine."""
        at = key, batch, steps, torch.get_num_threads()
        found = self._known.get(at)
        if found is None or found.cut is not cut:
            if len(self._known) >= MOST:
                self._known.clear()
            found = self._known[at] = Routine(choice, cut)
        found.saw(steps, outcome, known)
