"""Sequences of different lengths and states put back on the way, against the plain loop run sample by sample and stretch by stretch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from tests.test_kinds import KINDS

pytestmark = pytest.mark.usefixtures("quick")

CELLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "GRU": (lambda: nn.GRUCell(3, 5), (3,)),
    "LSTM": (lambda: nn.LSTMCell(3, 4), (3,)),
    **{
        name: (KINDS[name].make, KINDS[name].x)
        for name in ("spiking convolution", "a time axis in front", "a window shifted in place", "convolutions")
    },
}


def stretches(rnn: seqparc.CompiledRNN, x: Tensor, start: list[Tensor], lengths: list[int], reset: Tensor | None) -> list[Tensor]:
    """Leaves of y and of last, from plain loops between resets of one sample at a time."""
    _, convention, _ = rnn.understand(x)
    rows = []
    for b, length in enumerate(lengths):
        own = [s[b : b + 1] for s in start]
        now, outputs = own, []
        for t in range(length):
            if reset is not None and reset[b, t]:
                now = own
            out, now = convention.call(rnn.cell, [x[b : b + 1, t] * 1], [s * 1 for s in now])
            outputs.append(now if out is None else out)
        if outputs:
            columns = [torch.cat(column) for column in zip(*outputs, strict=True)]
            ys = [torch.cat((c, c.new_zeros(x.shape[1] - length, *c.shape[1:]))) for c in columns]
        else:
            out, following = convention.call(rnn.cell, [x[b : b + 1, 0] * 1], [s * 1 for s in own])
            ys = [c.new_zeros(x.shape[1], *c.shape[1:]) for c in (following if out is None else out)]
        rows.append([*ys, *(s[0] for s in now)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def gradients(results: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    total = sum(((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in results), torch.zeros(()))
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("how", ["lengths", "reset", "both"])
@pytest.mark.parametrize("name", CELLS)
def test_lengths_and_resets_are_loops_over_stretches(name: str, how: str, backend: str) -> None:
    torch.manual_seed(1)
    make, shape = CELLS[name]
    cell, steps = make().double(), 17
    rnn = seqparc.compile(cell, backend=backend, options={"strategy": "shooting", "chunks": 3, "warmup": 2})
    x = torch.randn(4, steps, *shape, dtype=torch.float64)
    _, convention, zero = rnn.understand(x)
    start = [torch.rand(s.shape, dtype=torch.float64).requires_grad_() for s in zero]
    lengths = [17, 5, 0, 12] if how != "reset" else [steps] * 4
    reset = (torch.rand(4, steps) < 0.2) if how != "lengths" else None
    given = x.clone()
    if how != "reset":
        for b, length in enumerate(lengths):
            given[b, length:] = float("nan")  # whatever lies there
    x.requires_grad_(), given.requires_grad_()
    y, last = rnn(given, convention.state.unflatten(start), lengths=torch.tensor(lengths) if how != "reset" else None, reset=reset)
    found = [*seqparc.tree.flatten(y)[0], *seqparc.tree.flatten(last)[0]]
    right = stretches(rnn, x, start, lengths, reset)
    for mine, correct in zip(found, right, strict=True):
        torch.testing.assert_close(mine, correct, rtol=1e-9, atol=1e-11)
    mine_g, right_g = (gradients(r, [i, *start, *cell.parameters()]) for r, i in ((found, given), (right, x)))
    for mine, correct in zip(mine_g, right_g, strict=True):
        torch.testing.assert_close(mine, correct, rtol=1e-9, atol=1e-10)
    assert rnn.stats.backend == backend


def test_lengths_may_be_a_list_and_all_of_it() -> None:
    rnn, x = seqparc.compile(nn.GRUCell(3, 4)), torch.randn(2, 9, 3)
    y, last = rnn(x, lengths=[9, 9])
    torch.testing.assert_close(y, rnn(x)[0])
    torch.testing.assert_close(last, rnn(x)[1])


def test_past_its_length_a_sample_is_given_what_its_cell_takes() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size = 3
            self.v = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(0.5 * h + self.v * torch.log(x))

    rnn, x = seqparc.compile(Log()), torch.rand(2, 6, 3) + 0.1
    x[1, 3:] = 0.0
    y, _ = rnn(x, lengths=[6, 3])
    (found,) = torch.autograd.grad(y.sum(), [rnn.cell.v])
    right = rnn(x[:1])[0].sum() + rnn(x[1:, :3])[0].sum()
    torch.testing.assert_close(found, torch.autograd.grad(right, [rnn.cell.v])[0])


def test_a_state_written_in_place_has_lengths_too() -> None:
    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h.mul_(0.9).add_(x)
        return torch.sin(h), h

    rnn, x = seqparc.compile(step, state=torch.zeros(3), signature="x, state -> out, state"), torch.randn(2, 9, 3)
    y, last = rnn(x, lengths=[9, 4])
    torch.testing.assert_close(y[1, :4], rnn(x)[0][1, :4])
    torch.testing.assert_close(last[1:], rnn(x[1:, :4])[1])


def test_lengths_reach_a_cell_that_runs_as_the_plain_loop() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        h = torch.linalg.matrix_exp(torch.diag_embed(h)).diagonal(dim1=-2, dim2=-1)
        return torch.tanh(x + h + 0 * torch.rand_like(x))  # unknown and random: it is not called for all chunks at once

    rnn, x = seqparc.compile(cell, state=torch.zeros(3)), torch.randn(2, 9, 3)
    with pytest.warns(seqparc.SeqparcWarning, match="runs as the plain loop"):
        y, last = rnn(x, lengths=[4, 9], reset=torch.arange(9).expand(2, 9) == 2)
    assert rnn.stats.backend == "eager"
    short, _ = rnn.sequential(x[:1, 2:4])
    torch.testing.assert_close(y[:1, 2:4], short)
    torch.testing.assert_close(last[0], short[0, -1])
    assert not y[0, 4:].any()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lengths": torch.tensor([3])}, r"lengths is torch.int64 of shape \[1\]; it must be ints \[batch\] = \[2\]"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths is torch.float32"),
        ({"lengths": [3, 10]}, "lengths go from 3 to 10; x has 9 steps"),
        ({"lengths": [-1, 2]}, "lengths go from -1 to 2"),
        ({"reset": torch.zeros(2, 9)}, r"reset is torch.float32 of shape \[2, 9\]; it must be bools \[batch, time\] = \[2, 9\]"),
        ({"reset": torch.zeros(9, dtype=torch.bool)}, r"reset is torch.bool of shape \[9\]"),
    ],
)
def test_what_does_not_fit_is_said(given: dict[str, Any], told: str) -> None:
    with pytest.raises(seqparc.ShapeError, match=told):
        seqparc.compile(nn.GRUCell(3, 4))(torch.randn(2, 9, 3), **given)
