"""What counts as converged, and what earlier runs teach: a jump is measured against what a number is and remembers, no more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime import engine as engines
from seqparc.runtime.driver import Outcome
from seqparc.runtime.engine import Experience


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("rate", [0.9, 0.97, 0.99, 0.999])
def test_a_state_that_falls_from_a_great_height(rate: float, backend: str) -> None:
    """The start state is 1e8, everything later about 1: what is small against the start is not small."""

    def step(x: Tensor, h: Tensor) -> Tensor:
        return rate * h + (1 - rate) * torch.tanh(x)

    x = torch.randn(1, 4096 if backend == "c" else 1024, 4)
    start = torch.full((1, 4), 1e8)
    exact, _ = seqparc.compile(step, state=torch.zeros(4), backend=backend, options={"strategy": "sequential"})(x, start)
    for update in ("none", "exact"):
        options = {"strategy": "shooting", "chunks": 32, "update": update}
        rnn = seqparc.compile(step, state=torch.zeros(4), backend=backend, options=options)
        y, _ = rnn(x, start)
        error, lately = (y - exact).abs(), exact.abs().unfold(1, 64, 1).amax(-1)  # the largest of some steps
        assert float((error[:, 63:] / lately).max()) < 2e-5, (update, rnn.stats)


def test_gradients_that_fade_are_not_run_after() -> None:
    """A loss on the last step only: cotangents fall by 2 per step, and what they were is not asked of them to the last bit."""
    rnn = seqparc.compile(lambda x, h: torch.tanh(0.5 * h + x), state=torch.zeros(3), options={"strategy": "shooting", "chunks": 16})
    x = torch.randn(2, 2048, 3, requires_grad=True)
    y, _ = rnn(x)
    (mine,) = torch.autograd.grad(y[:, -1].sum(), x)
    (right,) = torch.autograd.grad(rnn.sequential(x)[0][:, -1].sum(), x)
    torch.testing.assert_close(mine, right)
    assert rnn.stats.backward is not None and rnn.stats.backward.converged and rnn.stats.backward.passes <= 3


def outcome(*gaps: float, converged: bool = True) -> Outcome:
    return Outcome(torch.zeros(1), [], passes=len(gaps), gaps=list(gaps), converged=converged)


def test_a_longer_warm_up_is_kept_while_it_helps() -> None:
    known = Experience(32, math.inf)
    known.learn(outcome(1e-2, 0), 32, 100, 1e-5)
    assert known.warmup == 64 and not known.settled
    known.learn(outcome(1e-4, 0), 64, 100, 1e-5)
    assert known.warmup == 128 and not known.settled
    known.learn(outcome(9e-5, 0), 128, 100, 1e-5)  # no better: what is left is something else, but too much to be rounding
    assert known.warmup == 64 and known.settled and known.passes == 1 and known.floor == 0
    known.learn(outcome(9e-5, 1e-6, 0), 64, 100, 1e-5)
    assert known.warmup == 64 and known.passes == 3
    known.learn(outcome(1.0, 1.0, converged=False), 64, 100, 1e-5)
    assert known.passes == math.inf


def test_a_longer_warm_up_is_kept_while_passes_get_fewer() -> None:
    known = Experience(32, math.inf)
    known.learn(outcome(*[0.5] * 8, 0), 32, 100, 1e-5)
    known.learn(outcome(*[0.4] * 5, 0), 64, 100, 1e-5)
    assert known.warmup == 128 and not known.settled
    known.learn(outcome(*[0.3] * 5, 0), 128, 100, 1e-5)
    assert known.warmup == 64 and known.settled


def test_what_rounding_leaves_is_learnt() -> None:
    known = Experience(32, math.inf)
    known.learn(outcome(2e-6, 0), 32, 100, 1e-5)
    known.learn(outcome(3e-6, 0), 64, 100, 1e-5)
    assert known.settled and known.warmup == 32 and known.floor == 6e-6
    torch.manual_seed(0)
    cell = nn.LSTMCell(8, 64)
    rnn = seqparc.compile(cell)
    x = torch.randn(4, 2048, 8, requires_grad=True)
    wanted = [x, *cell.parameters()]
    exact = torch.autograd.grad(rnn.sequential(x)[0][0].sum(), wanted)
    for _ in range(4):
        found = torch.autograd.grad(rnn(x)[0][0].sum(), wanted)
        for mine, right in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
    assert rnn.stats.backward is not None and rnn.stats.backward.passes == 1


def test_a_cell_that_does_not_forget_is_soon_run_sequentially(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RETRY", 3)
    torch.manual_seed(3)
    cell = nn.RNNCell(4, 24)
    with torch.no_grad():
        cell.weight_hh.mul_(12)  # chaos
    rnn = seqparc.compile(cell)
    x = torch.randn(1, 4096, 4)
    seen = []
    with torch.no_grad():
        for _ in range(12):
            rnn(x)
            seen.append(rnn.stats.strategy)
    assert seen[0] == "shooting" and "sequential" in seen[:6]
    first = seen.index("sequential")
    assert seen[first : first + 4] == ["sequential"] * 3 + ["shooting"], "tried again now and then"


def test_nothing_is_learnt_where_runs_must_repeat() -> None:
    rnn = seqparc.compile(lambda x, h: 0.999 * h + x, state=torch.zeros(2), options={"deterministic": True, "update": "none"})
    x = torch.randn(1, 8192, 2)
    first, again = rnn(x)[0], rnn(x)[0]
    assert torch.equal(first, again) and not rnn.engine(x).experience  # type: ignore[union-attr]
