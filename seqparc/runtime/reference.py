"""The oracle: the plain loop over the user's own cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor] | None, list[Tensor]]]


def loop(step: Step, x: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run a cell step by step: x leaves [batch, time, ...] -> (output leaves [batch, time, ...], last state)."""
    now = [s.clone() for s in state]  # a cell may write into its state, and this is the caller's
    rows: list[list[Tensor]] = []
    # unbind, not x[:, t]: its gradient is one stack, where each slice's would be as long as the sequence. Its results may not be changed in
    # place, as x[:, t] may be, hence the clones.
    for x_t in zip(*(v.unbind(1) for v in x), strict=True):
        out, now = step([v.clone() for v in x_t], now)
        rows.append(now if out is None else out)
    return [torch.stack(column, 1) for column in zip(*rows, strict=True)], now
