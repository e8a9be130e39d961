"""Calls that go as earlier ones went, and may be asked for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime.routine import ALIKE

from .replays import Scaled, settled


@pytest.mark.parametrize("way", [lambda c, x, h: [x, *c.parameters()], lambda c, x, h: [x], lambda c, x, h: [h, c.w.weight]])
@pytest.mark.parametrize("steps", [1, 50])
def test_gradients_of_a_replayed_call(way: Callable[..., list[Tensor]], steps: int, replayed: list[bool]) -> None:
    torch.manual_seed(0)
    cell = Scaled().double()
    rnn = seqparc.compile(cell)
    for k in range(ALIKE + 6):
        cell.requires_grad_(False)
        x, h = torch.randn(2, steps, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in way(cell, x, h)]
        if k == ALIKE + 4:
            with torch.no_grad():
                cell.u.weight.mul_(0.5)  # as a step of an optimizer does
        found = []
        for call in (rnn, rnn.sequential):
            y, last = call(x, h)
            found.append([y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)])
        for mine, right in zip(*found, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    assert replayed[-1] and len(replayed) >= 2
    with torch.no_grad():
        y, _ = rnn(x, h)
    assert replayed[-1] and not y.requires_grad and torch.equal(y, found[0][0].detach())


class Damped(nn.Module):
    """Its output reads a number made of a weight that its state reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.rate = 3, nn.Parameter(torch.tensor([0.5, -0.3, 2.0]))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        leak = torch.exp(-self.rate.abs())
        h = torch.tanh(leak * h + x)
        return leak * h + x, h


@pytest.mark.parametrize("learns", [False, True])
def test_an_output_may_read_what_the_state_reads(learns: bool, replayed: list[bool]) -> None:
    cell = Damped().double()
    rnn, leaves = seqparc.compile(cell), [*cell.parameters()]
    for _ in range(ALIKE + 4):
        x = torch.randn(2, 9, 3, dtype=torch.float64)
        with torch.set_grad_enabled(learns):
            found = [call(x)[0] for call in (rnn, rnn.sequential)]
            if learns:
                found = [torch.autograd.grad(y.square().sum(), leaves)[0] for y in found]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            cell.rate.mul_(0.9)
    assert replayed[-1]


def test_a_gradient_of_the_cells_own_is_not_replayed(replayed: list[bool]) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + 0.5 * Twice.apply(h))

    rnn = seqparc.compile(cell, state=torch.zeros(3))
    x = torch.randn(1, 4, 3, requires_grad=True)
    for _ in range(ALIKE + 4):
        with torch.no_grad():
            rnn(x)
    assert replayed[-1]
    (g,) = torch.autograd.grad(rnn(x)[0].sum(), x)
    assert not replayed[-1]
    torch.testing.assert_close(g, torch.autograd.grad(rnn.sequential(x)[0].sum(), x)[0])


@pytest.mark.parametrize("calls", [0, 1, ALIKE + 4])
def test_a_start_that_is_learnt_has_its_gradient(calls: int) -> None:
    """Whatever was called before without gradients."""
    start = nn.Parameter(torch.randn(4))
    rnn, x = seqparc.compile(nn.GRUCell(3, 4), state=start), torch.randn(5, 3, 3)
    with torch.no_grad():
        for _ in range(calls):
            rnn(x)
    for _ in range(ALIKE + 4):
        found, right = (torch.autograd.grad(call(x)[0].square().sum(), start)[0] for call in (rnn, rnn.sequential))
        torch.testing.assert_close(found, right)
        with torch.no_grad():
            start.add_(0.1)
            torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0])
    late = torch.zeros(4)
    rnn = settled(nn.GRUCell(3, 4), x, state=late)
    late.requires_grad_()
    assert torch.autograd.grad(rnn(x)[0].sum(), late)[0].abs().max() > 0


def test_what_is_only_made_of_the_states_may_learn_alone(replayed: list[bool]) -> None:
    """The recurrence is then run as without gradients, by replays too."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size, self.gru, self.head = 4, nn.GRUCell(3, 4).requires_grad_(False), nn.Linear(4, 2)

        def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h = self.gru(x, h)
            return (h, self.head(h)), h

    cell = Headed()
    rnn, x = seqparc.compile(cell, backend="c"), torch.randn(2, 9, 3)
    for _ in range(ALIKE + 4):
        ((states, y), _), ((_, right), _) = rnn(x), rnn.sequential(x)
        assert states.is_contiguous()
        for mine, theirs in zip(*[torch.autograd.grad(t.sum(), [*cell.head.parameters()]) for t in (y, right)], strict=True):
            torch.testing.assert_close(mine, theirs)
    assert replayed[-1] and set(rnn.kernels()) == {("c", "forward")}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wide", [False, True])
def test_one_of_two_inputs_may_be_data(which: int, wide: bool, replayed: list[bool]) -> None:
    """wide: only a part of each input is read in the loop."""

    def cell(x: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
        a, b = (v[:, 1:4] if wide else v for v in x)
        return torch.tanh(a * h + torch.roll(h, 1, -1) * b)

    rnn, n = seqparc.compile(cell, state=torch.ones(3)), 5 if wide else 3
    for _ in range(ALIKE + 4):
        x = [torch.randn(2, 7, n).requires_grad_(k == which) for k in range(2)]
        found, right = (torch.autograd.grad(call(tuple(x))[0].square().sum(), x[which])[0] for call in (rnn, rnn.sequential))
        torch.testing.assert_close(found, right)
    assert replayed[-1]

