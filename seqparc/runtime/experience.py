"""What earlier runs of a shape have taught."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from seqparc.runtime.driver import Outcome

#: A longer warm-up is worth having if it makes the first gap this many times smaller.
WORTH = 4
#: Or if all passes together take this many times fewer steps.
CHEAPER = 1.1
#: A gap that a longer warm-up does not make smaller is rounding if it is at most this many units, and is then taken for converged.
FLOOR = 64
#: Calls after which a shape that was better run sequentially is tried again.
RETRY = 100

#: Direction, batch, and how many bits the number of steps has: what experience is shared by.
Shape = tuple[str, int, int]


@dataclass
class Experience:
    """What earlier runs of one shape and direction have taught: the warm-up, whether a longer one would help, and the passes it takes.

    floor: the gap that rounding leaves, 0 if not known. Two start states far apart, those of half and of the whole warm-up, end as
    far from the truth as each other; what they have in common is not where they began.
    """

    warmup: int
    gap: float  # after the first pass, with half the warm-up
    settled: bool = False
    passes: float = 1
    cost: float = math.inf  # in steps of a pass, with half the warm-up
    floor: float = 0.0
    calls: int = 0
    why: str | None = None  # the last run did not converge

    def learn(self, outcome: Outcome, warmup: int, length: int, most: float) -> None:
        """From a run of more than one pass over chunks of `length` steps. `most`: the largest floor that is believed."""
        passes, self.why = outcome.passes if outcome.converged else math.inf, outcome.fallback
        cost = passes * length + warmup
        if self.settled:
            self.passes = passes
        elif outcome.gaps[0] * WORTH <= self.gap or cost * CHEAPER <= min(self.cost, sys.float_info.max):
            self.warmup, self.gap, self.cost = max(1, warmup) * 2, outcome.gaps[0], cost
        else:
            self.warmup, self.settled = max(1, warmup) // 2, True
            if not outcome.converged:  # neither of two warm-ups does
                self.passes = passes
            floor = max(self.gap, outcome.gaps[0])
            self.floor = min(2 * floor, most) if floor <= most else 0.0
