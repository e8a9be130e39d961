"""How a recurrence is run: chunks, warm-up and update, with the reasons in words."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from seqparc.options import Options

#: Steps after which a cell is first assumed to have forgotten its start; adapted from run to run.
FIRST_WARMUP = 32
#: A chunk is at least this many warm-ups long, so that guessing costs at most a fifth of a pass.
CHUNK_PER_WARMUP = 4
#: Times the rounding unit that a chunk start state may move and count as converged.
TOLERANCE_UNITS = 4


@dataclass(frozen=True)
class Choice:
    """The decision for one run."""

    strategy: str
    chunks: int
    warmup: int
    update: str
    reasons: tuple[str, ...]


@functools.lru_cache(512)
def choose(
    options: Options, *, steps: int, lanes: int, wanted: int, n: int, exact_possible: bool, affine: bool, warmup: int | None
) -> Choice:
    """Decide for `steps` steps of `lanes` lanes (batch × lanes of the program) of n numbers on a device filled by `wanted`."""
    strategy, reasons = options.strategy, []
    best = max(1, -(-wanted // max(1, lanes)))
    if strategy == "auto":
        if best == 1:
            strategy = "sequential"
            reasons.append(f"{lanes} lanes fill the device ({wanted} wanted): one chunk")
        else:
            strategy = "shooting"
            reasons.append(f"{lanes} lanes leave the device idle ({wanted} wanted): up to {best} chunks")
    if strategy == "sequential":
        return Choice("sequential", 1, 0, "none", tuple(reasons) or ("asked for",))
    if strategy == "newton":
        if not exact_possible:
            reasons.append(f"no exact update for a state of {n}: Picard")
        return Choice("newton", steps, 0, "exact" if exact_possible else "none", (*reasons, "chunks of one step"))
    guess = options.warmup if options.warmup is not None else (FIRST_WARMUP if warmup is None else warmup)
    if options.chunks is not None:
        chunks = min(options.chunks, steps)
        reasons.append("chunks asked for")
        if options.warmup is None:
            guess = min(guess, steps // chunks)
    else:
        chunks = max(1, min(best, steps // max(1, CHUNK_PER_WARMUP * guess)))
        if chunks < best:
            reasons.append(f"{chunks} chunks: each is to be {CHUNK_PER_WARMUP} warm-ups of {guess} steps at least")
    if chunks == 1:
        return Choice("sequential", 1, 0, "none", (*reasons, f"{steps} steps are too few to cut"))
    update = options.update
    if affine and exact_possible and update == "auto" and guess * CHUNK_PER_WARMUP > steps // chunks:
        update = "exact"
        reasons.append("linear in the state, so one exact update is right and no guess is needed")
    if update == "exact" and not exact_possible:
        update = "none"
        reasons.append(f"no exact update for a state of {n}")
    if update == "exact" and affine:
        guess = 0
    return Choice("shooting", chunks, guess, update, tuple(reasons))
