"""What passes may cost before it is known whether they pay: by the clock, saved up for, and nothing wrong whatever the clock says."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from torch import nn

import seqparc
from seqparc.runtime import budget, driver
from seqparc.runtime.budget import PASS, SAVED, TRIAL, TRUST, Account, Budget, Pace, Tally
from seqparc.runtime.driver import Cut, Outcome
from seqparc.runtime.engine import Engine
from seqparc.spans import cut_evenly

STEPS = 1000


def alone() -> Outcome:
    return Outcome(torch.zeros(1), [])


def trial(cost: float, converged: bool = True, cut_short: bool = False) -> Outcome:
    waste = cost - STEPS if converged else cost
    return Outcome(torch.zeros(1), [], cost=cost, waste=waste, converged=converged, cut_short=cut_short)


def opened(step: float, once: float = 100.0) -> Account:
    return Account(Pace(step), once)


def test_a_run_that_takes_long_is_tried_at_once() -> None:
    assert opened(PASS / 50).waits(STEPS) is None  # a pass takes 150 of 1,000 steps


def test_a_trial_that_is_dear_is_saved_up_for() -> None:
    account, waited = opened(PASS / 500), 0  # 600 steps
    while account.waits(STEPS) is not None:
        account.settle(STEPS, alone(), STEPS * PASS / 500)
        waited += 1
    assert waited == 3 and account.budget(STEPS).steps >= 600  # of a seventh of each and what this one may spend
    account.settle(STEPS, trial(700, converged=False), 0)
    assert account.saved < 0, "what has been spent is gone"
    for _ in range(1000):
        account.settle(STEPS, alone(), STEPS * PASS / 500)
    assert account.saved == SAVED * STEPS


def test_a_pass_that_takes_as_long_as_the_whole_is_never_made() -> None:
    account = opened(PASS / 1000)
    for _ in range(100):
        account.settle(STEPS, alone(), STEPS * PASS / 1000)
    assert "a pass no less" in (account.waits(STEPS) or "")


def test_a_trial_that_was_cut_short_is_made_again_with_more() -> None:
    account = opened(PASS / 300)
    prices = []
    for _ in range(60):
        if account.waits(STEPS):
            account.settle(STEPS, alone(), STEPS * PASS / 300)
        else:
            account.settle(STEPS, trial(min(account.budget(STEPS).steps, 5 * STEPS), converged=False, cut_short=True), 0)
            prices.append(account.price)
    assert len(prices) >= 3 and all(b >= 2 * a for a, b in itertools.pairwise(prices)), prices
    account.settle(STEPS, trial(800), 0)
    assert account.price == 0 and account.budget(STEPS).steps >= 800, "what has converged may cost as much again"


def test_a_whole_run_tells_the_pace_better_than_its_beginning() -> None:
    account = opened(1e-9)
    account.settle(STEPS, alone(), 5e-3)
    assert account.pace == Pace(5e-6, whole=True)
    account.settle(STEPS, alone(), 9e-3)
    assert account.pace == Pace(5e-6, whole=True), "what disturbs makes it longer"


def test_where_steps_are_counted_nothing_is_saved() -> None:
    account = Account()
    for _ in range(10):
        account.settle(STEPS, trial(100), 1e-3)
    assert account.budget(STEPS) == Budget(TRUST * STEPS) and account.waits(STEPS) is None


def test_steps_are_counted_by_the_clock_where_the_pace_is_known() -> None:
    counted, timed = Tally(Budget(200)), Tally(Budget(200, Pace(2.0**-20)))
    for tally in (counted, timed):
        tally.add(50, 100 * 2.0**-20)
    assert (counted.cost, counted.rate, timed.cost, timed.rate) == (50, 1, 100, 2)
    assert counted.affords(150) and timed.affords(50) and not timed.affords(51)
    timed.exact = 30  # is not lost
    assert timed.affords(65) and not timed.affords(66)
    assert timed.by_the_clock(180, 200) and not timed.by_the_clock(181, 200) and not counted.by_the_clock(0, 200)


def test_an_account_is_opened_with_what_a_pass_counts() -> None:
    account = Account.opened(1e-3 + budget.CALL, 500, Cut(cut_evenly(1600, 16, 32), fill=8))
    assert account.pace == Pace(2e-6) and account.once == 100 * 2 + 32
    assert Account.opened(0.0, 500, Cut(cut_evenly(1600, 16, 32))).waits(1600), "what takes no time is no trial"


@pytest.mark.parametrize(("fill", "waits"), [(8, False), (4, False), (2.7, False), (2.5, True), (1, True)])
def test_the_first_run_may_spend_two_fifths(fill: float, waits: bool) -> None:
    account = Account.opened(1.0, 100, Cut(cut_evenly(1600, 16, 16), fill=fill))  # a pass counts 1,600 / fill + 16
    assert (account.waits(1600) is not None) == waits
    account.settle(1600, trial(TRUST * 1600, converged=False), 1.0)
    assert account.saved == 0 and account.budget(1600).steps == TRIAL * 1600


class Slow:
    """A clock in which a step of any kernel takes as long as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, step: float, call: float) -> None:
        self.now = 0.0
        kernel = engine.kernels["forward"][1]
        sweep = kernel.sweep

        def slow(spans: Any, *args: Any) -> Any:
            self.now += call + step * spans.longest
            return sweep(spans, *args)

        monkeypatch.setattr(kernel, "sweep", slow)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.mark.clocked
@pytest.mark.parametrize(("step", "call", "seen"), [(1e-5, 0.0, "shooting"), (1e-8, 5e-5, "sequential")])
def test_the_first_run_of_a_shape_is_cut_where_that_may_pay(monkeypatch: pytest.MonkeyPatch, step: float, call: float, seen: str) -> None:
    rnn = seqparc.compile(nn.GRUCell(3, 8))
    x = torch.randn(1, 8192, 3)
    with torch.no_grad():
        right = seqparc.compile(rnn.cell, options={"strategy": "sequential"})(x)[0]
        rnn(x[:, :64])
        engine = rnn.engine()
        assert isinstance(engine, Engine)
        Slow(monkeypatch, engine, step, call)
        y, _ = rnn(x)
        assert rnn.stats.strategy == seen
        torch.testing.assert_close(y, right)
        if seen == "sequential":
            assert torch.equal(y, right) and "the sequential kernel takes about" in rnn.stats.verdict


@pytest.mark.clocked
def test_what_has_begun_sequentially_goes_on_with_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PASS", 1e3)  # so that no pass is ever affordable
    monkeypatch.setattr(driver, "PIECE", 1000)
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 5).double()
    rnn, plain = seqparc.compile(cell), seqparc.compile(cell, options={"strategy": "sequential"})
    x = torch.randn(2, 4500, 3, dtype=torch.float64)
    found = []
    for module in (rnn, plain):
        y, last = module(x)
        found.append([y, last, *torch.autograd.grad(y.square().sum() + last.sum(), list(cell.parameters()))])
    assert rnn.stats.backward is not None and rnn.stats.strategy == rnn.stats.backward.strategy == "sequential"
    assert "takes about" in rnn.stats.verdict and "takes about" in rnn.stats.backward.verdict
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)


@pytest.mark.clocked
@pytest.mark.parametrize("asked", [{"chunks": 8}, {"warmup": 64}, {"strategy": "shooting"}, {"deterministic": True}, {"update": "none"}])
def test_the_clock_has_no_say_in_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(budget, "PASS", 1e3)
    rnn = seqparc.compile(nn.GRUCell(3, 8), options=asked)
    rnn(torch.randn(1, 8192, 3))
    assert rnn.stats.strategy == "shooting"


@pytest.mark.clocked
def test_a_trial_that_the_clock_cuts_short_teaches_nothing_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PASS", 1e-4)
    monkeypatch.setattr(budget, "CALL", 3e-4)
    rnn = seqparc.compile(lambda x, h: 3.9 * h * (1 - h) + 0 * x, state=torch.full((1,), 0.3))  # chaos
    x = torch.zeros(1, 20_000, 1)
    right = seqparc.compile(rnn.cell, state=torch.full((1,), 0.3), options={"strategy": "sequential"})(x)[0]
    rnn(x[:, :64])
    engine = rnn.engine()
    assert isinstance(engine, Engine)
    clock = Slow(monkeypatch, engine, 5e-8, 3e-4)  # 1 ms for all steps, more than 0.3 for a pass
    told = []
    for _ in range(24):
        begin = clock.now
        assert torch.equal(rnn(x)[0], right)
        told.append((rnn.stats.fallback or rnn.stats.verdict, clock.now - begin))
        if len(told) == 1:
            (known,) = engine.experience.values()
            assert known.warmup == 32 and not known.settled and known.why is None, "of what they would have come to nothing is known"
    assert "another pass would cost" in told[0][0] and all("saved up for" in why for why, _ in told[1:3])
    assert any("does not fall" in why for why, _ in told[3:])
    assert sum(seconds for _, seconds in told) < 1.3 * len(told) * 1.3e-3
