"""What is measured: cells, shapes, what they are compared with, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
    """seqparc's time is to be at most `bound` times that of another system or, as a speed-up, that is to be at least `bound` times ours."""

    what: str  # "fwd" or "fwd+bwd"
    other: str
    bound: float
    speedup: bool = False
    other_what: str = ""  # the other's direction, where it is not the same


@dataclass(frozen=True)
class Case:
    """One cell at one shape."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    builtin: Callable[[Any], nn.Module] | None = None  # the torch module with the same weights
    targets: tuple[Target, ...] = field(default=())

    def shorter(self, steps: int) -> Case:
        return Case(self.name, self.make, (self.shape[0], min(steps, self.shape[1]), self.shape[2]), self.builtin, self.targets)


def same_weights(kind: type[nn.RNNBase]) -> Callable[[Any], nn.Module]:
    """The torch layer with a cell's weights."""

    def make(cell: Any) -> nn.Module:
        layer = kind(cell.input_size, cell.hidden_size, batch_first=True)
        with torch.no_grad():
            for name, p in cell.named_parameters():
                getattr(layer, f"{name}_l0").copy_(p)
        return layer

    return make


def _faster(other: str, fwd: float, both: float) -> tuple[Target, ...]:
    """So many times faster than another system, forward and with gradients."""
    return Target("fwd", other, fwd, True), Target("fwd+bwd", other, both, True)


def _loop(other: str, fwd: float, both: float) -> tuple[Target, ...]:
    """At most so many times what a loop takes forward, forward and with gradients."""
    return Target("fwd", other, fwd), Target("fwd+bwd", other, both, other_what="fwd")


LAYER, JAX, NUMBA, C = "torch built-in", "jax.lax.scan", "numba", "C loop"
GRU, LSTM, RNN = same_weights(nn.GRU), same_weights(nn.LSTM), same_weights(nn.RNN)

CASES = (
    Case("dense GRU 32", lambda: nn.GRUCell(8, 32), (1, 17984, 8), GRU, (*_faster(LAYER, 90, 200), *_faster(JAX, 7, 7))),
    Case("elementwise GRU 64", lambda: ElementwiseGRU(64), (1, 16384, 192), None, _loop(C, 1, 4)),
    Case("elementwise GRU 8", lambda: ElementwiseGRU(8), (1, 131072, 24), None, _loop(C, 0.5, 2)),
    Case("elementwise GRU 1", lambda: ElementwiseGRU(1), (1, 16384, 3), None, _loop(NUMBA, 0.34, 0.96)),
    Case("elementwise GRU 256, batch 8", lambda: ElementwiseGRU(256), (8, 2048, 768), None, _loop(C, 1, 4)),
    Case("dense RNN 16", lambda: nn.RNNCell(8, 16), (1, 16384, 8), RNN, _faster(LAYER, 50, 50)),
    Case("dense LSTM 64, batch 4", lambda: nn.LSTMCell(8, 64), (4, 4096, 8), LSTM, _faster(LAYER, 2, 3)),
    Case("dense GRU 64, batch 16", lambda: nn.GRUCell(8, 64), (16, 2048, 8), GRU, _faster(LAYER, 6, 12)),
    Case("dense GRU 256", lambda: nn.GRUCell(8, 256), (1, 16384, 8), GRU, (*_faster(LAYER, 2, 3), *_faster(JAX, 2, 3))),
)
