"""More from public reports, by kind of cell: masks per step, resets, thresholds, filters, inner steps, blocks, tiny long ones.

The right value is the plain loop's, in float64 where it says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc

from . import cells
from .test_field import DOUBLE, close, float32_is_as_good_as_the_loop, gradients_close

pytestmark = pytest.mark.usefixtures("quick")


def everything(y: Any, last: Any) -> Tensor:
    """A number that all of a run's results move."""
    leaves = [t for part in (y, last) for t in seqparc.tree.flatten(part)[0]]
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in leaves)  # type: ignore[return-value]


class Zoneout(nn.Module):
    """A GRU that keeps each number of its state with a chance of p, drawn anew at every step."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.cell, self.p = nn.GRUCell(3, 6), p

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        keep = torch.rand_like(h) < self.p
        return torch.where(keep, h, self.cell(x, h))


def test_zoneout_has_a_mask_of_every_step_in_backward_too() -> None:
    cell = Zoneout().double()
    rnn = seqparc.compile(cell)
    x, h = torch.randn(2, 50, 3, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    found = []
    for run in (rnn, rnn.sequential):
        u, start = x.clone().requires_grad_(), h.clone().requires_grad_()
        torch.manual_seed(11)
        y, last = run(u, start)
        found.append([y, last, *torch.autograd.grad(everything(y, last), [u, start, *cell.parameters()])])
    close(tuple(found[0]), tuple(found[1]))
    kept = (found[0][0][:, 1:] == found[0][0][:, :-1]).double().mean()
    assert 0.2 < float(kept) < 0.4  # the masks differ from step to step


@pytest.mark.parametrize("name", ["GRU", "elementwise GRU"])
def test_three_percent_of_resets(name: str) -> None:
    case = cells.CELLS[name]
    cell = case.make().double()
    rnn = seqparc.compile(cell)
    x = torch.randn(16, 128, case.inputs, dtype=DOUBLE)
    reset = torch.rand(16, 128) < 0.03
    _, _, start = rnn.understand(x)
    y, last = rnn(x, reset=reset)
    now, rows = start[0], []
    for t in range(128):
        now = cell(x[:, t], torch.where(reset[:, t, None], start[0], now))
        rows.append(now)
    assert reset.any()
    close((y, last), (torch.stack(rows, 1), now))


class Threshold(nn.Module):
    """A neuron per number that fires and is put back, with the derivative of an arctangent."""

    class Fire(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.save_for_backward(v)
            return (v > 0).to(v.dtype)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            (v,) = ctx.saved_tensors
            return g / (1 + (torch.pi * v) ** 2)

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w, self.decay = nn.Linear(n, n, bias=False), nn.Parameter(torch.rand(n))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, z = state
        v = torch.sigmoid(self.decay) * v * (1 - z.detach()) + x + self.w(z)
        z = self.Fire.apply(v - 1)
        return z, (v, z)


class Compressor(nn.Module):
    """An envelope that rises with one time constant and falls with another, in decibels, and the gain it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.attack, self.release = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.995))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        loud = 20 * torch.log10(x.abs().clamp_min(1e-4))
        pole = torch.where(loud > level, self.attack, self.release)
        level = pole * level + (1 - pole) * loud
        return x * 10 ** (-torch.relu(level + 20) * 0.75 / 20), level


def test_rectifiers_and_thresholds_of_64() -> None:
    cell = nn.RNNCell(5, 64, nonlinearity="relu").double()
    rnn = seqparc.compile(cell)
    x, h = torch.randn(2, 100, 5, dtype=DOUBLE), torch.randn(2, 64, dtype=DOUBLE)
    close(rnn(x, h), rnn.sequential(x, h))
    gradients_close(rnn, x, h, everything)
    cell = Threshold(64).double()
    rnn = seqparc.compile(cell)
    x, state = torch.randn(2, 100, 64, dtype=DOUBLE), (torch.zeros(2, 64, dtype=DOUBLE),) * 2
    y, _ = rnn(x, state)
    assert torch.equal(y, rnn.sequential(x, state)[0]) and y.any()  # a spike is there or not
    gradients_close(rnn, x, state, everything)


def test_a_compressor() -> None:
    cell = Compressor().double()
    rnn = seqparc.compile(cell)
    x = torch.sin(torch.arange(3000, dtype=DOUBLE) / 7).expand(2, 3000)[..., None] * torch.rand(2, 3000, 1, dtype=DOUBLE)
    level = torch.full((2, 1), -60.0, dtype=DOUBLE)
    close(rnn(x, level), rnn.sequential(x, level))
    gradients_close(rnn, x, level, everything)
    assert rnn.stats.converged and rnn.stats.chunks > 1


class Filter(nn.Module):
    """A linear filter of some order in transposed direct form: one companion block per channel."""

    def __init__(self, poles: list[complex], channels: int = 1) -> None:
        super().__init__()
        a = torch.ones(1, dtype=torch.complex128)
        for p in poles:
            a = torch.nn.functional.pad(a, (0, 1)) - p * torch.nn.functional.pad(a, (1, 0))
        self.a = nn.Parameter(a.real[1:].float())
        self.b = nn.Parameter(0.3 * torch.randn(len(poles) + 1))

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:  # s [batch, channels, order]
        y = self.b[0] * x + s[..., 0]
        shifted = torch.nn.functional.pad(s[..., 1:], (0, 1))
        return y, shifted + self.b[1:] * x[..., None] - self.a * y[..., None]


@pytest.mark.parametrize("poles", [[0.97 + 0.1j, 0.97 - 0.1j], [0.9, 0.95 + 0.2j, 0.95 - 0.2j]], ids=["second", "third"])
def test_linear_filters(poles: list[complex]) -> None:
    cell = Filter(poles)
    rnn = seqparc.compile(cell, state=torch.zeros(1, len(poles)))
    x = torch.randn(8, 16384, 1)
    with torch.no_grad():
        y, _ = rnn(x)
    wide = Filter(poles).double()
    wide.load_state_dict({k: v.double() for k, v in cell.state_dict().items()})
    right, _ = seqparc.compile(wide, state=torch.zeros(1, len(poles), dtype=DOUBLE), options={"strategy": "sequential"})(x.double())
    assert rnn.engine().plan.scalar and rnn.stats.chunks > 1
    assert float((y - right).detach().abs().max() / right.detach().abs().max()) < 2e-5
    short = x[:2, :700].double()
    state = torch.randn(2, 1, len(poles), dtype=DOUBLE)
    gradients_close(seqparc.compile(wide), short, state, everything, 1e-9)


class LiquidTime(nn.Module):
    """A liquid time-constant neuron: six inner steps of its differential equation for every input, over an elapsed time."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.sense, self.w = nn.Linear(inputs, n), nn.Parameter(torch.rand(n, n))
        self.mu, self.erev = nn.Parameter(torch.rand(n, n)), nn.Parameter(torch.sign(torch.randn(n, n)))
        self.leak, self.capacity = nn.Parameter(torch.rand(n)), nn.Parameter(0.5 + torch.rand(n))

    def forward(self, x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
        drive, c = self.sense(x), self.capacity * 6 / dt
        for _ in range(6):
            open_ = self.w * torch.sigmoid(3 * (v[:, :, None] - self.mu))
            v = (c * v + self.leak * 0.2 + (open_ * self.erev).sum(1) + drive) / (c + self.leak + open_.sum(1) + 1e-8)
        return v


class ClosedForm(nn.Module):
    """The closed form of such a neuron: two answers, and a gate by elapsed time between them."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.back = nn.Linear(inputs + n, 16)
        self.f, self.g, self.a, self.b = (nn.Linear(16, n) for _ in range(4))

    def forward(self, x: Tensor, h: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        z = 1.7159 * torch.tanh(0.666 * self.back(torch.cat([x, h], 1)))
        t = torch.sigmoid(self.a(z) * dt + self.b(z))
        h = torch.tanh(self.f(z)) * (1 - t) + t * torch.tanh(self.g(z))
        return h, h


@pytest.mark.parametrize("make", [LiquidTime, ClosedForm])
def test_elapsed_time_is_an_input(make: Any) -> None:
    cell = make(16, 6).double()
    rnn = seqparc.compile(cell, signature="x, h, dt -> h" if make is LiquidTime else "x, h, dt -> out, h")
    x, dt, h = torch.randn(2, 300, 16, dtype=DOUBLE), 0.5 + torch.rand(2, 300, 1, dtype=DOUBLE), torch.rand(2, 6, dtype=DOUBLE)
    found = []
    for run in (rnn, rnn.sequential):
        u, t, s = (v.clone().requires_grad_() for v in (x, dt, h))
        y, last = run((u, t), s)
        found.append([y, last, *torch.autograd.grad(everything(y, last), [u, t, s, *cell.parameters()])])
    close(tuple(found[0]), tuple(found[1]), 1e-9)
    assert rnn.stats.backend == "c"


def test_eight_blocks_of_64() -> None:
    rnn = float32_is_as_good_as_the_loop(cells.BlockGRU(8, 64), 1536, 2, 40)
    assert rnn.engine().plan.program.lanes == 8


@pytest.mark.parametrize("n", [16, 32])
def test_a_tiny_lstm_over_a_long_signal(n: int) -> None:
    cell = nn.LSTMCell(1, n)
    rnn = seqparc.compile(cell)
    t = torch.arange(20480) / 44100
    x = (torch.sin(440 * 6.283 * t) * torch.exp(-t * 5))[None, :, None]
    with torch.no_grad():
        (y, _), _ = rnn(x)
        lstm = nn.LSTM(1, n, batch_first=True).double()
        lstm.load_state_dict({f"{k}_l0": v.double() for k, v in cell.state_dict().items()})
        right = lstm(x.double())[0]
        own = float((lstm.float()(x)[0].double() - right).abs().max())
    assert rnn.stats.chunks > 1 and float((y.double() - right).abs().max()) <= 4 * max(own, 1.2e-7)
