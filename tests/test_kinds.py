"""Kinds of cells that people write, each against its own plain loop in float64: values, last state, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc

pytestmark = pytest.mark.usefixtures("quick")


class ConvGRU(nn.Module):
    """A GRU whose products are convolutions; state [channels, height, width]."""

    def __init__(self, channels: int = 2, hidden: int = 4, **conv: Any) -> None:
        super().__init__()
        self.gates = nn.Conv2d(channels + hidden, 2 * hidden, 3, padding="same" if not conv else conv["padding"])
        self.new = nn.Conv2d(channels + hidden, hidden, 3, padding=1, groups=2)
        self.hidden = hidden

    def init_state(self, batch: int) -> Tensor:
        return self.new.weight.new_zeros(batch, self.hidden, 4, 3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, r = torch.sigmoid(self.gates(torch.cat((x, h), 1))).chunk(2, 1)
        n = torch.tanh(self.new(torch.cat((x, r * h), 1)))
        return (1 - z) * n + z * h


class Strided(nn.Module):
    """Convolutions with stride and dilation, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2)
        self.up = nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1)

    def init_state(self, batch: int) -> Tensor:
        return self.down.weight.new_zeros(batch, 2, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.up(torch.relu(self.down(h))) + x)


class ArcTan(torch.autograd.Function):
    """A step forward, a bell backward, written with in-place operations."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return g / (v * 1.5).pow_(2).add_(1)


class SpikingConv(nn.Module):
    """A spiking convolution: the gradient is the cell's own, and goes through the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.conv.weight.new_zeros(batch, 2, 3, 3)
        return zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, s = state
        v = 0.8 * v + x + self.conv(s) - s
        s = ArcTan.apply(v - 1)
        return s, (v, s)


class Stacked(nn.Module):
    """Puts a time axis in front for a function that wants one, as layers for single steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 3

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def fire(sequence: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out = []
            for x_t in sequence:
                v = v + (x_t - v) / 2
                s = ArcTan.apply(v - 0.3)
                v = v - s.detach() * 0.5
                out.append(s)
            return torch.stack(out), v

        out, v = fire(x.unsqueeze(0), v)
        return out.squeeze(0), v


class Shifted(nn.Module):
    """Keeps a window of past inputs, which it shifts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.w.new_zeros(batch, 4, 3), self.w.new_zeros(batch, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        window, h = state
        window = window.clone()
        window.copy_(torch.roll(window, -1, 1))
        window[:, -1] = x
        h = torch.tanh((window * self.w).sum(1) + 0.5 * h)
        return h * 2, (window, h)


class Squeezed(nn.Module):
    """Takes axes away in place from what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 3

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        y = x.unsqueeze(1).unsqueeze_(2).squeeze_(2)
        return torch.tanh(y.squeeze_(1).t_().t_() + h)


class OneStepLSTM(nn.Module):
    """A sequence layer used for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, num_layers=2)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.layer.weight_ih_l0.new_zeros(batch, 2, 4)
        return zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, last = self.layer(x.unsqueeze(0), tuple(s.transpose(0, 1).contiguous() for s in state))
        return y.squeeze(0), tuple(s.transpose(0, 1) for s in last)


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]
    x: tuple[int, ...]  # of one step of one sample


KINDS = {
    "convolutions": Kind(ConvGRU, (2, 4, 3)),
    "strided and transposed convolutions": Kind(Strided, (2, 8)),
    "spiking convolution": Kind(SpikingConv, (2, 3, 3)),
    "a time axis in front": Kind(Stacked, (3,)),
    "a window shifted in place": Kind(Shifted, (3,)),
    "axes taken away in place": Kind(Squeezed, (3,)),
    "a sequence layer for one step": Kind(OneStepLSTM, (3,)),
}


def run(call: Callable[..., Any], cell: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    results = [t for part in call(x * 1) for t in seqparc.tree.flatten(part)[0]]
    total = sum(((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in results), torch.zeros(()))
    grads = torch.autograd.grad(total, [x, *cell.parameters()])
    return [*(t.detach() for t in results), *grads]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_its_plain_loop(name: str, backend: str) -> None:
    torch.manual_seed(0)
    cell = KINDS[name].make().double()
    x = torch.randn(2, 19, *KINDS[name].x, dtype=torch.float64)
    rnn = seqparc.compile(cell, backend=backend)
    found = run(rnn, cell, x)
    assert rnn.stats.backend == backend
    for mine, right in zip(found, run(rnn.sequential, cell, x), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


def test_a_state_written_in_place_is_carried_and_the_callers_is_left_alone() -> None:
    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h.mul_(0.5).add_(x)
        return torch.sin(h), h

    x, h0 = torch.randn(2, 9, 3), torch.randn(2, 3)
    kept = h0.clone()
    rnn = seqparc.compile(step, signature="x, state -> out, state")
    y, last = rnn(x, h0)
    assert rnn.stats.backend == "c" and torch.equal(h0, kept)
    h = h0.clone()
    for t in range(9):
        torch.testing.assert_close(y[:, t], step(x[:, t], h)[0])
    torch.testing.assert_close(last, h)
    torch.testing.assert_close(rnn.sequential(x, h0)[0], y)
    assert torch.equal(h0, kept)


def test_a_state_written_in_place_and_given_out_is_refused() -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return h.mul_(0.5).add_(x)

    with pytest.raises(seqparc.TraceError, match=r"test_kinds.py:\d+ changes the state in place and the cell gives the state out too"):
        seqparc.compile(step, state=torch.zeros(3))(torch.randn(2, 9, 3))


def test_a_state_written_in_place_whose_tensor_was_given_out_is_refused() -> None:
    def leaky(x: Tensor, h: Tensor) -> Tensor:
        h.mul_(0.5)  # which is what the step before gave out
        return h + x

    with pytest.raises(seqparc.TraceError, match=r"test_kinds.py:\d+ changes the state in place and the cell gives the state out too"):
        seqparc.compile(leaky, state=torch.zeros(3))(torch.randn(2, 9, 3))


def test_the_plain_loop_leaves_x_alone() -> None:
    x = torch.randn(2, 9, 3)
    kept = x.clone()
    seqparc.compile(lambda x, h: torch.tanh(x.mul_(2) + h), state=torch.zeros(3)).sequential(x)
    assert torch.equal(x, kept)


def test_parameters_that_share_memory() -> None:
    cell = nn.GRUCell(3, 4)
    flat = torch.cat([p.detach().flatten() for p in cell.parameters()])
    at = 0
    for name, p in list(cell.named_parameters()):
        setattr(cell, name, nn.Parameter(flat[at : at + p.numel()].view(p.shape)))
        at += p.numel()
    rnn, x = seqparc.compile(cell), torch.randn(2, 9, 3)
    for mine, right in zip(run(rnn, cell, x), run(rnn.sequential, cell, x), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert rnn.stats.backend == "c"


def test_outputs_may_be_bools() -> None:
    rnn, x = seqparc.compile(lambda x, h: (h > 0, torch.tanh(h + x)), state=torch.zeros(3)), torch.randn(2, 9, 3)
    y, _ = rnn(x)
    assert y.dtype is torch.bool and rnn.stats.backend == "c" and torch.equal(y, rnn.sequential(x)[0])


def test_x_written_in_place_is_refused() -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x.add_(1) + h)

    with pytest.raises(seqparc.TraceError, match=r"test_kinds.py:\d+ changes x in place"):
        seqparc.compile(step, state=torch.zeros(3))(torch.randn(2, 9, 3))


def test_a_convolution_too_large_to_write_out_runs_by_itself() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def init_state(self, batch: int) -> Tensor:
            return self.conv.weight.new_zeros(batch, 64, 32, 32)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.conv(h) + x)

    rnn, x = seqparc.compile(Large()), torch.randn(1, 2, 64, 32, 32)
    told = r"test_kinds.py:\d+: a convolution of more than 20,000,000 products a step"
    with pytest.warns(seqparc.SeqparcWarning, match=told), torch.no_grad():
        y, _ = rnn(x)
    torch.testing.assert_close(y, rnn.sequential(x)[0])


class SparselyWired(nn.Module):
    """Synapses of their own between neurons, most of which are not there: products in runs of one or two elements."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.a, self.w = nn.Parameter(torch.randn(n, n)), nn.Parameter(torch.randn(n, n))
        self.register_buffer("wired", (torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.4).to(torch.get_default_dtype()))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        synapses = self.w * torch.sigmoid(self.a * h.unsqueeze(2)) * self.wired
        return torch.tanh(synapses.sum(1) + x)


def test_scattered_elements_share_loops() -> None:
    cell = SparselyWired(12).double()
    rnn = seqparc.compile(cell, options={"strategy": "shooting", "chunks": 3, "warmup": 4})
    x, found = torch.randn(2, 40, 12, dtype=torch.float64), []
    for run in (rnn, rnn.sequential):
        u = x.clone().requires_grad_()
        y, _ = run(u)
        found.append([y.detach(), *torch.autograd.grad((y * y.detach().cumsum(1)).sum(), [u, *cell.parameters()])])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10 * float(right.abs().max()))
    wired = int(cell.wired.sum())
    assert rnn.stats.backend == "c" and 0 < rnn.source("c").count("= sp_sigmoid(") < wired / 10
