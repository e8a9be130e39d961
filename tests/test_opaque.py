"""Cells with operations that are not known in the core: the cell itself, called for all chunks at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.errors import SeqparcWarning

pytestmark = pytest.mark.usefixtures("quick")

B, T, N = 3, 400, 6


class Odd(nn.Module):
    """The error function's inverse, of which the table has no row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(2 * N, N)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.erfinv(0.5 * torch.tanh(self.w(torch.cat([x, h], 1))))
        return h.cumprod(1), h


class Lookup(nn.Module):
    """What the state itself points at, and integers as input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, N))

    def forward(self, token: Tensor, h: Tensor) -> Tensor:
        at = (h.sum(1).abs() * 4).long() % 8
        return torch.tanh(0.4 * h + self.table[at] + self.table[token % 8])


@pytest.mark.parametrize("strategy", ["auto", "shooting", "sequential"])
def test_values_and_gradients(strategy: str) -> None:
    cell = Odd().double()
    chunks = {"chunks": 5, "warmup": 20} if strategy == "shooting" else {}
    rnn = seqparc.compile(cell, options={"strategy": strategy, **chunks})
    x, h = torch.randn(B, T, N, dtype=torch.float64, requires_grad=True), torch.randn(B, N, dtype=torch.float64, requires_grad=True)
    found = []
    with pytest.warns(SeqparcWarning, match=r"Odd runs on the torch backend.*test_opaque.py.*erfinv"):
        first = rnn(x, h)
    for y, last in (first, rnn.sequential(x, h)):
        found.append([y, last, *torch.autograd.grad((y * y.detach().cumsum(1)).sum() + last.sum(), [x, h, *cell.parameters()])])
    assert rnn.stats.backend == "torch" and rnn.stats.backward.backend == "c"  # its derivative has known operations
    assert (rnn.stats.chunks, rnn.stats.backward.chunks) > (1, 1) or strategy == "sequential"
    for a, b in zip(*found, strict=True):
        assert float((a - b).detach().abs().max()) < 1e-10 * float(1 + b.detach().abs().max())


def test_a_state_that_points_and_integer_inputs() -> None:
    rnn = seqparc.compile(Lookup())
    tokens = torch.randint(0, 2**30, (B, T))
    with pytest.warns(SeqparcWarning, match="Lookup runs on the torch backend"):
        y, _ = rnn(tokens, torch.zeros(B, N))
    assert torch.allclose(y, rnn.sequential(tokens, torch.zeros(B, N))[0], atol=1e-5)


def over_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + torch.erfinv(0.5 * torch.tanh(h - h.logcumsumexp(0))))


def all_zero(x: Tensor, h: Tensor) -> Tensor:  # which chunks other than the first hide
    return torch.where(torch.all(h == 0), x, torch.tanh(0.5 * h + x))


def inputs_over_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x.logcumsumexp(0) + torch.erfinv(0.5 * torch.tanh(h)))


@pytest.mark.parametrize("cell", [over_rows, all_zero, inputs_over_rows])
def test_samples_that_see_each_other_run_as_the_loop(cell: Any) -> None:
    rnn = seqparc.compile(cell)
    x, h = torch.randn(B, T, N), torch.zeros(B, N)
    with pytest.warns(SeqparcWarning, match="it runs as the plain loop"):
        y, _ = rnn(x, h)
    assert torch.equal(y, rnn.sequential(x, h)[0]) and rnn.stats.backend == "eager"


def test_a_known_operation_beside_an_unknown_one_may_not_mix_samples() -> None:
    with pytest.raises(seqparc.TraceError, match="one sample of the batch reads another"):
        seqparc.compile(lambda x, h: torch.erfinv(0.5 * torch.tanh(h - h.mean(0))) + x)(torch.randn(B, T, N), torch.zeros(B, N))


def test_known_operations_on_the_input_may_not_mix_samples_either() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + torch.softmax(x, 0) + torch.erfinv(0.5 * torch.tanh(h)))

    with pytest.raises(seqparc.TraceError, match=r"test_opaque.py.*one sample of the batch reads another"):
        seqparc.compile(cell)(torch.randn(B, T, N), torch.zeros(B, N))


def test_what_is_refused_before_an_unknown_operation_stays_refused() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + torch.erfinv(0.5 * torch.softmax(h, 0)))

    with pytest.raises(seqparc.TraceError, match=r"test_opaque.py.*one sample of the batch reads another"):
        seqparc.compile(cell)(torch.randn(B, T, N), torch.zeros(B, N))


def test_an_operation_that_is_told_the_batch_beside_an_unknown_one() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        wide = (x + torch.ones(x.shape[0], 1)).reshape(x.shape[0], 2, -1).flatten(1)
        return torch.tanh(wide + torch.erfinv(0.5 * torch.tanh(h)))

    rnn = seqparc.compile(cell)
    x, h = torch.randn(B, 50, N), torch.zeros(B, N)
    with pytest.warns(SeqparcWarning, match="runs on the torch backend"):
        y, _ = rnn(x, h)
    assert torch.allclose(y, rnn.sequential(x, h)[0], atol=1e-5)


def test_an_operation_that_is_not_known_for_complex_numbers_runs_as_the_loop() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(0.3 * h + x) / 2

    rnn = seqparc.compile(cell, state=torch.zeros(2, dtype=torch.complex64))
    x = torch.randn(2, 5, 2, dtype=torch.complex64)
    with pytest.warns(SeqparcWarning, match=r"runs as the plain loop.*tanh.*not known there for complex numbers"):
        y, _ = rnn(x)
    torch.testing.assert_close(y, rnn.sequential(x)[0])
