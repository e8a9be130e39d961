"""How fast a cell forgets what its state was: what decides whether it can be run in parallel over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqparc.convention import Convention
from seqparc.held import untouched

#: A change of the state of this relative size is followed …
CHANGE = 1e-3
#: … over so many steps, until it is this many times smaller.
STEPS, GONE = 1024, 1e-3


@dataclass(frozen=True)
class Forgetting:
    """What becomes of a small change of the start state.

    steps  after which it is a thousand times smaller for good; None if that did not happen
    rate   of the logarithm of its size per step, a finite-time Lyapunov exponent: negative where it shrinks, positive in chaos
    seen   steps that were looked at
    """

    steps: int | None
    rate: float
    seen: int

    def lines(self) -> tuple[str, ...]:
        """In words, with what follows from it."""
        per = f"{self.rate:+.2g} a step in its logarithm"
        if self.steps is not None:
            return (
                f"a small change of the state is a thousand times smaller after {self.steps} steps ({per})",
                f"so the cell parallelises where a sequence is much longer than that; chunks are led up to by about {2 * self.steps} steps",
            )
        if self.rate * self.seen > math.log(10):
            return (
                f"a small change of the state grows, {per} over {self.seen} steps: the cell is chaotic or unstable on this input",
                "so no part of the sequence can be known before what comes before it: it runs sequentially, and a larger batch is what "
                "fills the machine",
            )
        return (
            f"a small change of the state is still there after {self.seen} steps ({per})",
            "so chunks need Jacobians, which are exact for cells that are linear in the state and pay for small or diagonal ones; "
            "a larger batch, or a cell that forgets faster (a smaller forget bias, a leak), would help",
        )


def forgetting(cell: Any, convention: Convention, x: Sequence[Tensor], start: Sequence[Tensor]) -> Forgetting:
    """Follow a small change of the start state through the plain loop: x leaves [batch, time, ...], start leaves [batch, ...].

    Rosenstein, Collins & De Luca 1993 estimate the largest Lyapunov exponent so, from two trajectories that begin close together.
    """
    seen = min(STEPS, x[0].shape[1])
    batch, generator, moved = len(start[0]), torch.Generator().manual_seed(0), []
    for s in start:
        change = torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s.device)
        moved.append(s + (CHANGE * (1 + s.abs()) * change).to(s.dtype) if s.is_floating_point() or s.is_complex() else s)
    now = [torch.cat(pair) for pair in zip(start, moved, strict=True)]
    steps = zip(*(torch.cat([v[:, :seen]] * 2).unbind(1) for v in x), strict=True)
    sizes = [_apart(now, batch)]
    with torch.no_grad(), untouched(cell, x):
        for x_t in steps:
            now = convention.call(cell, list(x_t), now)[1]
            sizes.append(_apart(now, batch))
    size = torch.stack(sizes, 1)
    ratio = (size[:, 1:] / size[:, :1].clamp_min(1e-300)).amax(0).nan_to_num(math.inf)  # of the sample that forgets least
    large = torch.nonzero(ratio > GONE)
    last = int(large.max()) + 1 if len(large) else 0
    if last < seen:
        return Forgetting(last + 1, math.log(GONE) / (last + 1), seen)
    grown = int((ratio >= ratio[ratio.isfinite()].amax() / 2).nonzero()[0]) + 1 if ratio.isfinite().any() else 1  # before it saturates
    at = grown if ratio[grown - 1] > 10 else seen
    return Forgetting(None, math.log(max(float(ratio[at - 1].clamp(max=1e300)), 1e-300)) / at, seen)


def _apart(state: Sequence[Tensor], batch: int) -> Tensor:
    """[batch]: how far the second half of a batch is from the first."""
    far = [torch.linalg.vector_norm((s[batch:] - s[:batch]).flatten(1), dim=1) for s in state if s.is_floating_point() or s.is_complex()]
    return torch.stack([f.double() for f in far]).norm(dim=0)
