"""What the first call of a cell does, counted: time depends on the machine, how often something is done does not."""

from __future__ import annotations

import gc
from typing import Any

from seqparc.runtime.making import uncollected


def test_compiling_brings_about_no_full_round_of_garbage_collection() -> None:
    rounds: list[int] = []

    def note(phase: str, about: dict[str, Any]) -> None:
        rounds.append(about["generation"])

    gc.collect()
    gc.disable()
    kept = [[[i] for i in range(1000)] for _ in range(len(gc.get_objects()) // 1000)]
    for _ in range(gc.get_threshold()[2] + 2):
        gc.collect(1)  # so many that have not seen a full round, and so many others since: a full one is next, as when torch is imported
    gc.enable()
    gc.callbacks.append(note)
    try:
        with uncollected():
            made = [[i] for i in range(50_000)]
        more = [[i] for i in range(1000)]
    finally:
        gc.callbacks.remove(note)
    assert kept and len(made) == 50_000 and len(more) == 1000
    assert gc.isenabled() and 2 not in rounds
