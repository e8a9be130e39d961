"""How a run is cut into chunks, and when they have converged: decided once for all runs of which the same is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from seqparc.options import Options
from seqparc.plan import Choice, Plan
from seqparc.runtime.driver import Cut, Kernel
from seqparc.runtime.experience import FLOOR, Experience
from seqparc.spans import cut_evenly

#: A start state has converged when it moves by at most this many rounding units, by chunk length. A state that remembers M steps holds the
#: rounding of M steps, about sqrt(M) units, and the jumps of M / length chunks: a jump of half of sqrt(length) adds half as much.
UNITS = (2.0, 8.0)
#: Steps from which on a chunk's rounding is taken for a random walk.
LONG = 32
#: Times that for states that do remember more than a chunk: half of sqrt(length) is one standard deviation of what rounding moves, and the
#: largest of many moves is about four.
SLACK = 4.0
#: Threads for which chunks are cut where nothing may depend on how many there are.
THREADS = 8
#: Decisions that are remembered.
MOST = 256


class Cuts:
    """Those of one engine. choose: `seqparc.passes.strategy.choose`."""

    def __init__(self, plan: Plan, options: Options, choose: Callable[..., Choice]) -> None:
        self._plan, self._options, self._choose = plan, options, choose
        self._decided: dict[Any, tuple[Choice, Cut]] = {}

    def decide(
        self, direction: str, kernel: Kernel, batch: int, steps: int, known: Experience, watched: bool = True
    ) -> tuple[Choice, Cut]:
        """How to run, and the cut that follows from it; the same objects for the same question.

        known: what runs of this shape have taught; watched: whether the host may look at what comes out before it goes on.
        """
        threads = THREADS if self._options.deterministic else torch.get_num_threads()
        best = kernel.chunks_wanted(batch, threads)
        slower = known.slower or known.account.waits(steps)
        key = (
            direction, batch, steps, best, threads, watched, kernel.chunk_per_warmup,
            known.warmup, known.passes, known.fade, known.floor, slower,
        )  # fmt: skip
        decided = self._decided.get(key)
        if decided is None:
            if len(self._decided) > MOST:
                self._decided.clear()
            options = self._options if watched else replace(self._options, strategy="sequential")
            most = min(best, steps)  # and powers of two below it
            paces = tuple((c, kernel.pace(c, batch, threads)) for c in (*(1 << k for k in range(1, (most - 1).bit_length())), most))
            choice = self._choose(
                options, steps=steps, paces=paces, n=self._plan.program.n, scalar=self._plan.scalar, affine=direction == "backward",
                warmup=known.warmup, passes=known.passes, per_warmup=kernel.chunk_per_warmup, slower=slower,
                products=self._plan.products,
            )  # fmt: skip
            if not watched:
                choice = replace(choice, reasons=("a CUDA graph is being made, in which gaps cannot be waited for",))
            fill = choice.chunks / kernel.pace(choice.chunks, batch, threads)
            decided = self._decided[key] = choice, self._cut(options, choice, steps, known, fill)
        return decided

    def _cut(self, options: Options, choice: Choice, steps: int, known: Experience, fill: float) -> Cut:
        eps = torch.finfo(self._plan.dtype).eps
        unit = eps * min(max(math.sqrt(steps / choice.chunks) / 2, UNITS[0]), UNITS[1])
        return Cut(
            cut_evenly(steps, choice.chunks, choice.warmup if choice.chunks > 1 else 0), choice.updates,
            atol=eps**2 if options.atol is None else options.atol,
            rtol=max(unit, known.floor) if options.rtol is None else options.rtol,
            fade=known.fade, floor=FLOOR * eps if options.rtol is None else 0.0, fill=fill,
            slack=SLACK if options.rtol is None and steps >= LONG * choice.chunks else 1.0,
            max_passes=options.max_passes, on_divergence=options.on_divergence,
            patient=options.strategy != "auto",
        )  # fmt: skip
