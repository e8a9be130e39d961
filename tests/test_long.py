"""Long sequences without gradients go through in slabs of time: what is made beside inputs and outputs is bounded."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime import driver, slabs
from seqparc.tree import flatten

from .cells import CELLS
from .measured import measured

pytestmark = pytest.mark.usefixtures("quick")


class Narrow(nn.Module):
    """A GRU with a state of 16 bits, which is float32 between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(20, 6)

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 6, dtype=torch.bfloat16)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = self.cell(x, h.float())
        return new + h.float() + x.sum(-1, keepdim=True), new.bfloat16()


class Noisy(nn.Module):
    hidden_size = 4

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(0.5 * h + x * torch.rand_like(h) + nn.functional.dropout(x, 0.5))


CASES = {
    "GRU": (lambda: nn.GRUCell(20, 7), 20), "LSTM": (lambda: nn.LSTMCell(20, 9), 20),
    **{name: (CELLS[name].make, CELLS[name].inputs) for name in ("layer norm GRU", "two levels", "affine")},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MOST", 40_000)
    monkeypatch.setattr(slabs, "LEAST", 20)


def both(rnn: seqparc.CompiledRNN, monkeypatch: pytest.MonkeyPatch, *given: Any, **named: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of a call in slabs, and of one without."""
    found = []
    with torch.no_grad():
        for most in (40_000, 1 << 40):
            monkeypatch.setattr(slabs, "MOST", most)
            torch.manual_seed(1)
            found.append(flatten(list(rnn(*given, **named)))[0])
            told = any("slabs of about" in r for r in rnn.stats.reasons)
            assert told == (most == 40_000), rnn.stats
    return found[0], found[1]


@pytest.mark.parametrize("name", CASES)
def test_slabs_give_what_one_run_gives(name: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = CASES[name]
    rnn = seqparc.compile(make().double(), backend="torch", options={"strategy": "shooting", "chunks": 20, "warmup": 8})
    x = torch.randn(3, 200, inputs, dtype=torch.float64)
    for mine, right in zip(*both(rnn, monkeypatch, x), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


def test_one_after_the_other_they_are_the_sequential_run_bit_for_bit(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for cell in (Narrow(), nn.GRUCell(20, 7)):
        rnn = seqparc.compile(cell, backend="c", options={"strategy": "sequential"})
        for mine, right in zip(*both(rnn, monkeypatch, torch.randn(2, 900, 20)), strict=True):
            assert mine.dtype == right.dtype
            bound = 0 if mine.dtype is torch.bfloat16 else 1e-6
            torch.testing.assert_close(mine, right, rtol=bound, atol=bound)


def test_random_numbers_come_in_the_order_of_the_loop(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = seqparc.compile(Noisy().double(), backend="torch", options={"strategy": "shooting", "chunks": 20, "warmup": 8})
    x = torch.randn(2, 700, 4, dtype=torch.float64)
    (y, last), (right, last_right) = both(rnn, monkeypatch, x)
    torch.testing.assert_close((y, last), (right, last_right), rtol=1e-12, atol=1e-13)
    torch.manual_seed(1)
    torch.testing.assert_close(y, rnn.sequential(x)[0])


def test_lengths_and_resets(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = seqparc.compile(nn.GRUCell(20, 7).double(), backend="torch", options={"strategy": "shooting", "chunks": 20, "warmup": 8})
    x, reset = torch.randn(3, 200, 20, dtype=torch.float64), torch.rand(3, 200) < 0.02
    for mine, right in zip(*both(rnn, monkeypatch, x, lengths=torch.tensor([200, 70, 0]), reset=reset), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


def test_not_where_a_gradient_is_wanted_or_nothing_is_made(small: None) -> None:
    rnn = seqparc.compile(nn.GRUCell(20, 7), backend="c")
    rnn(torch.randn(2, 700, 20))[0].sum().backward()
    assert rnn.stats.backward is not None and not any("slabs" in r for r in rnn.stats.reasons)
    direct = seqparc.compile(CELLS["elementwise GRU"].make(), backend="c")
    with torch.no_grad():
        direct(torch.randn(2, 2000, 21))
    assert not any("slabs" in r for r in direct.stats.reasons)


def test_the_same_call_gives_the_same_bits(small: None) -> None:
    rnn = seqparc.compile(nn.GRUCell(20, 7), backend="c", options={"deterministic": True})
    x = torch.randn(2, 900, 20)
    with torch.no_grad():
        first, again = rnn(x)[0], rnn(x)[0]
    assert torch.equal(first, again) and "slabs" in rnn.stats.reasons[-1] and rnn.stats.history.calls > 2


@pytest.mark.parametrize("name", ["GRU", "affine"])
def test_memory_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MOST", 1 << 20)
    make, inputs = CASES[name]
    rnn = seqparc.compile(make(), backend="c")
    x = torch.randn(1, 50_000, inputs)
    with torch.no_grad():
        rnn(x)
        most, left, (y, _) = measured(lambda: rnn(x))
        assert left == pytest.approx(y.numel() * 4, rel=0.01) and most < left + 1.1 * (1 << 20)
        assert rnn.explain(x).memory["forward"].most == pytest.approx(most, rel=0.1)
        monkeypatch.setattr(slabs, "MOST", 1 << 40)
        assert measured(lambda: rnn(x))[0] > left + 1.5 * (1 << 20)  # there is something to be saved


# -- pieces of a sequential run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GRU", "elementwise GRU", "two levels"])
@pytest.mark.parametrize("piece", [64, 50])
def test_pieces_of_a_sequential_run_are_the_run(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CELLS[name].make()
    x = torch.randn(3, 201, CELLS[name].inputs)
    found = []
    for most in (piece, 1 << 16):
        monkeypatch.setattr(driver, "PIECE", most)
        rnn = seqparc.compile(cell, options={"strategy": "sequential"})
        u = x.clone().requires_grad_()
        y, last = rnn(u)
        leaves = [*flatten(y)[0], *flatten(last)[0]]
        loss = torch.stack([v.square().sum() for v in leaves]).sum()
        found.append((leaves, torch.autograd.grad(loss, [u, *cell.parameters()])))
    for mine, right in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(mine, right)
    for mine, right in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()))


def test_what_is_left_of_a_run_is_done_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PIECE", 70)
    cell = nn.RNNCell(3, 5)
    with torch.no_grad():
        cell.weight_hh.mul_(6)  # chaos
    x = torch.randn(2, 640, 3)
    rnn = seqparc.compile(cell, options={"strategy": "shooting", "chunks": 8, "max_passes": 1})
    weights = list(cell.parameters())
    found = torch.autograd.grad(rnn(x)[0].square().sum(), weights)
    assert rnn.stats.fallback and rnn.stats.backward is not None
    one = seqparc.compile(cell, options={"strategy": "sequential"})
    assert torch.equal(rnn(x)[0], one(x)[0])
    for mine, right in zip(found, torch.autograd.grad(one(x)[0].square().sum(), weights), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_an_interrupt_is_heard_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PIECE", 100)
    rnn = seqparc.compile(nn.GRUCell(3, 4), options={"strategy": "sequential"})
    x = torch.randn(1, 2000, 3)
    with torch.no_grad():
        right, _ = rnn(x)
        kernel = rnn.engine(x).kernels["forward"][1]  # type: ignore[union-attr]
        sweep, runs = kernel.sweep, []

        def told(*args: Any) -> Tensor:
            runs.append(1)
            if len(runs) == 3:
                signal.raise_signal(signal.SIGINT)
            return sweep(*args)

        monkeypatch.setattr(kernel, "sweep", told)
        was = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
        try:
            with pytest.raises(KeyboardInterrupt):
                rnn(x)
        finally:
            signal.signal(signal.SIGINT, was)
        assert len(runs) == 3
        torch.testing.assert_close(rnn(x)[0], right, rtol=0, atol=0)
