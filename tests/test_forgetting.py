"""How fast a cell forgets, what calls add up to, and the warning when a cell has become sequential."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.errors import SeqparcWarning
from seqparc.forgetting import forgetting
from seqparc.plan import Stats
from seqparc.runtime.engine import Engine
from seqparc.runtime.experience import Experience

pytestmark = pytest.mark.usefixtures("quick")


class Leak(nn.Module):
    """h' = p h + tanh(x), or the chaotic logistic map where p is above 1."""

    hidden_size = 1

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.where(self.p > 1, self.p * h * (1 - h), self.p * h + torch.tanh(x))


def followed(cell: Any, steps: int = 400, start: float = 0.3) -> Any:
    rnn = seqparc.compile(cell, state=torch.full((1,), start, dtype=torch.float64))
    leaves, convention, state = rnn.understand(torch.randn(2, steps, 1, dtype=torch.float64))
    return forgetting(rnn.cell, convention, leaves, state)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.97])
def test_the_steps_in_which_a_leak_forgets(p: float) -> None:
    found = followed(Leak(p).double())
    assert found.steps == math.ceil(math.log(1e-3) / math.log(p)) and found.rate == pytest.approx(math.log(p), rel=0.1)
    assert f"a thousand times smaller after {found.steps} steps" in found.lines()[0]


def test_an_integrator_never_forgets() -> None:
    found = followed(Leak(1.0).double())
    assert found.steps is None and found.rate == pytest.approx(0, abs=1e-9)
    assert "still there after 400 steps" in found.lines()[0] and "Jacobians" in found.lines()[1]


def test_the_exponent_of_a_chaotic_map() -> None:
    found = followed(Leak(4.0).double())
    assert found.steps is None and found.rate == pytest.approx(math.log(2), rel=0.5)  # over the few steps before it saturates
    assert "chaotic or unstable" in found.lines()[0]


def test_explain_tells_it_of_an_input() -> None:
    rnn = seqparc.compile(Leak(0.5))
    assert "a thousand times smaller after 10 steps" in dict(rnn.explain(torch.randn(2, 50, 1)).sections)["forgetting"][0]


def test_calls_add_up() -> None:
    rnn = seqparc.compile(Leak(0.9), options={"strategy": "shooting", "chunks": 4, "warmup": 0, "update": "none"})
    x, seen = torch.randn(2, 4000, 1), []
    for _ in range(3):
        y, _ = rnn(x)
        seen.append(rnn.stats)
    y.sum().backward()
    history = rnn.stats.history
    assert (history.calls, history.passes, history.fallbacks, history.given_up) == (3, sum(s.passes for s in seen), 0, 0)
    assert history.gap == max(s.gap for s in seen) and seen[0].history.calls == 1
    assert rnn.stats.backward is not None and rnn.stats.backward.history.calls == 1


def test_a_cell_that_becomes_sequential_says_so_once() -> None:
    cell = Leak(0.9)
    rnn = seqparc.compile(cell, state=torch.full((1,), 0.3))
    x = torch.randn(1, 20_000, 1)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                rnn(x)
        assert rnn.stats.chunks > 1 and rnn.stats.converged and rnn.stats.history.fallbacks == 0
        cell.p.fill_(3.9)  # as training may do
        with pytest.warns(SeqparcWarning, match=r"Leak has become sequential: its forward runs of 20000 steps") as told:
            for _ in range(6):
                y, _ = rnn(x)
        assert len(told) == 1 and rnn.stats.strategy == "sequential" and "did not converge" in str(rnn.stats.reasons)
        assert rnn.stats.history.fallbacks > 0 and rnn.stats.history.given_up > 0
        assert torch.equal(y, seqparc.compile(cell, state=torch.full((1,), 0.3), options={"strategy": "sequential"})(x)[0])


def test_a_cell_that_never_was_parallel_does_not_warn() -> None:
    rnn = seqparc.compile(Leak(3.9), state=torch.full((1,), 0.3))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            rnn(torch.randn(1, 20_000, 1))
    assert rnn.stats.strategy == "sequential" and rnn.stats.history.fallbacks == 2  # with two warm-ups


def test_a_backward_run_that_becomes_sequential_says_so_too() -> None:
    rnn = seqparc.compile(Leak(0.9))
    x = torch.randn(1, 20_000, 1)
    rnn(x)[0].sum().backward()
    engine = rnn.engine()
    assert isinstance(engine, Engine) and rnn.stats.backward is not None and rnn.stats.backward.chunks > 1
    shape = "backward", 1, (20_000).bit_length()
    engine.experience[shape] = Experience(32, 1.0, settled=True, passes=math.inf, why="as if it had not")
    with pytest.warns(SeqparcWarning, match=r"its backward runs of 20000 steps .* \(as if it had not\)"):
        rnn(x)[0].sum().backward()
    assert rnn.stats.backward.strategy == "sequential"


def test_statistics_have_a_verdict() -> None:
    rnn = seqparc.compile(Leak(0.9), options={"strategy": "shooting", "chunks": 8, "warmup": 40})
    rnn(torch.randn(1, 4000, 1, dtype=torch.float64).float())
    assert 0.5 < rnn.stats.memory * -math.log(0.9) < 3 and "in parallel" in rnn.stats.verdict  # of the largest of all gaps
    rnn(torch.randn(1, 4, 1))
    assert rnn.stats.memory is None or rnn.stats.chunks > 1
    rnn = seqparc.compile(Leak(3.9), state=torch.full((1,), 0.3))
    rnn(torch.randn(1, 4000, 1))
    assert "not in parallel: " in rnn.stats.verdict and "not in parallel" in str(rnn.explain())


def test_how_long_a_cell_remembers_is_told_by_the_second_pass_where_the_warm_up_does_not_tell() -> None:
    about = {"chunks": 16, "chunk_length": 100, "warmup": 32, "passes": 2}
    two = Stats(**about, gaps=(1.5, 1.5 * 0.9**100))
    assert two.memory == pytest.approx(1 / -math.log(0.9)) and "1/e in 9.49 steps" in two.verdict
    assert Stats(**about, gaps=(0.5**32, 0.5**32)).memory == pytest.approx(1 / math.log(2))
    never = Stats(**about, gaps=(1.5, 1.6))
    assert never.memory == math.inf and "1/e" not in never.verdict, "what is not known is not told"
    corrected = Stats(**about, update="exact", gaps=(1.5, 1e-3))
    assert corrected.memory == math.inf, "what a correction made of it is no decay"
