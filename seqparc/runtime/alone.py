"""Runs that nobody watches: on a GPU the host need not know how far the passes are, as long as the card finishes what they leave.

Waiting for the gap costs a call its overlap with the next, and nothing that waits can be part of a CUDA graph. So once runs of a
shape have converged under the host's eyes, the next are enqueued whole: the passes it took, each followed by a kernel that marks
what moved, and last the sequential kernel over what is still marked, mostly nothing. The result is as exact either way; what it took
is read when somebody asks, or at a later call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqparc.runtime.driver import Cut, Outcome, Problem, sums_of

#: Passes that are enqueued unseen; cells that take more are watched.
MOST_PASSES = 3


@dataclass
class Unseen(Outcome):
    """An outcome that still lies on the device."""

    tolerance: float = 0.0
    worst: Tensor | None = None  # the largest gap after each pass, in tolerances
    marks: Tensor | None = None  # [passes, 1 + chunks, batch]; the last row 0: chunks of each sample that the sequential kernel finished
    done: Any = field(default=None, repr=False)  # a CUDA event; none in a CUDA graph

    def ready(self) -> bool:
        return self.done is None or self.done.query()

    def seen(self) -> Outcome:
        """The same with its figures; waits for the device."""
        if self.worst is not None and self.marks is not None:
            worst, left = self.worst.tolist(), int(self.marks[-1, 0].max())
            self.passes = next((k + 1 for k, w in enumerate(worst) if w <= 1), len(worst))
            self.gaps = [w * self.tolerance for w in worst[: self.passes]]
            self.converged = left == 0
            self.fallback = None if self.converged else f"the last {left} chunks of a sample had not settled after {self.passes} passes"
            if self.done is not None or not self.worst.is_cuda:  # else a graph's, whose next replay has other figures
                self.worst = self.marks = None
        return self


def solve_alone(p: Problem, cut: Cut, passes: int) -> Unseen:
    """Like `seqparc.runtime.driver.solve`, without waiting for anything."""
    kernel: Any = p.kernel
    sums = sums_of(p, len(cut.spans))
    start = p.start if p.start.is_contiguous() else p.start.contiguous()
    params, streams = kernel.prepare(p.params, p.streams)
    end, worst, marks = kernel.alone(
        cut.spans, start, streams, params, p.emits, sums, p.backwards, passes, cut.atol, cut.rtol, cut.fade
    )  # fmt: skip
    outcome = Unseen(end, sums, tolerance=cut.rtol or cut.atol, worst=worst, marks=marks)
    if start.is_cuda and not torch.cuda.is_current_stream_capturing():
        outcome.done = torch.cuda.Event()
        outcome.done.record()
    return outcome
