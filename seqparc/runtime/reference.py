"""The oracle: the plain loop over the user's own cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor] | None, list[Tensor]]]


def loop(step: Step, x: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run a cell step by step: x leaves [batch, time, ...] -> (output leaves [batch, time, ...], last state)."""
    now = list(state)
    rows: list[list[Tensor]] = []
    for t in range(x[0].shape[1]):
        out, now = step([v[:, t] for v in x], now)
        rows.append(now if out is None else out)
    return [torch.stack(column, 1) for column in zip(*rows, strict=True)], now
