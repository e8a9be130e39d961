"""What counts as converged, and what earlier runs teach: a jump is measured against what a number is and remembers, no more."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.plan import Choice
from seqparc.runtime import experience
from seqparc.runtime.budget import Account, Pace
from seqparc.runtime.driver import Cut, Outcome
from seqparc.runtime.experience import Experience
from seqparc.runtime.routine import ALIKE, Routine
from seqparc.spans import cut_evenly


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("rate", [0.9, 0.97, 0.98, 0.99, 0.999])
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
    monkeypatch.setattr(experience, "RETRY", 3)
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


def test_lengths_that_share_what_is_known_are_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experience, "RETRY", 20)
    torch.manual_seed(3)
    cell = nn.RNNCell(4, 24)
    with torch.no_grad():
        cell.weight_hh.mul_(12)
    rnn = seqparc.compile(cell, options={"atol": 0.0, "max_passes": 9})  # by counted steps
    seen = []
    with torch.no_grad():
        for k in range(160):
            rnn(torch.randn(1, (1000, 1020)[k % 2], 4))
            seen.append(rnn.stats.strategy)
    tried = [k for k, way in enumerate(seen) if way == "shooting"]
    assert len(tried) >= 5 and max(b - a for a, b in itertools.pairwise(tried)) <= 30, tried


def gru(bias: float) -> nn.Module:
    torch.manual_seed(0)
    cell = nn.GRUCell(8, 16)
    with torch.no_grad():
        cell.bias_ih[16:32] += bias
    return cell


def tanh_network(gain: float) -> nn.Module:
    torch.manual_seed(0)
    cell = nn.RNNCell(8, 64, bias=False)
    with torch.no_grad():
        cell.weight_hh.copy_(gain * torch.randn(64, 64) / 8)
        cell.weight_ih.mul_(0.3)
    return cell


@pytest.mark.parametrize(("cell", "passes"), [(gru(3), 5), (gru(5), 8), (tanh_network(0.9), 5), (tanh_network(1.0), 7)])
def test_numbers_that_cross_zero_slowly_or_cancel_converge(cell: nn.Module, passes: int) -> None:
    """What is left of the gap there is the rounding of what they were, and no pass makes it smaller."""
    x = torch.randn(1, 8192, 8, generator=torch.Generator().manual_seed(1))
    rnn = seqparc.compile(cell, options={"strategy": "shooting", "chunks": 16, "update": "none"})
    with torch.no_grad():
        y, _ = rnn(x)
        loop = seqparc.compile(cell, options={"strategy": "sequential"})(x)[0]
        right = seqparc.compile(copy.deepcopy(cell).double(), options={"strategy": "sequential"})(x.double())[0]
    assert rnn.stats.converged and rnn.stats.passes <= passes, rnn.stats
    assert float((y - right).abs().max()) < 2 * float((loop - right).abs().max()), "as near to float64 as the loop"


def test_a_state_that_is_still_being_forgotten_is_not_taken_for_rounding() -> None:
    """The gap falls by 0.6 per pass throughout, and is not done because it is small."""

    def step(x: Tensor, h: Tensor) -> Tensor:
        return rate * h + (1 - rate) * x

    length = 64
    rate = 0.6 ** (1 / length)
    x, state = torch.randn(1, 128 * length, 3), torch.zeros(3)
    rnn = seqparc.compile(step, state=state, options={"strategy": "shooting", "chunks": 128, "update": "none", "warmup": 1})
    y, _ = rnn(x)
    right = seqparc.compile(step, state=state, options={"strategy": "sequential"})(x)[0]
    assert rnn.stats.converged and float((y - right).abs().max()) < 1.5 * torch.finfo(torch.float32).eps  # of numbers of about 0.2


def took(seconds: float, alone: bool = False) -> tuple[float, Outcome, int]:
    return seconds, Outcome(torch.zeros(1), [], cost=0.0 if alone else 500.0), 1000


def test_the_faster_way_is_found_by_timing_both() -> None:
    known = Experience()
    for _ in range(3):
        assert known.slower is None
        known.timed(*took(5e-3))
    for _ in range(3):
        assert known.slower is not None and known.slower.startswith("timed")
        known.timed(*took(1e-3, alone=True))
    assert known.slower == "it took 1 µs a step, passes 5"
    for calls, runs in ((8, 3), (16, 3), (32, 3), (64, 1), (100, 1), (100, 1)):  # in the end one run is enough
        for left in range(calls, 0, -1):
            assert known.slower is not None and known.before_retry(64) == left - 1
            assert not known.ran_alone(64), "its warm-up is known for good"
        for _ in range(runs):
            assert known.slower is None, "tried again now and then, with threads that may be cold"
            known.timed(*took(5e-3))
    known.passing.clear()
    known.soon, (seconds, outcome, steps) = experience.SOON, took(0.5)
    known.timed(seconds, outcome, 100 * steps)
    assert known.slower == "it took 1 µs a step, passes 5", "one run is enough where it is much slower, and takes long"
    known.passing.clear()
    for _ in range(3):
        known.timed(*took(0.9e-3))
    assert known.slower is None


def test_a_sequential_run_that_takes_long_is_not_repeated() -> None:
    known = Experience()
    for _ in range(3):
        known.timed(*took(5e-3))
    known.timed(*took(2e-2, alone=True))
    assert known.slower is None


def test_passes_that_cost_little_are_not_compared() -> None:
    known = Experience()
    for _ in range(5):
        known.timed(0.5, Outcome(torch.zeros(1), [], cost=100.0), 1000)
    assert known.slower is None and not known.passing


def test_a_run_that_is_timed_is_exact_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rnn = seqparc.compile(nn.GRUCell(4, 4))
    x = torch.randn(1, 2048, 4)
    right = rnn.sequential(x)[0]
    monkeypatch.setattr(experience, "LIGHT", 1e9)
    seen = []
    with torch.no_grad():
        for _ in range(12):
            y, _ = rnn(x)
            torch.testing.assert_close(y, right)
            seen.append(rnn.stats.strategy == "sequential" and "timed" in rnn.stats.verdict)
    assert 1 <= sum(seen) <= 3 and not seen[0]


def test_nothing_is_learnt_where_runs_must_repeat() -> None:
    rnn = seqparc.compile(lambda x, h: 0.999 * h + x, state=torch.zeros(2), options={"deterministic": True, "update": "none"})
    x = torch.randn(1, 8192, 2)
    first, again = rnn(x)[0], rnn(x)[0]
    assert torch.equal(first, again) and not rnn.engine(x).experience  # type: ignore[union-attr]


def test_a_run_that_waits_for_a_trial_is_not_on_its_way_to_a_retry() -> None:
    """Else it would stay one short of it, watched each time."""
    known = Experience(account=Account(Pace(1e-9), once=100.0))
    assert not any(known.ran_alone(50) for _ in range(experience.RETRY)) and known.before_retry(50) == experience.RETRY
    known.account.pace = None  # where steps are counted none waits
    assert [known.ran_alone(50) for _ in range(experience.RETRY)].index(True) == experience.RETRY - 1
    assert known.before_retry(50) == experience.RETRY - 1


def test_a_retry_that_is_due_is_the_next_run() -> None:
    """And not after all the runs that may go by routine."""
    known = Experience()
    known.passing.extend([5e-6] * 3)
    known.alone.extend([1e-6] * 3)
    routine = Routine(Choice("sequential", 1, 0, ("none",), (), given_up=True), Cut(cut_evenly(1000, 1)))
    left = []
    for _ in range(experience.SOON):
        assert not known.ran_alone(1000)
        routine.saw(1000, Outcome(torch.zeros(1), []), known)
        left.append(routine.left if routine.alike >= ALIKE else 0)
    assert known.slower is None and left == [0, 0, 0, 3, 2, 1, 0, 0]
