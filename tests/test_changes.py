"""Parameters, and all else that a cell is made of, change between calls: parametrisations, optimisers, other tensors, parts, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import seqparc
from tests.living import MODULES, close, eager, gradients, made, same

pytestmark = pytest.mark.usefixtures("quick")


def spectral(module: nn.Module, name: str) -> nn.Module:
    return parametrizations.spectral_norm(module, name).eval()  # while it trains it changes its buffers at every use


PARAMETRISED: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": spectral,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": torch.nn.utils.weight_norm,
}


@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "after it"])
@pytest.mark.parametrize(
    ("name", "how"), [("elementwise", "orthogonal"), ("LSTM layer", "weight norm"), *(("GRU", how) for how in PARAMETRISED)]
)
def test_parametrisations(name: str, how: str, first: bool) -> None:
    """Gradients are those of the parameters behind, and a step of an optimiser on those counts."""
    module, x = made(name, backend="torch")
    layer = isinstance(module, nn.RNNBase)
    if not first:
        module(x)
    PARAMETRISED[how](module if layer else module.cell, "weight_hh_l0" if layer else "w" if name == "elementwise" else "weight_hh")
    for _ in range(2):
        same(module, x)
        with parametrize.cached():
            mine = module(x)
        with torch.no_grad():
            close(mine, eager(module)(x))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_an_old_weight_norm_of_a_layer() -> None:
    layer, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 9, 3)
    torch.nn.utils.weight_norm(layer, "weight_hh_l0")
    compiled = seqparc.compile(layer, backend="torch")
    for _ in range(2):
        mine, right = compiled(x), layer(x)
        close(mine, right)
        close(gradients(mine, list(compiled.parameters())), gradients(right, list(layer.parameters())))
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(1.2)


def test_what_is_cached_is_not_found_out_from() -> None:
    """Under parametrize.cached() nothing that a trial computed, without gradients, is taken for the weight."""
    module, x = made("GRU", backend="torch")
    parametrizations.weight_norm(module.cell, "weight_hh")
    with parametrize.cached():
        mine = module(x)
    close(gradients(mine, list(module.parameters())), gradients(module.sequential(x), list(module.parameters())))


@pytest.mark.parametrize("name", MODULES)
def test_parameters_change_between_calls(name: str) -> None:
    module, x = made(name, backend="torch")
    parameters = list(module.parameters())
    for asked in (0, 1, 2):  # all, some, none of them trained
        for i, p in enumerate(parameters):
            p.requires_grad_(asked == 0 or (asked == 1 and i % 2 == 1))
            with torch.no_grad():
                p[..., ::2] = 0.0 if asked == 2 else p[..., ::2]  # a frozen one's zeros are taken out of the program
        same(module, x)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3)
    same(module, x)
    for p in parameters:
        p.requires_grad_()
    optimiser = torch.optim.AdamW(parameters, 0.1, foreach=True)
    module(x)[0].square().sum().backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    same(module, x)
    target: Any = module if isinstance(module, nn.RNNBase) else module.cell
    for key, p in list(target.named_parameters()):
        setattr(target, key, nn.Parameter(torch.randn_like(p)))
    same(module, x)
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in module.parameters())), module.parameters())  # views of one tensor
    same(module, x)
    module.load_state_dict({k: torch.randn(v.shape, dtype=torch.float64) for k, v in module.state_dict().items()}, assign=True)
    same(module, x.double())
    same(module.float(), x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        self.a = nn.Parameter(torch.rand(4))
        self.b = self.a

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.a * h + x) * self.b


def test_tied_parameters_and_their_untying() -> None:
    cell, x = Tied(), torch.randn(2, 9, 4)
    rnn = seqparc.compile(cell, backend="torch")
    same(rnn, x)
    cell.b = nn.Parameter(torch.rand(4))
    same(rnn, x)
    cell.a = cell.b
    same(rnn, x)


class Settings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        self.act: nn.Module = nn.Tanh()
        self.f, self.power, self.kind, self.on, self.bias = torch.sin, 2, "plus", True, None

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = self.act(0.5 * h + x if self.kind == "plus" else 0.5 * h - x) ** self.power
        h = self.f(h) if self.on else h
        return h if self.bias is None else h + self.bias


CHANGES: dict[str, Callable[[Settings], Any]] = {
    "a part": lambda c: setattr(c, "act", nn.Sigmoid()),
    "a function": lambda c: setattr(c, "f", torch.cos),
    "a whole number": lambda c: setattr(c, "power", 3),
    "a word": lambda c: setattr(c, "kind", "minus"),
    "a switch": lambda c: setattr(c, "on", False),
    "a tensor where none was": lambda c: setattr(c, "bias", torch.ones(4)),
    "a hook": lambda c: c.register_forward_hook(lambda m, given, out: 0.5 * out),
    "a hook on a part": lambda c: c.act.register_forward_pre_hook(lambda m, given: (2 * given[0],)),
    "forward": lambda c: setattr(c, "forward", lambda x, h: torch.tanh(x - h)),
}


def test_whatever_a_cell_is_made_of_may_change() -> None:
    rnn, x = seqparc.compile(Settings(), backend="torch"), torch.randn(2, 9, 4)
    before = rnn(x)[0]
    for what, change in CHANGES.items():
        change(rnn.cell)
        after = rnn(x)[0]
        assert not torch.allclose(after, before), what
        close(after, rnn.sequential(x)[0])
        before = after


def test_variables_that_a_function_closes_over_may_change() -> None:
    scale, act, drop = 0.5, torch.tanh, nn.Dropout(0.5)
    rnn = seqparc.compile(lambda x, h: drop(act(scale * h + x)), state=torch.zeros(4), backend="torch")
    x = torch.randn(2, 9, 4)
    drop.eval()
    close(rnn(x), rnn.sequential(x))
    scale = 0.9
    close(rnn(x), rnn.sequential(x))
    act = torch.sigmoid
    close(rnn(x), rnn.sequential(x))
    drop.train()
    torch.manual_seed(0)
    right = rnn.sequential(x)[0]
    torch.manual_seed(0)
    close(rnn(x)[0], right)


def test_hooks_on_every_module_that_are_a_users_count() -> None:
    rnn, x = seqparc.compile(Settings(), backend="torch"), torch.randn(2, 9, 4)
    before = rnn(x)[0]
    hook = nn.modules.module.register_module_forward_hook(lambda m, given, out: out * 0.5 if isinstance(m, nn.Tanh) else out)
    try:
        close(rnn(x)[0], rnn.sequential(x)[0])
        assert not torch.allclose(rnn(x)[0], before)
    finally:
        hook.remove()
    close(rnn(x)[0], before)


def test_a_parametrisation_that_changes_while_it_trains_is_refused() -> None:
    module, x = made("GRU", backend="torch")
    parametrizations.spectral_norm(module.cell, "weight_hh")
    with pytest.raises(seqparc.TraceError, match=r"parametrizations\.weight_hh\.0\._u in place.*run in evaluation"):
        module(x)
    same(module.eval(), x)
