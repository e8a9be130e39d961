"""Which tile, how many warps and how short chunks a GPU kernel runs fastest with: tried out when asked for, and remembered on disk.

What is found is kept by what changes the code or how full the card is: the kernel's text, the card, Triton's version, and the powers of two
of the chunks that would fill the card and of the steps; never by the exact batch or length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

from seqparc import store
from seqparc.options import Options
from seqparc.plan import Setting

#: Runs that are timed of each setting, after one that compiles; the median counts.
RUNS = 5
#: A setting is taken if it is this much faster than what a kernel does by itself.
WORTH = 0.97


class Tuner:
    """The settings of one engine's kernels."""

    def __init__(self, options: Options) -> None:
        self.searching = options.tune and not options.deterministic
        self.remembering = not options.deterministic
        self.known: dict[Hashable, Setting | None] = {}  # None: nothing found, or not tried yet
        self.tried: set[Hashable] = set()

    def adopt(self, kernel: Any, direction: str, batch: int, steps: int) -> Hashable:
        """Have the kernel run as was found best for runs like this, else as it does by itself. What is like this, as a key."""
        kernel.setting = kernel.settings[0]
        key = direction, kernel.chunks_wanted(batch, 1).bit_length(), steps.bit_length()
        if key not in self.known:
            kept = store.recall("tuned", self._name(kernel, key)) if self.remembering else None
            found = Setting(*kept) if isinstance(kept, list) and len(kept) == len(Setting._fields) else None
            self.known[key] = found if found in kernel.settings else None
            if self.known[key] is not None:
                self.tried.add(key)
        kernel.setting = self.known[key] or kernel.settings[0]
        return key

    def search(self, kernel: Any, key: Hashable, run: Callable[[], bool]) -> None:
        """Try every setting once for this key. `run`: as the kernel is set; whether it converged without help."""
        if not self.searching or key in self.tried:
            return
        self.tried.add(key)
        times: dict[Setting, float] = {}
        try:
            for setting in kernel.settings:
                kernel.setting = setting
                try:
                    taken = timed(run, kernel.device)
                except Exception as error:
                    if not type(error).__module__.startswith("triton"):
                        raise
                    continue  # the card has no room for it
                if taken is not None:
                    times[setting] = taken
        finally:  # what went wrong with one setting goes to the user, and not into later calls
            kernel.setting = kernel.settings[0]
        usual, best = kernel.settings[0], min(times, key=lambda s: times[s], default=kernel.settings[0])
        if usual in times and times[best] > WORTH * times[usual]:
            best = usual
        self.known[key] = kernel.setting = best
        store.keep("tuned", self._name(kernel, key), list(best))

    @staticmethod
    def _name(kernel: Any, key: Hashable) -> str:
        return f"{kernel.identity} {key}"


def timed(run: Callable[[], bool], device: torch.device) -> float | None:
    """Median seconds of a run; None if it does not converge."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if not run():
        return None
    times = []
    for _ in range(RUNS):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
