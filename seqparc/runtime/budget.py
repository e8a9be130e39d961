"""What passes may cost before it is known whether they pay.

A pass that costs little by the steps it counts may take long by the clock: it has a fixed cost, and cores that are promised may be busy.
So on a processor the first run of a shape begins with the sequential kernel, which is timed, and what passes take is counted in its steps.
Where the whole run takes little, it goes on like that. Every run may spend a part of its steps on trials; what it does not spend is saved
for trials that cost more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqparc.runtime.driver import Cut, Outcome

#: The part of a run's steps that trials may cost.
TRIAL = 0.15
#: And of the first run's, of which nothing is known; where few lanes fill the processor even a good pass costs a third of the steps.
TRUST = 0.4
#: What is saved up is at most so many runs.
SAVED = 8
#: Seconds that a pass takes beside the steps it counts, and a first call of a kernel; about, on a slow processor.
PASS, CALL = 1e-4, 1e-4


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of the sequential kernel; whole: timed over whole runs, not over the first steps of one."""

    step: float
    whole: bool = False

    @property
    def fixed(self) -> float:
        """What a pass costs beside the steps that it counts, in steps."""
        return PASS / self.step


@dataclass(frozen=True)
class Budget:
    """Steps that the trials of one run may cost; `pace` says what a step takes, None where steps are counted and not timed."""

    steps: float
    pace: Pace | None = None


@dataclass
class Tally:
    """What passes cost in steps of the sequential kernel: counted, and by the clock where its pace is known.

    exact: steps that are done for good, whatever becomes of the others.
    """

    budget: Budget
    counted: float = 0.0
    cost: float = 0.0
    rate: float = 1.0  # what the last pass took for every step it counts
    exact: int = 0

    def add(self, steps: float, seconds: float) -> None:
        took = steps if self.budget.pace is None else seconds / self.budget.pace.step
        self.counted, self.cost, self.rate = self.counted + steps, self.cost + took, took / steps

    def affords(self, steps: float) -> bool:
        """Whether a trial may count so many more."""
        return self.cost + self.rate * steps - self.exact <= self.budget.steps

    def by_the_clock(self, steps: float, most: float) -> bool:
        """Whether it is by the clock alone that so many more are dear."""
        return self.budget.pace is not None and self.counted + steps - self.exact <= most


@dataclass
class Account:
    """What the runs of a shape have saved for trials, in steps of the sequential kernel.

    once: steps that a pass counts; price: what the next trial is to cost at least; spent: what the last run that converged did.
    """

    pace: Pace | None = None
    once: float = 0.0
    saved: float = 0.0
    price: float = 0.0
    spent: float = 0.0

    @classmethod
    def opened(cls, seconds: float, steps: int, cut: Cut) -> Account:
        """By what the sequential kernel took for some steps, and how a run is to be cut."""
        spans = cut.spans
        once = spans.longest * max(1.0, len(spans) / cut.fill) + (0 if spans.lead is None else int(spans.lead.max()))
        # Too little is put right by the first run, which is then sequential; too much would make that a trial.
        return cls(Pace(max(seconds - CALL, 1e-9) / steps), once, saved=(TRUST - TRIAL) * spans.steps)

    def budget(self, steps: int) -> Budget:
        """For a run of so many steps. Where they are counted nothing is saved: what is counted was not spent."""
        if self.pace is None:
            return Budget(TRUST * steps)
        return Budget(TRIAL * steps + max(0.0, self.saved) + self.spent, self.pace)

    def saving(self, steps: int) -> bool:
        """Whether the next run is sequential only because a trial has to be saved up for."""
        return self.waits(steps) is not None and self.pace is not None and self.once + self.pace.fixed < steps

    def waits(self, steps: int) -> str | None:
        """Why the next run is to be sequential: what a trial costs is not yet saved, or more than it can save."""
        if self.pace is None:
            return None
        trial, budget = max(self.price, self.once + self.pace.fixed), self.budget(steps)
        if trial <= budget.steps and self.once + self.pace.fixed < steps:
            return None
        whole = f"the sequential kernel takes about {1e3 * steps * self.pace.step:.2g} ms"
        return f"{whole}, and a pass no less" if self.once + self.pace.fixed >= steps else f"{whole}, and a trial has to be saved up for"

    def settle(self, steps: int, outcome: Outcome, seconds: float) -> None:
        """After a run of so many steps."""
        self.saved = min(self.saved + TRIAL * steps - outcome.waste, SAVED * steps)
        if outcome.cut_short:
            self.price = 2 * max(self.price, outcome.cost)
        elif outcome.converged and outcome.cost:
            self.price, self.spent = max(0.0, outcome.waste), outcome.cost
        elif not outcome.cost and self.pace is not None:  # better known than from some of the steps
            step = seconds / steps
            self.pace = Pace(step if not self.pace.whole else min(step, self.pace.step), True)
