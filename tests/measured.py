"""Memory as torch's own allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def measured(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes allocated while something runs: at most, and at the end with what it gives, which comes third."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        now += size
        most = max(most, now)
    return most, now, result
