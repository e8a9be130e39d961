"""The stated model of a call's memory against what torch's allocator counts; and calls for which there is not enough."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime.memory import memory

from .cells import CELLS
from .measured import measured

pytestmark = pytest.mark.usefixtures("quick")


class Shown(nn.Module):
    """A GRU whose output is made of the states, before and after the step, and of x."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.cell, self.out = 24, nn.GRUCell(5, 24), nn.Linear(24, 7)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = self.cell(x, h)
        return torch.tanh(self.out(new - 0.5 * h)) * x.sum(-1, keepdim=True), new


class Logged(nn.Module):
    """What it reads at every step is made of x alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.w = 16, nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w * h + torch.log1p(x.abs()))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "elementwise": (CELLS["elementwise GRU"].make, 21),
    "dense": (lambda: nn.GRUCell(20, 32), 20),
    "with a readout": (Shown, 5),
    "an input that learns nothing": (Logged, 16),
    "in stages": (CELLS["two levels"].make, 3),
}


@pytest.mark.parametrize(("name", "save"), [(n, s) for n in CASES for s in ("recompute", "store")][:-1])
def test_the_model_is_what_is_measured(name: str, save: str) -> None:
    make, inputs = CASES[name]
    rnn = seqparc.compile(make(), backend="c", options={"save": save})
    x = torch.randn(4, 3000, inputs)
    parameters = list(rnn.parameters())
    given = torch.randn_like(rnn(x)[0])

    def backward() -> Any:
        y = rnn(x)[0]
        return y, torch.autograd.grad(y, parameters, given)

    def forward() -> Any:
        with torch.no_grad():
            return rnn(x)[0]

    forward(), backward()  # weights are laid out for each kernel once, and then kept with the module
    found = {"forward": measured(forward), "forward and backward": measured(backward)}
    told = rnn.explain(x)
    for what, (most, left, _) in found.items():
        model = told.memory[what]
        assert model.most == pytest.approx(most, rel=0.1), (what, model, most, left)
        assert model.left == pytest.approx(left, rel=0.1), (what, model, most, left)
        assert model.most == sum(model.parts.values())
    assert told.as_dict()["bytes"]["forward"]["most"] == told.memory["forward"].most
    lines = dict(told.sections)["memory of a call"]
    assert lines[0].startswith("forward: at most") and lines[1].startswith("forward and backward: at most")


def test_it_grows_with_the_shape() -> None:
    plan = seqparc.compile(nn.GRUCell(20, 32)).engine(torch.zeros(1, 2, 20)).plan  # type: ignore[union-attr]
    one, more = memory(plan, 2, 1000, True), memory(plan, 4, 3000, True)
    assert more.most == pytest.approx(6 * one.most, rel=1e-3)
    assert memory(plan, 2, 1000, True, "store").parts["stored for backward"] == 2 * 1000 * 4 * 32 * 4
    assert memory(plan, 2, 1000, True, of_x=True).left == one.left + 2 * 1000 * 20 * 4


# -- not enough of it ------------------------------------------------------------------------------------------------


class Fails:
    """Makes the `left`-th allocation from now on fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
        self.left: int | None = None
        self.error, self.message = error, message
        for name in ("new_empty", "new_zeros", "new_ones", "clone", "contiguous", "index_select", "tanh"):
            monkeypatch.setattr(torch.Tensor, name, self.failing(getattr(torch.Tensor, name)))
        for name in ("cat", "zeros", "zeros_like", "tanh", "sigmoid"):
            monkeypatch.setattr(torch, name, self.failing(getattr(torch, name)))

    def failing(self, real: Any) -> Any:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    raise self.error(self.message)
            return real(*args, **kwargs)

        return call

    def at(self, k: int, run: Callable[[], Any]) -> bool:
        """Run with the k-th allocation failing: whether that was reached. The error must come through as it is."""
        self.left = k
        try:
            run()
        except self.error as met:
            assert str(met) == self.message
            return True
        reached, self.left = self.left is None, None
        assert not reached, f"allocation {k} failed and nobody was told"
        return False


def figures(stats: Any) -> Any:
    return dataclasses.replace(stats, compile_seconds=0, seconds=None, history=None, backward=stats.backward and figures(stats.backward))


class Own(nn.Module):
    """A cell with a gradient of its own."""

    hidden_size = 3

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + 0.3 * h + 0.2 * h.detach())


ERRORS = {"python": (MemoryError, "none left"), "torch": (RuntimeError, "DefaultCPUAllocator: can't allocate memory")}


@pytest.mark.parametrize(("name", "error"), [("GRU", "python"), ("own gradient", "torch")])
def test_a_failed_call_leaves_nothing_behind(name: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Own() if name == "own gradient" else CELLS[name].make()
    x = torch.randn(2, 24, 3, requires_grad=True)
    wanted = [x, *cell.parameters()]

    def run(rnn: seqparc.CompiledRNN) -> tuple[list[Tensor], Any]:
        y, _ = rnn(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)], figures(rnn.stats)

    def fresh() -> seqparc.CompiledRNN:
        options = {"strategy": "shooting", "chunks": 3, "warmup": 2, "save": "store", "deterministic": True}
        return seqparc.compile(cell, backend="c", options=options)  # type: ignore[no-any-return]

    def as_before(rnn: seqparc.CompiledRNN) -> bool:
        found, told = run(rnn)
        return all(torch.equal(a, b) for a, b in zip(found, right, strict=True)) and told == stats

    right, stats = run(fresh())
    fails, rnn = Fails(monkeypatch, *ERRORS[error]), fresh()
    assert as_before(rnn)
    for k in itertools.count():
        if not fails.at(k, lambda: run(rnn)):
            break
        assert as_before(rnn), k
    assert k > 5
    for j in range(0, 200, 23):  # while it is being compiled
        rnn = fresh()
        if not fails.at(j, lambda: run(rnn)):  # noqa: B023
            break
        assert as_before(rnn), j
    assert j > 20


@pytest.mark.parametrize("error", ERRORS)
def test_what_a_cell_is_is_not_concluded_from_a_lack_of_memory(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Learned(nn.Module):
        """Its initial state is learned, and zero today: None is not zeros."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden_size, self.start = 3, nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
            return torch.tanh(x + (self.start.expand(len(x), 3) if h is None else h))

    x, fails = torch.randn(2, 5, 3), Fails(monkeypatch, *ERRORS[error])
    for k in itertools.count():
        try:
            assert fails.at(k, lambda: seqparc.compile(Learned(), backend="torch")(x)), "it was taken for zeros"
        except seqparc.StateError as told:
            assert "a state of its own" in str(told) and fails.left is not None
            fails.left = None
            break
    assert k > 5
