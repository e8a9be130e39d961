"""What could give other answers than the loop without a word: each of these once did, and now agrees or is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqparc
from seqparc.errors import SeqparcError, SeqparcWarning, StateError, TraceError

pytestmark = pytest.mark.usefixtures("quick")


def agrees(rnn: seqparc.CompiledRNN, x: Tensor, state: Any = None) -> None:
    torch.testing.assert_close(rnn(x, state), rnn.sequential(x, state), rtol=1e-5, atol=1e-5)


def compiled(step: Callable[..., Any], n: int = 4) -> seqparc.CompiledRNN:
    return seqparc.compile(step, state=torch.zeros(n))


class Cell(nn.Module):
    """A cell of four numbers."""

    hidden_size, gain = 4, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.scale, self._mask, self._gate = np.float64(0.5), torch.ones(4), 1.0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.gain * self._gate * h * self._mask + x)


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "a NumPy number": lambda c, m: setattr(c, "scale", np.float64(0.9)),
    "a private tensor": lambda c, m: setattr(c, "_mask", torch.tensor([1.0, 0.0, 2.0, 0.0])),
    "a private number": lambda c, m: setattr(c, "_gate", 3.0),
    "an attribute of the class": lambda c, m: m.setattr(Cell, "gain", 0.9),
    "a method of the class": lambda c, m: m.setattr(Cell, "forward", lambda self, x, h: torch.sin(h + x)),
}


@pytest.mark.parametrize("calls", [1, 8])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts(change: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, x = seqparc.compile(Cell()), torch.randn(2, 9, 4)
    with torch.no_grad():
        for _ in range(calls):
            before, _ = rnn(x)
        CHANGES[change](rnn.cell, monkeypatch)
        agrees(rnn, x)
        assert not torch.equal(rnn(x)[0], before)


def test_an_index_that_is_computed_counts() -> None:
    class Permuted(nn.Module):
        hidden_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.arange(4.0))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(0.8 * h[:, self.order.argsort()] + x)

    rnn, x = seqparc.compile(Permuted()), torch.randn(2, 9, 4)
    agrees(rnn, x)
    rnn.cell.order.copy_(torch.tensor([3.0, 1.0, 0.0, 2.0]))
    agrees(rnn, x)


def test_a_detach_inside_a_function_of_torchs() -> None:
    class Chooses(nn.Module):
        hidden_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(0.5 * h + x)
            return F.gumbel_softmax(self.head(h), hard=True), h

    rnn, found = seqparc.compile(Chooses()), []
    x, c = torch.randn(2, 9, 4), torch.randn(2, 9, 5)
    for run in (rnn, rnn.sequential):
        torch.manual_seed(0)
        found += torch.autograd.grad((run(x)[0] * c).sum(), rnn.cell.head.weight)
    torch.testing.assert_close(*found)
    assert float(found[0].abs().max()) > 0


def test_integers_are_exact() -> None:
    rnn = seqparc.compile(lambda x, c: c + x, state=torch.zeros(1, dtype=torch.int64), signature="x, state -> state")
    x = torch.full((1, 40_000, 1), 1001)
    assert torch.equal(rnn(x)[0], x.cumsum(1))


def test_a_count_beside_a_threshold() -> None:
    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        v, c = state
        v = torch.where(x > 0, x, v)
        return v, c + (v >= 0.7)

    rnn = seqparc.compile(step, state=(torch.zeros(1), torch.zeros(1, dtype=torch.int64)), signature="x, state -> state")
    agrees(rnn, torch.full((1, 50, 1), 0.7))


@pytest.mark.parametrize("of", [lambda c: c & 3, lambda c: c | 4, lambda c: ~c])
def test_bits_of_integers(of: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        return torch.tanh(0.5 * h + x * of(c).to(h.dtype)), c + 1

    rnn = seqparc.compile(step, state=(torch.zeros(4), torch.zeros(1, dtype=torch.int64)), signature="x, state -> state")
    x = torch.randn(2, 20, 4)
    with pytest.warns(SeqparcWarning, match="bitwise"):
        y = rnn(x)[0]
    torch.testing.assert_close(y, rnn.sequential(x)[0])


def test_a_result_is_not_the_memory_of_an_input() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Linear(16, 16)

        def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(batch, 16), torch.zeros(batch, 16)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            h, before = state
            h = torch.tanh(self.u(h) + x - before)
            return h, (h, x)

    for rnn, n in ((seqparc.compile(Shift()), 16), (compiled(lambda x, h: (x, torch.tanh(h + x)), 3), 3)):
        x = torch.randn(2, 9, n)
        with torch.no_grad():
            for _ in range(8):
                kept = torch.utils._pytree.tree_leaves(rnn(x))
                copies = [t.clone() for t in kept]
                x.normal_()
                assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_cell_that_counts_its_calls() -> None:
    class Every(nn.Module):
        hidden_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.t = 0

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.t += 1
            h = torch.tanh(0.9 * h + x)
            return torch.zeros_like(h) if self.t % 10 == 0 else h

    with pytest.raises(StateError, match=r"changes t at each step.*its results depend on it"):
        seqparc.compile(Every())(torch.randn(2, 40, 4))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_that_are_not_torchs(draw: Callable[[], float]) -> None:
    rnn = compiled(lambda x, h: torch.tanh(0.9 * h + (0 * x if draw() < 0.3 else x)))
    x, found = torch.randn(1, 60, 4), []
    with pytest.warns(SeqparcWarning, match="runs as the plain loop.*random numbers of Python's or NumPy's"):
        rnn(x)
    for run in (rnn, rnn.sequential):
        random.seed(0)
        np.random.seed(0)
        found.append(run(x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("read", [lambda t: t.numpy(), lambda t: t.tolist(), np.asarray])
def test_numbers_that_are_read_in_python(read: Callable[[Tensor], Any]) -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        h = 0.9 * h + x
        return 0 * h if read(h.detach().abs().amax()) > 5 else h

    with pytest.raises(TraceError, match=r"test_silent.py.*reads a tensor's numbers in Python"):
        compiled(step)(torch.ones(1, 50, 4))


def _ball(x: Tensor, h: Tensor) -> Tensor:
    u = 0.9 * h + x
    return u / u.norm(dim=-1, keepdim=True).clamp_min(1.0)


STEEP: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "softplus": (lambda x, h: F.softplus(h + x), torch.ones(1, 150, 4)),
    "elu": (lambda x, h: F.elu(h + x), torch.ones(1, 150, 4)),
    "selu": (lambda x, h: F.selu(0.9 * h + x), torch.full((1, 150, 4), 20.0)),
    "norm": (_ball, torch.cat((torch.zeros(1, 3, 4), torch.ones(1, 9, 4)), 1)),
    "normalize": (lambda x, h: F.normalize(0.9 * h + x, dim=-1), torch.cat((torch.zeros(1, 3, 4), torch.ones(1, 9, 4)), 1)),
}


@pytest.mark.parametrize("name", STEEP)
def test_gradients_where_a_part_that_is_not_taken_is_steep(name: str) -> None:
    step, x = STEEP[name]
    rnn, found = compiled(step), []
    for run in (rnn, rnn.sequential):
        leaves = [x.clone().requires_grad_(), torch.zeros(1, 4, requires_grad=True)]
        found.append(torch.autograd.grad(run(*leaves)[0].sum(), leaves))
    assert all(bool(g.isfinite().all()) for g in found[1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [0.1, -0.1, "x"])
def test_the_floor_of_a_quotient(by: Any) -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + 0.1 * torch.div(h, x if by == "x" else by, rounding_mode="floor")

    rnn = compiled(step, 6)
    h = torch.tensor([[1.0, -1.0, 0.3, 0.7, -0.6, 0.0]])
    agrees(rnn, torch.full((1, 1, 6), 0.1), h)


@pytest.mark.parametrize("lengths", [[20, 5], [20, 0]])
def test_what_lies_past_an_end_does_not_reach_the_gradients(lengths: list[int]) -> None:
    class Grows(nn.Module):
        hidden_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((4,), 1.3))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.w * h + torch.log(x)

    rnn, x = seqparc.compile(Grows()), torch.rand(2, 600, 4) + 0.5
    (mine,) = torch.autograd.grad(rnn(x, lengths=lengths)[0].sum(), rnn.cell.w)
    right = sum(torch.autograd.grad(rnn.sequential(x[k : k + 1, :n])[0].sum(), rnn.cell.w)[0] for k, n in enumerate(lengths) if n)
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_a_cell_with_a_gradient_of_its_own_may_not_change_before_backward() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.save_for_backward(v)
            return (v > 0).to(v.dtype)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g / (1 + ctx.saved_tensors[0].abs()) ** 2

    class Spiking(nn.Module):
        hidden_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.w, self.drop = nn.Parameter(torch.rand(4)), nn.Dropout(0.5)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return 0.5 * h + self.drop(Spike.apply(self.w * h + x))

    rnn, x = seqparc.compile(Spiking()), torch.randn(2, 9, 4)
    y, _ = rnn(x)
    rnn.eval()
    with pytest.raises(SeqparcError, match="changed between a call and its backward"):
        y.sum().backward()
    rnn.train()
    y.sum().backward()
