"""What is measured: cells, shapes, what they are compared with, and what is aimed at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import baselines


class ElementwiseGRU(nn.Module):
    """A GRU whose recurrent weights are vectors; x holds the three gates' inputs."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.hidden_size = d
        self.u = nn.Parameter(torch.randn(3, d) * 0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, r, n = x.chunk(3, -1)
        z, r = torch.sigmoid(z + self.u[0] * h), torch.sigmoid(r + self.u[1] * h)
        n = torch.tanh(n + self.u[2] * (r * h))
        return (1 - z) * n + z * h


@dataclass(frozen=True)
class Target:
    """`system`'s time is to be at most (or, as a speed-up, at least) `bound` times that of `other`; for "fwd" or "fwd+bwd"."""

    what: str  # "fwd" or "fwd+bwd"
    other: str
    bound: float
    speedup: bool = False


@dataclass(frozen=True)
class Case:
    """One cell at one shape."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    builtin: Callable[[Any], nn.Module] | None = None  # the torch module with the same weights
    hand: Callable[..., Any] | None = None  # (cell, x, h0) -> (y, last) in C
    targets: tuple[Target, ...] = field(default=())

    def shorter(self, steps: int) -> Case:
        return Case(self.name, self.make, (self.shape[0], min(steps, self.shape[1]), self.shape[2]), self.builtin, self.hand, self.targets)


def same_weights(kind: type[nn.RNNBase]) -> Callable[[Any], nn.Module]:
    """The torch layer with a cell's weights."""

    def make(cell: Any) -> nn.Module:
        layer = kind(cell.input_size, cell.hidden_size, batch_first=True)
        with torch.no_grad():
            for name, p in cell.named_parameters():
                getattr(layer, f"{name}_l0").copy_(p)
        return layer

    return make


def _elementwise(cell: Any, x: Tensor, h0: Tensor) -> Any:
    return baselines.elementwise_gru(x, cell.u.detach(), h0)


BACKWARD = Target("fwd+bwd", "seqparc fwd", 3.5)


def _layer(fwd: float, both: float) -> tuple[Target, ...]:
    """So many times faster than torch's layer, forward and with gradients."""
    return Target("fwd", "torch built-in", fwd, True), Target("fwd+bwd", "torch built-in", both, True), BACKWARD


def _loop(fwd: float, both: float) -> tuple[Target, ...]:
    """At most so many times what the C loop takes forward, forward and with gradients."""
    return Target("fwd", "C loop", fwd), Target("fwd+bwd", "C loop fwd", both), BACKWARD


CASES = (
    Case("dense GRU 32", lambda: nn.GRUCell(8, 32), (1, 17984, 8), same_weights(nn.GRU), baselines.dense_gru, _layer(90, 200)),
    Case("elementwise GRU 64", lambda: ElementwiseGRU(64), (1, 16384, 192), None, _elementwise, _loop(1, 4)),
    Case("elementwise GRU 8", lambda: ElementwiseGRU(8), (1, 131072, 24), None, _elementwise, _loop(0.5, 2)),
    Case("elementwise GRU 1", lambda: ElementwiseGRU(1), (1, 16384, 3), None, _elementwise, _loop(0.25, 0.7)),
    Case("elementwise GRU 256, batch 8", lambda: ElementwiseGRU(256), (8, 2048, 768), None, _elementwise, _loop(1, 4)),
    Case("dense RNN 16", lambda: nn.RNNCell(8, 16), (1, 16384, 8), same_weights(nn.RNN), None, _layer(50, 50)),
    Case("dense LSTM 64, batch 4", lambda: nn.LSTMCell(8, 64), (4, 4096, 8), same_weights(nn.LSTM), None, _layer(2, 3)),
    Case("dense GRU 64, batch 16", lambda: nn.GRUCell(8, 64), (16, 2048, 8), same_weights(nn.GRU), None, _layer(6, 12)),
    Case("dense GRU 256", lambda: nn.GRUCell(8, 256), (1, 16384, 8), same_weights(nn.GRU), None, _layer(2, 3)),
)  # fmt: skip
