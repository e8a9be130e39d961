"""Cells that are hard to run in parallel: they remember long or for ever, are chaotic, oscillate, grow, or jump."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import ElementwiseGRU
from torch import Tensor, nn


class Map(nn.Module):
    """h' = f(h, x, p) with one parameter p per state number."""

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor], p: float, n: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.step, self.p = n, step, nn.Parameter(torch.full((n,), p))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.step(h, x, self.p)


class Gain(nn.Module):
    """h' = tanh(g W h + x) with W normal of variance 1/n: chaotic above g = 1 as n grows."""

    def __init__(self, n: int, gain: float) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Parameter(gain * torch.randn(n, n) / n**0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.w.t() + x)


class VanDerPol(nn.Module):
    """A limit cycle, by explicit Euler; x drives the velocity."""

    def __init__(self, mu: float, dt: float) -> None:
        super().__init__()
        self.mu, self.dt = nn.Parameter(torch.tensor(mu)), dt

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        q, v = s[:, :1], s[:, 1:]
        return torch.cat([q + self.dt * v, v + self.dt * (self.mu * (1 - q * q) * v - q + 0.1 * x)], 1)


class Rotor(nn.Module):
    """A rotation that attracts its radius to 1 and forgets nothing of its phase."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(angle))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        c, d = torch.cos(self.angle), torch.sin(self.angle)
        a, b = s[:, :1], s[:, 1:]
        pull = 1 + 0.1 * (1 - a * a - b * b)
        return pull * torch.cat([c * a - d * b + 0.01 * x, d * a + c * b], 1)


class ExponentialGates(nn.Module):
    """An sLSTM's cell, elementwise: exponential gates, a normaliser and the largest exponent so far."""

    def __init__(self, n: int, forget: float) -> None:
        super().__init__()
        self.r, self.forget = nn.Parameter(0.3 * torch.randn(4, n)), forget

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Any]:
        h, c, n, m = state
        z, i, f, o = (g + r * h for g, r in zip(x.chunk(4, -1), self.r, strict=True))
        f = nn.functional.logsigmoid(f + self.forget)
        top = torch.maximum(f + m, i)
        keep, take = torch.exp(f + m - top), torch.exp(i - top)
        c, n = keep * c + take * torch.tanh(z), keep * n + take
        h = torch.sigmoid(o) * c / torch.clamp_min(n, 1e-6)
        return h, (h, c, n, top)


def biased(cell: nn.RNNCellBase, part: slice, bias: float, gain: float = 1.0) -> nn.RNNCellBase:
    """A cell whose gate has a bias, and whose weights are larger."""
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(gain)
        cell.bias_ih[part].add_(bias)
    return cell


def scaled(cell: ElementwiseGRU, by: float) -> ElementwiseGRU:
    with torch.no_grad():
        cell.u.mul_(by)
    return cell


@dataclass(frozen=True)
class Dynamics:
    """A cell, the shape of x, and where the state starts (a sample's, zeros if left away); x is normal times `scale`."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    scale: float = 1.0
    state: Any = None
    broken: int | None = None  # a step at which x is NaN

    def x(self, generator: torch.Generator) -> Tensor:
        x = self.scale * torch.randn(self.shape, generator=generator)
        if self.broken is not None:
            x[0, self.broken * self.shape[1] // 8] = float("nan")
        return x

    def shorter(self, steps: int) -> Dynamics:
        return replace(self, shape=(self.shape[0], min(steps, self.shape[1]), self.shape[2]))


LONG = 16384
N = 16
ONE, FOUR = torch.full((1,), 0.3), (torch.zeros(N),) * 4

DYNAMICS = (
    *(Dynamics(f"GRU, update bias +{b}", lambda b=b: biased(nn.GRUCell(8, N), slice(N, 2 * N), b), (1, LONG, 8)) for b in (0, 3, 5)),
    Dynamics("GRU, saturated: weights × 10", lambda: biased(nn.GRUCell(8, N), slice(0), 0.0, 10.0), (1, LONG, 8)),
    *(Dynamics(f"LSTM, forget bias +{b}", lambda b=b: biased(nn.LSTMCell(8, N), slice(N, 2 * N), b), (1, LONG, 8)) for b in (3, 6)),
    *(Dynamics(f"sLSTM gates, forget bias +{b}", lambda b=b: ExponentialGates(N, b), (1, LONG, 4 * N), state=FOUR) for b in (0, 3, 6)),
    *(Dynamics(f"tanh network, gain {g}", lambda g=g: Gain(64, g), (1, LONG, 64), 0.1) for g in (0.5, 0.9, 1.0, 1.5, 2.0, 4.0)),
    *(Dynamics(f"elementwise GRU × {k}", lambda k=k: scaled(ElementwiseGRU(N), k), (1, LONG, 3 * N)) for k in (1, 3, 10)),
    Dynamics("integrator", lambda: Map(lambda h, x, p: h + p * torch.tanh(x), 0.01), (1, LONG, 1)),
    Dynamics("leaky integrator, 10,000 steps", lambda: Map(lambda h, x, p: (1 - p) * h + p * x, 1e-4), (1, LONG, 1)),
    Dynamics("unstable affine, × 1.001", lambda: Map(lambda h, x, p: p * h + x, 1.001), (1, LONG, 1)),
    Dynamics("unstable affine, × 1.01, overflows", lambda: Map(lambda h, x, p: p * h + x, 1.01), (1, LONG, 1)),
    Dynamics("stiff Euler step, eigenvalue -0.99", lambda: Map(lambda h, x, p: h - p * (h - torch.sin(x)), 1.99), (1, LONG, 1)),
    Dynamics("Van der Pol, limit cycle", lambda: VanDerPol(1.0, 0.02), (1, LONG, 1), state=torch.tensor([1.0, 0.0])),
    Dynamics("Van der Pol, stiff", lambda: VanDerPol(8.0, 0.01), (1, LONG, 1), state=torch.tensor([1.0, 0.0])),
    Dynamics("rotor, phase is never forgotten", lambda: Rotor(0.3), (1, LONG, 1), state=torch.tensor([1.0, 0.0])),
    Dynamics("logistic map, chaotic", lambda: Map(lambda h, x, p: p * h * (1 - h) + 0 * x, 3.9), (1, LONG, 1), state=ONE),
    Dynamics("doubling map", lambda: Map(lambda h, x, p: torch.remainder(p * h + 0.1 * x, 1.0), 2.0), (1, LONG, 1), state=ONE),
    Dynamics("jumps: sign, forgets", lambda: Map(lambda h, x, p: p * h - 0.5 * torch.sign(h) + x, 0.5), (1, LONG, 1)),
    Dynamics("spikes: leak and reset", lambda: Map(lambda h, x, p: torch.where(h > 1, 0.0, p * h + 0.3 * x.abs()), 0.9), (1, LONG, 1)),
    Dynamics("NaN in the input", lambda: scaled(ElementwiseGRU(N), 1), (2, LONG, 3 * N), broken=3),
    Dynamics("NaN in the input, long memory", lambda: biased(nn.GRUCell(8, N), slice(N, 2 * N), 5), (2, LONG, 8), broken=3),
)
