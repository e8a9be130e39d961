"""How a recurrence is run: chunks, warm-up and update, with the reasons in words."""

from __future__ import annotations

import functools
import math

from seqparc.options import Options
from seqparc.plan import Choice

#: Steps after which a cell is first assumed to have forgotten its start; adapted from run to run.
FIRST_WARMUP = 32
#: Largest dense state for which the exact update, n + 1 times the work of a pass, is offered.
EXACT_LIMIT = 32


def corrections(n: int, scalar: bool) -> tuple[str, ...]:
    """The updates with Jacobians that a lane of n state numbers can afford, cheapest first."""
    return ("exact",) if scalar else ("diagonal", "exact") if n <= EXACT_LIMIT else ("diagonal",)


@functools.lru_cache(512)
def choose(
    options: Options, *, steps: int, best: int, n: int, scalar: bool, affine: bool, warmup: int | None, passes: float = 1,
    per_warmup: int = 4, slower: str | None = None,
) -> Choice:
    """Decide for `steps` steps of lanes of n numbers, of which `best` chunks fill the device.

    `warmup` and `passes` are what earlier runs have shown to be needed, `slower` why they were not worth it; a chunk is at least
    `per_warmup` warm-ups long.
    """
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
    else:
        chunks = max(1, min(best, steps // max(1, per_warmup * guess)))
        if chunks < best:
            reasons.append(f"{chunks} chunks: each is to be {per_warmup} warm-ups of {guess} steps at least")
    if chunks == 1:
        return Choice("sequential", 1, 0, ("none",), (*reasons, f"{steps} steps are too few to cut"))
    if options.strategy == "auto" and (slower or passes * (steps // chunks) + guess >= steps):
        why = slower or ("earlier runs did not converge" if passes == math.inf else f"earlier runs took {passes} passes of {chunks} chunks")
        return Choice("sequential", 1, 0, ("none",), (*reasons, why), given_up=True)
    if affine and offered[0] == "exact" and update == "auto" and guess * per_warmup > steps // chunks:
        update = "exact"
        reasons.append("linear in the state, so one exact update is right and no guess is needed")
    if update == "exact" and affine:
        guess = 0
    return Choice("shooting", chunks, guess, ("none", *offered) if update == "auto" else (update,), tuple(reasons))
