"""The stated model of a call's memory against what torch's allocator counts."""

from __future__ import annotations

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


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "elementwise": (CELLS["elementwise GRU"].make, 21),
    "dense": (lambda: nn.GRUCell(20, 32), 20),
    "with a readout": (Shown, 5),
    "in stages": (CELLS["two levels"].make, 3),
}


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_what_is_measured(name: str, save: str) -> None:
    make, inputs = CASES[name]
    rnn = seqparc.compile(make(), backend="c", options={"save": save})
    x = torch.randn(4, 3000, inputs)
    parameters = list(rnn.parameters())
    given = torch.randn_like(rnn(x)[0])
    rnn(x)[0].sum().backward()

    def backward() -> Any:
        y = rnn(x)[0]
        return y, torch.autograd.grad(y, parameters, given)

    def forward() -> Any:
        with torch.no_grad():
            return rnn(x)[0]

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
