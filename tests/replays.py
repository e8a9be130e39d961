"""Cells whose calls have become routine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime.routine import ALIKE

SHIFT = torch.tensor(0.25)


class Scaled(nn.Module):
    """A cell with a setting, a buffer, a submodule, a variable it closes over, a readout, and products on both sides of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.gain = 4, 0.9
        self.w, self.u = nn.Linear(3, 4), nn.Linear(4, 4)
        self.out = nn.Parameter(torch.randn(2, 4))
        self.register_buffer("floor", torch.full((4,), -0.5))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.maximum(self.gain * torch.tanh(self.w(x) + self.u(h)) + SHIFT * (1 if self.training else 2), self.floor)
        return h @ self.out.T, h


def settled(cell: Any, x: Any, **given: Any) -> seqparc.CompiledRNN:
    """A cell that has been called so often that the next call is a replay."""
    rnn = seqparc.compile(cell, **given)
    with torch.no_grad():
        for _ in range(ALIKE + 4):
            rnn(x)
    return rnn


def same(rnn: seqparc.CompiledRNN, x: Any, state: Any = None) -> None:
    with torch.no_grad():
        mine, right = rnn(x, state), rnn.sequential(x, state)
    for a, b in zip(torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
