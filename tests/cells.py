"""Cells as people write them. A new one joins every matrix by a row in CELLS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ElementwiseGRU(nn.Module):
    """A GRU whose recurrent weights are vectors."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.u = nn.Parameter(torch.randn(3, n) * 0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, r, c = x.chunk(3, -1)
        z, r = torch.sigmoid(z + self.u[0] * h), torch.sigmoid(r + self.u[1] * h)
        c = torch.tanh(c + self.u[2] * (r * h))
        return (1 - z) * c + z * h


class MinGRU(nn.Module):
    """Feng et al. 2024: gates from the input alone."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.z, self.h = nn.Linear(inputs, n), nn.Linear(inputs, n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = torch.sigmoid(self.z(x))
        return (1 - z) * h + z * self.h(x)


class SLSTM(nn.Module):
    """The elementwise sLSTM of Beck et al. 2024: exponential gates with the max stabiliser; state (c, n, h, m)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.randn(4, n) * 0.5)

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        zero = self.r.new_zeros(batch, self.r.shape[1])
        return zero, zero, zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        c, n, h, m = state
        i, f, z, o = (p + r * h for p, r in zip(x.chunk(4, -1), self.r, strict=True))
        log_f = F.logsigmoid(f)
        m_next = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - m_next), torch.exp(log_f + m - m_next)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = torch.sigmoid(o) * c / n.clamp_min(1e-6)
        return h, (c, n, h, m_next)


class BlockGRU(nn.Module):
    """Heads of dense GRUs that never meet."""

    def __init__(self, heads: int, n: int) -> None:
        super().__init__()
        self.hidden_size, self.heads = heads * n, heads
        self.u = nn.Parameter(torch.randn(3, heads, n, n) / (2 * n**0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        x, s = x.unflatten(-1, (3, self.heads, -1)), h.unflatten(-1, (self.heads, -1))
        z = torch.sigmoid(x[:, 0] + torch.einsum("bhi,hji->bhj", s, self.u[0]))
        r = torch.sigmoid(x[:, 1] + torch.einsum("bhi,hji->bhj", s, self.u[1]))
        c = torch.tanh(x[:, 2] + r * torch.einsum("bhi,hji->bhj", s, self.u[2]))
        return ((1 - z) * c + z * s).flatten(1)


class LayerNormGRU(nn.Module):
    """Layer norms on both sides of the gates, as in Ba et al. 2016."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u = nn.Linear(inputs, 3 * n), nn.Linear(n, 3 * n, bias=False)
        self.nx, self.nh = nn.LayerNorm(3 * n), nn.LayerNorm(3 * n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        xz, xr, xc = self.nx(self.w(x)).chunk(3, -1)
        hz, hr, hc = self.nh(self.u(h)).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xc + torch.sigmoid(xr + hr) * hc) + z * h


class LayerNormLSTM(nn.Module):
    """Layer norms on the gates together and on the cell state; state (h, c)."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Linear(inputs + n, 4 * n)
        self.ng, self.nc = nn.LayerNorm(4 * n), nn.LayerNorm(n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = self.ng(self.w(torch.cat((x, h), -1))).chunk(4, -1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.nc(c)), c

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.w.weight.new_zeros(batch, self.hidden_size)
        return zero, zero


class IndRNN(nn.Module):
    """Li et al. 2018: an elementwise rectified recurrence."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u = nn.Linear(inputs, n), nn.Parameter(torch.linspace(-0.9, 0.9, n))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.relu(self.w(x) + self.u * h)


class LEM(nn.Module):
    """Long expressive memory (Rusch et al. 2022); state (y, z)."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u, self.uz = nn.Linear(inputs, 4 * n), nn.Linear(n, 3 * n), nn.Linear(n, n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = state
        i1, i2, iz, iy = self.w(x).chunk(4, -1)
        h1, h2, hz = self.u(y).chunk(3, -1)
        slow, fast = torch.sigmoid(i1 + h1), torch.sigmoid(i2 + h2)
        z = (1 - slow) * z + slow * torch.tanh(iz + hz)
        return (1 - fast) * y + fast * torch.tanh(self.uz(z) + iy), z

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.uz.weight.new_zeros(batch, self.hidden_size)
        return zero, zero


class PeepholeLSTM(nn.Module):
    """Gers & Schmidhuber 2000: the gates see the cell state; state (h, c)."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u = nn.Linear(inputs, 4 * n), nn.Linear(n, 4 * n, bias=False)
        self.p = nn.Parameter(torch.randn(3, n) * 0.3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (self.w(x) + self.u(h)).chunk(4, -1)
        i, f = torch.sigmoid(i + self.p[0] * c), torch.sigmoid(f + self.p[1] * c)
        c = f * c + i * torch.tanh(g)
        return torch.sigmoid(o + self.p[2] * c) * torch.tanh(c), c

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.p.new_zeros(batch, self.hidden_size)
        return zero, zero


class TwoLevels(nn.Module):
    """A plain RNN that feeds a GRU: the first level does not see the second; a dict of states."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.low, self.high = nn.RNNCell(inputs, n), nn.GRUCell(n, n + 2)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        low = self.low(x, state["low"])
        high = self.high(low, state["high"])
        return high + low.sum(-1, keepdim=True), {"low": low, "high": high}

    def init_state(self, batch: int) -> dict[str, Tensor]:
        like = self.low.weight_hh
        return {"low": like.new_zeros(batch, self.low.hidden_size), "high": like.new_zeros(batch, self.high.hidden_size)}


class Affine(nn.Module):
    """A linear system with an output."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.a, self.b, self.c = nn.Linear(n, n), nn.Linear(inputs, n, bias=False), nn.Linear(n, 2)
        with torch.no_grad():
            self.a.weight.mul_(0.6)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(h) + self.b(x)
        return self.c(h), h


class Sparse(nn.Module):
    """Two groups of states held apart by a constant mask on the recurrent weight."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u = nn.Linear(inputs, n), nn.Parameter(torch.randn(n, n) * 0.4)
        group = torch.arange(n) % 2
        self.register_buffer("mask", (group[:, None] == group[None]).float())

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + h @ (self.u * self.mask).t())


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    inputs: int
    kind: str  # of the state Jacobian


CELLS = {
    "elementwise GRU": Case(lambda: ElementwiseGRU(7), 21, "diagonal"),
    "GRU": Case(lambda: nn.GRUCell(3, 10), 3, "dense"),
    "LSTM": Case(lambda: nn.LSTMCell(3, 9), 3, "dense"),
    "RNN tanh": Case(lambda: nn.RNNCell(3, 11), 3, "dense"),
    "RNN relu": Case(lambda: nn.RNNCell(3, 5, nonlinearity="relu"), 3, "dense"),
    "minGRU": Case(lambda: MinGRU(4, 6), 4, "diagonal"),
    "sLSTM": Case(lambda: SLSTM(5), 20, "block"),
    "block GRU": Case(lambda: BlockGRU(8, 3), 72, "block"),
    "layer norm GRU": Case(lambda: LayerNormGRU(3, 6), 3, "dense"),
    "IndRNN": Case(lambda: IndRNN(3, 9), 3, "diagonal"),
    "LEM": Case(lambda: LEM(3, 6), 3, "dense"),
    "peephole LSTM": Case(lambda: PeepholeLSTM(3, 6), 3, "dense"),
    "two levels": Case(lambda: TwoLevels(3, 5), 3, "block-triangular"),
    "affine": Case(lambda: Affine(3, 6), 3, "dense"),
    "sparse": Case(lambda: Sparse(3, 8), 3, "block"),
}
