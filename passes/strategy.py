"""How a recurrence is run: chunks, warm-up and update, with the reasons in words."""

from __future__ import annotations

import functools
import math

from seqparc.options import Options
from seqparc.plan import Choice

#: Steps after which a cell is first assumed to have forgotten its start; adapted from run to run.
FIRST_WARMUP = 32
#: Fewer chunks are taken if they take at most so many times as long as the best number.
NEARLY = 1.05
#: Largest dense state for which the exact update, n + 1 times the work of a pass, is offered.
EXACT_LIMIT = 32
#: Products of a step from which on corrections have to be asked for: a kernel that carries them takes 10 to 30 s to compile.
MANY = 8


def corrections(n: int, scalar: bool) -> tuple[str, ...]:
    """The updates with Jacobians that a lane of n state numbers can afford, cheapest first."""
    return ("exact",) if scalar else ("diagonal", "exact") if n <= EXACT_LIMIT else ("diagonal",)


@functools.lru_cache(512)
def choose(
    options: Options, *, steps: int, paces: tuple[tuple[int, float], ...], n: int, scalar: bool, affine: bool, warmup: int | None,
    passes: float = 1, per_warmup: int = 1, slower: str | None = None, products: int = 0,
) -> Choice:
    """Decide for `steps` steps of lanes of n numbers.

    `paces`: numbers of chunks, the last of which fills the device, and how long a step of so many takes, times that of one. `warmup` and
    `passes` are what earlier runs have shown to be needed, `slower` why they were not worth it; a chunk is at least `per_warmup` warm-ups
    long. `products` are the matrix products of a step: with many of them, a kernel that carries Jacobians takes long to compile.
    """
    best = paces[-1][0]
    strategy, reasons = options.strategy, []
    if strategy == "auto":
        strategy = "sequential" if best == 1 else "shooting"
        reasons.append("the batch alone fills the device" if best == 1 else f"{best} chunks fill the device")
    if strategy == "sequential":
        return Choice("sequential", 1, 0, ("none",), tuple(reasons) or ("asked for",))
    offered = corrections(n, scalar)
    update = options.update
    if update == "exact" and update not in offered:
        update = "diagonal"
        reasons.append(f"no exact update for a state of {n}: its diagonal")
    if strategy == "newton":
        return Choice("newton", steps, 0, (offered[-1] if update == "auto" else update,), (*reasons, "chunks of one step"))
    guess = options.warmup if options.warmup is not None else (FIRST_WARMUP if warmup is None else warmup)
    if options.chunks is not None:
        chunks = min(options.chunks, steps)
        reasons.append("chunks asked for")
        if options.warmup is None:
            guess = min(guess, steps // chunks)
        times = {chunks: passes * (steps // chunks) + guess}
    else:
        # In steps of one chunk. Where the least differ by little fewer chunks are taken: they warm up less, and are right more often.
        most = steps // max(1, per_warmup * guess)  # and where that is none of the numbers, the pace of the next counts
        times = {k: pace * (passes * -(-steps // k) + guess) for c, pace in reversed(paces) if (k := min(c, most)) > 1}
        chunks = min((c for c in times if times[c] <= NEARLY * min(times.values())), default=1)
        if chunks < best:
            reasons.append(f"{chunks} chunks: as many as pay where each is led up to by {guess} steps")
    if chunks == 1:
        return Choice("sequential", 1, 0, ("none",), (*reasons, f"{steps} steps are too few to cut"))
    if options.strategy == "auto" and options.chunks is None and passes == 1 and times[chunks] >= steps:
        return Choice("sequential", 1, 0, ("none",), (*reasons, "chunks would take as long as all steps one after the other"))
    if options.strategy == "auto" and (slower or times[chunks] >= steps):
        why = slower or ("earlier runs did not converge" if passes == math.inf else f"earlier runs took {passes} passes of {chunks} chunks")
        return Choice("sequential", 1, 0, ("none",), (*reasons, why), given_up=True)
    if affine and offered[0] == "exact" and update == "auto" and guess * per_warmup > steps // chunks:
        update = "exact"
        reasons.append("linear in the state, so one exact update is right and no guess is needed")
    if update == "exact" and affine:
        guess = 0
    if update == "auto" and products > MANY:
        offered = ()
        reasons.append(f"no corrections, which would take long to compile: a step has {products} matrix products")
    return Choice("shooting", chunks, guess, ("none", *offered) if update == "auto" else (update,), tuple(reasons))
