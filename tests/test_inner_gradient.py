"""Cells that take a derivative themselves, as fields of Hamiltonian networks do, and what they give every sample alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.errors import TraceError


def by_autograd(energy: nn.Module, y: Tensor) -> Tensor:
    with torch.enable_grad():
        y = y.requires_grad_(True)
        return torch.autograd.grad(energy(y).sum(), y, create_graph=True)[0]


def by_autograd_of_a_copy(energy: nn.Module, y: Tensor) -> Tensor:
    with torch.enable_grad():
        at = y if y.requires_grad else y.clone().requires_grad_(True)
        return torch.autograd.grad(energy(at).sum(), at, create_graph=True)[0]


def by_func(energy: nn.Module, y: Tensor) -> Tensor:
    return torch.func.grad(lambda v: energy(v).sum())(y)


def by_vmap(energy: nn.Module, y: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda v: energy(v).squeeze(-1)))(y)


class Field(nn.Module):
    """One step of Euler's along a Hamiltonian field."""

    def __init__(self, take) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1))
        self.take = take

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dq, dp = self.take(self.energy, y).unbind(-1)
        return y + x[:, None] * torch.stack((dp, -dq), -1)


@pytest.mark.parametrize("take", [by_autograd, by_autograd_of_a_copy, by_func, by_vmap])
def test_cells_take_derivatives_and_are_differentiated_themselves(take):
    torch.manual_seed(0)
    rnn = seqparc.compile(Field(take).double(), state=torch.zeros(2), backend="torch")
    report = rnn.validate(0.1 * torch.rand(3, 20).double(), torch.randn(3, 2).double())
    assert report.ok and report.stats.backend == "torch"
    assert not rnn.engine().plan.own_gradient


def test_a_derivative_without_a_history_is_a_constant_to_gradients():
    """As it is to autograd, which goes through the loop: not the derivative of what is computed."""

    def cell(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = y if y.requires_grad else y.clone().requires_grad_()
            (slope,) = torch.autograd.grad(nn.functional.softplus(at).sum(), at)
        return 0.5 * y + torch.tanh(slope + x)

    rnn = seqparc.compile(cell, state=torch.zeros(2), backend="torch")
    y0 = torch.randn(3, 2).double().requires_grad_()
    x = torch.randn(3, 9, 2).double()
    found, wanted = (torch.autograd.grad(run(x, y0)[0].sum(), y0)[0] for run in (rnn, rnn.sequential))
    assert torch.allclose(found, wanted) and torch.allclose(found, sum(0.5**k for k in range(1, 10)) * torch.ones_like(found))


def test_in_float32_the_oracle_takes_the_derivative_in_float64():
    torch.manual_seed(0)
    rnn = seqparc.compile(Field(by_vmap), state=torch.zeros(2))
    assert rnn.validate(0.1 * torch.rand(3, 40), torch.randn(3, 2)).ok


def test_what_parameters_give_every_sample_is_made_once():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(1, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            drive = self.lin(torch.ones(x.shape[0], 1)) + torch.ones(x.shape[0], 1) * torch.tensor([1.0, 2.0, 3.0])
            return torch.tanh(0.2 * drive * h + x)

    torch.manual_seed(0)
    rnn = seqparc.compile(Cell(), state=torch.zeros(3))
    assert rnn.validate(torch.randn(4, 50, 3)).ok
    assert rnn.stats.backend == "c"
    assert rnn.engine().plan.core.param_sizes == (3,)


def test_zeros_of_what_is_made_once_are_those_of_one_sample():
    """Each output's derivative is asked for by a row of an identity matrix, spread over the samples: 0 0 0 1 1 1 for three of them."""

    def cell(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = y if y.requires_grad else y.clone().requires_grad_()
            slope = torch.stack((at[:, 1], x - torch.sin(at[:, 0]) * (1 + 0.2 * at[:, 1])), 1)
            each = torch.eye(2, dtype=y.dtype)[:, None].expand(2, len(y), 2)
            (jacobian,) = torch.autograd.grad(slope, at, each, create_graph=True, is_grads_batched=True)
        return y + 0.1 * (jacobian.transpose(0, 1) @ torch.tanh(slope)[:, :, None])[:, :, 0]

    rnn = seqparc.compile(cell, state=torch.zeros(2), backend="torch")
    assert rnn.validate(torch.randn(2, 9).double(), torch.randn(2, 2).double()).ok


def test_what_differs_between_samples_is_no_parameter():
    w = torch.randn(3, requires_grad=True)

    def numbered(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(0.5 * h + x + torch.arange(x.shape[0])[:, None] * w)

    with pytest.raises(TraceError, match="sample"):
        seqparc.compile(numbered, state=torch.zeros(3))(torch.randn(2, 10, 3))


ACTIVATIONS = [nn.Softplus(), nn.ELU(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.Mish(), nn.LogSigmoid(), nn.Hardswish(), nn.LayerNorm(5)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_derivatives_of_activations_are_known(activation):
    """Of Softmax and others too; here are those that fields are made of."""
    torch.manual_seed(0)
    cell = Field(by_autograd).double()
    cell.energy = nn.Sequential(nn.Linear(2, 5), activation, nn.Linear(5, 1)).double()
    rnn = seqparc.compile(cell, state=torch.zeros(2), backend="torch")
    report = rnn.validate(0.1 * torch.rand(2, 9).double(), torch.randn(2, 2).double())
    assert report.ok and report.stats.backend == "torch"


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)], ids=lambda n: type(n).__name__)
def test_what_autograd_keeps_of_a_result_is_no_cut(norm):
    rnn = seqparc.compile(lambda x, h: (norm(h + x), 0.5 * torch.tanh(h + x)), state=torch.zeros(6), backend="torch")
    assert rnn.validate(torch.randn(2, 9, 6)).ok
    assert not rnn.engine().plan.own_gradient
