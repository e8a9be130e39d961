"""Long sequences without gradients go through in slabs of time: what is made beside inputs and outputs is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime import slabs
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
