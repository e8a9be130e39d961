"""Cells that cut or replace their own gradient: values from the program, gradients from the user's code, exactly as the plain loop's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.convention import Convention
from seqparc.owngrad import own_gradient
from seqparc.passes import derivative, symbolic
from seqparc.tree import LEAF

pytestmark = pytest.mark.usefixtures("quick")


class Rough(torch.autograd.Function):
    """A rectifier with a smooth gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.clamp(-0.6, 0.6)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return g / (1 + v.abs()) ** 2


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator) * 0.4)
        self.a = nn.Parameter(torch.randn(4, generator=generator) * 0.5)
        self.u = nn.Parameter(torch.randn(4, 3, generator=generator))


class Detached(Base):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gate = torch.sigmoid(self.a * h.detach() + x @ self.u.t())
        return gate * torch.tanh(h @ self.w.t()) + (1 - gate) * h


class DetachedInput(Base):
    """The cut lies where the state is not: in what is computed from x alone."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.a * h + (x @ self.u.t()).detach() * x.sum(-1, keepdim=True))


class Surrogate(Base):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * Rough.apply(self.a * h + x @ self.u.t()) + 0.4 * h


class DenseSurrogate(Base):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return Rough.apply(h @ self.w.t() + x @ self.u.t()) * self.a


class NoGrad(Base):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 / (1 + h.abs())
        return torch.tanh(self.a * h * scale + x @ self.u.t())


class Readout(Base):
    """(out, state) with a cut on the way to the output."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a * h + x @ self.u.t())
        return Rough.apply(h) * h.data + x.sum(-1, keepdim=True), h


class Pair(Base):
    """A tuple state, one leaf of which only sees the other's value."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        v, z = state
        v = 0.8 * v + x @ self.u.t() - 0.3 * z.detach()
        return v, Rough.apply(v * self.a)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.a.new_zeros(batch, 4), self.a.new_zeros(batch, 4)


class Straight(Base):
    """A straight-through estimator."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        v = torch.tanh(self.a * h + x @ self.u.t())
        return v + (torch.round(4 * v) / 4 - v).detach()


CELLS = [Detached, DetachedInput, Surrogate, DenseSurrogate, NoGrad, Readout, Pair, Straight]


def results(rnn: seqparc.CompiledRNN, run: Any, x: Tensor, used: str) -> list[Tensor]:
    """Values and gradients of x, the start state and every parameter for a fixed cotangent of y, of last, or of both."""
    generator = torch.Generator().manual_seed(5)
    leaves, _, start = rnn.understand(x)
    xs = leaves[0].detach().clone().requires_grad_()
    ss = [(s.detach() + 0.2).requires_grad_() for s in start]
    y, last = run(xs, ss[0] if len(ss) == 1 else tuple(ss))
    outputs = [y] if isinstance(y, Tensor) else list(y)
    lasts = [last] if isinstance(last, Tensor) else list(last)
    chosen = {"y": outputs, "last": lasts, "both": outputs + lasts}[used]
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in chosen)
    wanted = [xs, *ss, *rnn.parameters()]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*outputs, *lasts, *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))]


@pytest.mark.parametrize("used", ["y", "last", "both"])
@pytest.mark.parametrize("strategy", ["sequential", "shooting"])
@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("make", CELLS, ids=lambda c: c.__name__)
def test_values_and_gradients_are_the_plain_loops(make: type[Base], backend: str, strategy: str, used: str) -> None:
    rnn = seqparc.compile(make().double(), backend=backend, options={"strategy": strategy, "chunks": 3})
    x = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mine, loops in zip(results(rnn, rnn, x, used), results(rnn, rnn.sequential, x, used), strict=True):
        torch.testing.assert_close(mine, loops, rtol=1e-10, atol=1e-12)
    assert rnn.stats.backend == backend and rnn.stats.backward is not None and rnn.stats.backward.backend == backend


class ComplexInput(nn.Module):
    """A complex input and state; the cut lies on the state's way or on the input's."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.a, self.cut = nn.Parameter(torch.randn(4, dtype=torch.complex128) * 0.3), cut

    def init_state(self, batch: int) -> Tensor:
        return self.a.new_zeros(batch, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.cut == "state":
            h = self.a * h + x * x.conj() - 0.1 * h.detach()
        else:
            h = self.a * h + x * x.detach()
        return h.real * 2, h


@pytest.mark.parametrize("cut", ["state", "input"])
def test_complex_inputs_have_their_gradients(cut: str) -> None:
    rnn = seqparc.compile(ComplexInput(cut))
    x = torch.randn(2, 9, 4, dtype=torch.complex128)
    found = []
    for run in (rnn, rnn.sequential):
        given = x.clone().requires_grad_()
        y, last = run(given)
        found.append(torch.autograd.grad(y.square().sum() + last.abs().sum(), [given, rnn.cell.a]))
    assert rnn.engine().plan.own_gradient
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [Surrogate, Straight], ids=lambda c: c.__name__)
def test_newton_does_not_use_the_surrogate(make: type[Base]) -> None:
    """The scan's Jacobian is the true one: passes stay few where the surrogate differs most."""
    rnn = seqparc.compile(make().double(), options={"strategy": "newton"})
    x = 3 * torch.randn(2, 60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0], rtol=1e-12, atol=1e-12)
    plan = rnn.engine().plan
    assert plan.own_gradient
    entry = derivative.entries(plan.program)[0][0]
    names = {v: f"{v.kind}{v.slot}_{v.index.array[0, 0]}" for v in ir.leaves([entry])}
    told = str(symbolic.to_sympy(entry, names))
    assert {"Surrogate": "where" in told, "Straight": told == "0"}[make.__name__], told


def test_second_derivatives_raise() -> None:
    rnn = seqparc.compile(Surrogate())
    x = torch.randn(1, 10, 3, requires_grad=True)
    (g,) = torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    with pytest.raises(seqparc.SeqparcError, match="second derivative"):
        g.sum().backward()


def test_what_is_found_names_the_line() -> None:
    convention = Convention(("x", "state"), LEAF, LEAF)
    x, h = torch.randn(3, 3), torch.randn(3, 4)
    for make, word in ((Detached, "detach at"), (NoGrad, "no_grad at"), (Surrogate, "autograd function Rough"), (Straight, "detach at")):
        found = own_gradient(make(), convention, [x], [h]).where
        assert any(word in f for f in found), found
        assert all("test_own_gradient.py" in f for f in found if " at " in f)


def test_ordinary_cells_carry_none() -> None:
    convention = Convention(("x", "state"), LEAF, LEAF)
    for cell in (nn.GRUCell(3, 4), nn.RNNCell(3, 4)):
        assert own_gradient(cell, convention, [torch.randn(3, 3)], [torch.randn(3, 4)]).where == ()
    assert own_gradient(lambda x, h: torch.tanh(h + x.detach()), convention, [torch.randn(3, 4)], [torch.randn(3, 4)]).where != ()


class Frozen(Base):
    """A step without gradients, and a state of which the output shows a part that has one."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            after = torch.tanh(self.a * h + x @ self.u.t())
        return (after if self.whole else after * self.a), after


@pytest.mark.parametrize("whole", [False, True])
def test_results_without_a_gradient_have_none_here_either(whole: bool) -> None:
    rnn = seqparc.compile(Frozen(whole))
    x = torch.randn(2, 9, 3, requires_grad=True)
    for run in (rnn, rnn.sequential):
        y, last = run(x)
        assert (y.requires_grad, last.requires_grad) == (not whole, False)


def test_a_parameter_that_is_frozen_when_the_cell_is_compiled_may_be_learnt_later() -> None:
    cell = Frozen(False)
    cell.requires_grad_(False)
    rnn = seqparc.compile(cell)
    x = torch.randn(2, 9, 3, requires_grad=True)
    rnn(x)
    cell.a.requires_grad_()
    for run in (rnn, rnn.sequential):
        assert torch.autograd.grad(run(x)[0].sum(), cell.a)[0].abs().max() > 0
