"""What earlier runs of a shape have taught."""

from __future__ import annotations

import math
import sys
from collections import deque
from dataclasses import dataclass, field

from seqparc.runtime.budget import Account
from seqparc.runtime.driver import Outcome
from seqparc.spans import LATELY

#: A longer warm-up is worth having if it makes the first gap this many times smaller.
WORTH = 4
#: Or if all passes together take this many times fewer steps.
CHEAPER = 1.1
#: A gap that a longer warm-up does not make smaller is rounding if it is at most this many units, and is then taken for converged.
FLOOR = 64
#: Calls after which a shape that was better run sequentially is tried again; where the clock said so SOON, then after twice as many each
#: time: the first runs in several threads may be slow because those have yet to be given their cores.
RETRY, SOON = 100, 8

#: Runs of which the fastest is compared with the fastest of as many sequential ones; one of those is enough if it takes FAR times as long,
#: and at least so many seconds, beside which it does not matter how warm threads were.
TIMED, FAR, COLD = 3, 2, 0.05
#: The comparison is worth making if a pass takes less than these seconds, much of which is its fixed cost, or if passes cost this part of
#: the steps that the sequential kernel does.
LIGHT, MANY = 1e-3, 0.15

#: Direction, batch, and how many bits the number of steps has: what experience is shared by.
Shape = tuple[str, int, int]


@dataclass
class Experience:
    """What earlier runs of one shape and direction have taught: the warm-up, whether a longer one would help, and the passes it takes.

    fade: what is left of an earlier state after a step, see `seqparc.runtime.driver.Outcome`.
    floor: the gap that rounding leaves, 0 if not known. Two start states far apart, those of half and of the whole warm-up, end as
    far from the truth as each other; what they have in common is not where they began.
    """

    warmup: int | None = None
    gap: float = math.inf  # after the first pass, with half the warm-up
    settled: bool = False
    passes: float = 1
    cost: float = math.inf  # in steps of a pass, with half the warm-up
    fade: float = LATELY
    floor: float = 0.0
    calls: int = 0
    why: str | None = None  # the last run did not converge
    account: Account = field(default_factory=Account)
    passing: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # seconds a step of the last runs in passes, once settled
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # and of sequential ones
    long: bool = False  # whether the last of the former took long
    soon: int = SOON

    def learn(self, outcome: Outcome, warmup: int, length: int, most: float) -> None:
        """From a run of more than one pass over chunks of `length` steps. `most`: the largest floor that is believed."""
        passes, self.why = outcome.passes if outcome.converged else math.inf, outcome.fallback
        cost = passes * length + warmup
        if not self.settled and outcome.converged:
            self.fade = outcome.fade
        if self.settled:
            self.passes = passes
        elif outcome.gaps[0] * WORTH <= self.gap or cost * CHEAPER <= min(self.cost, sys.float_info.max):
            self.warmup, self.gap, self.cost = max(1, warmup) * 2, outcome.gaps[0], cost
        else:
            self.warmup, self.settled = max(1, warmup) // 2, True
            floor = max(self.gap, outcome.gaps[0])
            self.floor = min(2 * floor, most) if floor <= most else 0.0
            if not outcome.converged and not self.floor:  # neither of two warm-ups does
                self.passes = passes

    def timed(self, seconds: float, outcome: Outcome, steps: int) -> None:
        """What a run of `steps` steps took, in passes or sequentially."""
        if not outcome.cost:
            if len(self.alone) < TIMED:  # later ones would tell nothing new
                self.alone.append(seconds / steps)
        elif self.alone or seconds < LIGHT * outcome.passes or outcome.cost > MANY * steps:
            self.passing.append(seconds / steps)
            self.long = seconds > COLD

    @property
    def slower(self) -> str | None:
        """Why the next run is to be sequential, though its steps are many: passes take longer, or it is not known whether they do."""
        if not self.passing:
            return None
        mine, other = min(self.passing), min(self.alone, default=0.0)
        known = len(self.alone) == TIMED
        if len(self.passing) < TIMED and not (known and (self.long or self.soon > RETRY) and mine > FAR * other):
            return None
        if not known and other < FAR * mine:
            return "timed, to see whether passes pay"
        return f"it took {1e6 * other:.3g} µs a step, passes {1e6 * mine:.3g}" if other < mine else None

    def undecided(self, steps: int) -> bool:
        """Whether a run of so many steps is sequential only for now: times are still compared, or a trial is saved up for."""
        return (bool(self.passing) and len(self.alone) < TIMED) or self.account.saving(steps)

    def due(self, steps: int) -> bool:
        """Whether the last run was the last sequential one before it is seen whether it is still so."""
        return self.calls == 0 and not self.account.waits(steps)

    def before_retry(self, steps: int) -> int:
        """Sequential runs of so many steps before it is time to see whether it is still so; those that wait for a trial do not count."""
        return RETRY if self.account.waits(steps) else self.patience - self.calls - 1

    @property
    def patience(self) -> int:
        """Sequential runs, counted from the last retry, of which the last is followed by one."""
        return RETRY if self.slower is None else min(self.soon, RETRY)

    def ran_alone(self, steps: int) -> bool:
        """Count a sequential run; whether what is known is to be forgotten, as it is time to see whether it is still so."""
        if self.account.waits(steps):
            return False
        self.calls += 1
        if self.calls < self.patience:
            return False
        self.calls, slower = 0, self.slower
        self.soon *= 2
        self.passing.clear()  # to be timed again
        return slower is None
