"""Small inputs rebuilt from public reports of what goes wrong elsewhere; the right value is the plain loop's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc

from . import cells
from .oracle import Runs, errors

DOUBLE = torch.float64


def close(mine: Any, right: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(seqparc.tree.flatten(mine)[0], seqparc.tree.flatten(right)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + float(b.detach().abs().max())))


def gradients_close(rnn: seqparc.CompiledRNN, x: Tensor, state: Any, use: Any, tolerance: float = 1e-10) -> None:
    """The gradients of use(y, last) with respect to x, the state and every parameter, compiled and by the plain loop."""
    found = []
    for run in (rnn, rnn.sequential):
        u = x.detach().clone().requires_grad_()
        leaves, structure = seqparc.tree.flatten(state)
        start = [s.detach().clone().requires_grad_() for s in leaves]
        total = use(*run(u, structure.unflatten(start)))
        wanted = [u, *start, *rnn.parameters()]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        found.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)])
    close(tuple(found[0]), tuple(found[1]), tolerance)


def float32_is_as_good_as_the_loop(cell: nn.Module, inputs: int, batch: int, steps: int, **options: Any) -> seqparc.CompiledRNN:
    runs = Runs(cell, inputs, batch, steps)
    truth = runs.truth()
    own = errors(runs.run(runs.plain, torch.float32), truth)
    rnn = seqparc.compile(cell, options=options)
    found = errors(runs.run(runs.compiled(rnn), torch.float32), truth)
    least = max(*own.values(), 1.2e-7)
    assert {n: (e, own[n]) for n, e in found.items() if not e <= 4 * max(own[n], least)} == {}
    return rnn  # type: ignore[no-any-return]


class LiGRU(nn.Module):
    """A rectified GRU without a reset gate."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w, self.u = nn.Linear(inputs, 2 * n), nn.Linear(n, 2 * n, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        a, z = (self.w(x) + self.u(h)).chunk(2, -1)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * torch.relu(a)


def test_length_is_not_compiled_in() -> None:
    rnn = seqparc.compile(LiGRU(4, 12).double())
    spent = []
    for steps in (64, 1024, 1500):
        x = torch.randn(2, steps, 4, dtype=DOUBLE)
        close(rnn(x), rnn.sequential(x))
        spent.append(rnn.stats.compile_seconds)
    assert len(rnn._engines) == 1 and spent[0] == spent[2]


def test_an_affine_cell_of_many_channels() -> None:
    a = torch.rand(256, dtype=DOUBLE)
    rnn = seqparc.compile(lambda x, h: a * h + x, state=torch.zeros(256, dtype=DOUBLE))
    x = torch.randn(64, 128, 256, dtype=DOUBLE)
    close(rnn(x), rnn.sequential(x))
    newton = seqparc.compile(lambda x, h: a * h + x, state=torch.zeros(256, dtype=DOUBLE), options={"strategy": "newton"})
    close(newton(x), rnn.sequential(x))
    assert newton.stats.passes <= 3  # linear: one update is exact, and is seen to be


@pytest.mark.parametrize("n", [16, 40])
def test_a_dense_cell_of_long_memory_takes_the_diagonal(n: int) -> None:
    cell = nn.GRUCell(4, n).double()
    with torch.no_grad():
        cell.bias_hh[n : 2 * n] += 3  # the update gate keeps
    x, state = torch.randn(2, 1024, 4, dtype=DOUBLE), torch.rand(2, n, dtype=DOUBLE)
    passes = {}
    for update in ("none", "diagonal"):
        rnn = seqparc.compile(cell, options={"strategy": "shooting", "chunks": 16, "warmup": 0, "update": update, "rtol": 1e-12})
        close(rnn(x, state), rnn.sequential(x, state))
        assert rnn.stats.update == update and rnn.stats.converged
        gradients_close(rnn, x, state, lambda y, last: y.square().sum() + last.sum())
        passes[update] = rnn.stats.passes
    assert passes["diagonal"] < passes["none"]


@pytest.mark.parametrize("d", [1, 3, 7, 17])
def test_widths_that_fill_no_vector(d: int) -> None:
    rnn = seqparc.compile(cells.ElementwiseGRU(d).double())
    x = torch.randn(3, 40, 3 * d, dtype=DOUBLE)
    close(rnn(x), rnn.sequential(x))
    gradients_close(rnn, x, torch.rand(3, d, dtype=DOUBLE), lambda y, last: y.square().sum() + last.sum())


LAYOUTS = {
    "strides (5, 5, 1)": lambda: torch.randn(4, 5, dtype=DOUBLE)[:, :5].as_strided((1, 4, 5), (5, 5, 1)),
    "batch and time swapped": lambda: torch.randn(7, 3, 5, dtype=DOUBLE).transpose(0, 1),
    "features first": lambda: torch.randn(5, 3, 7, dtype=DOUBLE).permute(1, 2, 0),
    "expanded over batch": lambda: torch.randn(1, 7, 5, dtype=DOUBLE).expand(3, 7, 5),
    "expanded over time": lambda: torch.randn(3, 1, 5, dtype=DOUBLE).expand(3, 7, 5),
    "every second step": lambda: torch.randn(3, 14, 5, dtype=DOUBLE)[:, ::2],
    "a slice of wider rows": lambda: torch.randn(3, 7, 9, dtype=DOUBLE)[..., 2:7],
}


@pytest.mark.parametrize("dense", [False, True], ids=["elementwise", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(layout: str, dense: bool) -> None:
    w = torch.randn(9, 9, dtype=DOUBLE)[::2, 1:6] * 0.3  # a weight that is a slice, too
    x = LAYOUTS[layout]()
    step = (lambda x, h: torch.tanh(h @ w.t() + x)) if dense else (lambda x, h: torch.tanh(w[0] * h + x))
    rnn = seqparc.compile(step, state=torch.zeros(5, dtype=DOUBLE))
    close(rnn(x), rnn.sequential(x))
    gradients_close(rnn, x, torch.rand(len(x), 5, dtype=DOUBLE), lambda y, last: (y * torch.arange(5.0)).sum())


@pytest.mark.parametrize("use", [lambda y, last: y[0].sum(), lambda y, last: y[1].sum(), lambda y, last: last[0].sum(),
                                 lambda y, last: last[1].square().sum(), lambda y, last: y[0][:, 2].sum()],
                         ids=["y h", "y c", "last h", "last c", "one step"])  # fmt: skip
def test_a_loss_that_uses_a_part(use: Any) -> None:
    rnn = seqparc.compile(nn.LSTMCell(3, 4).double())
    gradients_close(rnn, torch.randn(2, 5, 3, dtype=DOUBLE), (torch.rand(2, 4, dtype=DOUBLE), torch.rand(2, 4, dtype=DOUBLE)), use)


def test_a_parameter_that_is_closed_over_and_one_that_is_shared() -> None:
    w = nn.Parameter(torch.randn(4, 4, dtype=DOUBLE) * 0.4)
    scale = nn.Parameter(torch.rand(4, dtype=DOUBLE))

    def cell(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w.t() + scale * (x @ w))  # w in the prelude and in the core, scale in all three parts
        return h * scale, h * scale + 0.1

    rnn = seqparc.compile(cell, state=torch.zeros(4, dtype=DOUBLE))
    x = torch.randn(3, 30, 4, dtype=DOUBLE)
    found = []
    for run in (rnn, rnn.sequential):
        y, last = run(x)
        found.append(torch.autograd.grad(y.square().sum() + last.sum(), [w, scale]))
    close(found[0], found[1])


def test_two_layers_chained() -> None:
    one, two = seqparc.compile(nn.GRUCell(3, 6).double()), seqparc.compile(cells.ElementwiseGRU(2).double())
    x = torch.randn(2, 50, 3, dtype=DOUBLE, requires_grad=True)
    parameters = [x, *one.parameters(), *two.parameters()]
    assert len(parameters) == 6
    found = [
        torch.autograd.grad(b(a(x)[0])[0].square().sum(), parameters)
        for a, b in ((one, two), (one.sequential, two.sequential))
    ]
    close(found[0], found[1])


def test_a_start_state_and_its_gradient() -> None:
    for strategy in ("sequential", "shooting", "newton"):
        rnn = seqparc.compile(nn.RNNCell(4, 4).double(), options={"strategy": strategy, "chunks": 2 if strategy == "shooting" else None})
        x, h = torch.randn(1, 3, 4, dtype=DOUBLE), torch.randn(1, 4, dtype=DOUBLE)
        close(rnn(x, h), rnn.sequential(x, h))
        gradients_close(rnn, x, h, lambda y, last: last.sum() + y.square().sum())


def test_second_derivatives_raise() -> None:
    rnn = seqparc.compile(nn.RNNCell(4, 4))
    x = torch.randn(1, 3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(seqparc.SeqparcError, match="second derivative"):
        g.square().sum().backward()


@pytest.mark.parametrize("gain", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_dense_cell_is_not_taken_for_a_diagonal_one(gain: float) -> None:
    cell = nn.RNNCell(4, 16).double()
    with torch.no_grad():
        cell.weight_hh.copy_(gain * torch.linalg.qr(torch.randn(16, 16, dtype=DOUBLE))[0])
    rnn = seqparc.compile(cell)
    x = torch.randn(2, 256, 4, dtype=DOUBLE)
    close(rnn(x), rnn.sequential(x))
    assert rnn.engine().plan.structure.kind == "dense" and rnn.engine().plan.structure.pattern.all()


@pytest.mark.parametrize("strategy", ["auto", "sequential", "shooting", "newton"])
@pytest.mark.parametrize("saturated", [False, True], ids=["calm", "saturated"])
@pytest.mark.parametrize("steps", [256, 2048])
def test_exponential_gates(steps: int, saturated: bool, strategy: str) -> None:
    cell = cells.SLSTM(32)
    x = torch.randn(2, steps, 128)
    if saturated:
        x[:, ::7, 32:64] = -float("inf")  # log decay −inf: the cell forgets all at once
        x[:, 3::11, :32] = 60.0
        x[:, 5::13, 64:96] = 1e4
    rnn = seqparc.compile(cell, options={"strategy": strategy, "chunks": 8 if strategy == "shooting" else None})
    y, eager = rnn(x)[0], rnn.sequential(x)[0]
    assert torch.equal(y.isfinite(), eager.isfinite())
    torch.testing.assert_close(y, eager, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("make", [cells.LayerNormGRU, cells.LayerNormLSTM])
def test_layer_norms(make: Any) -> None:
    rnn = float32_is_as_good_as_the_loop(make(5, 12), 5, 2, 300)
    assert rnn.engine().plan.structure.kind == "dense"


def test_min_gru() -> None:
    rnn = float32_is_as_good_as_the_loop(cells.MinGRU(10, 100), 10, 8, 1000)
    assert rnn.engine().plan.structure.kind == "diagonal" and rnn.engine().plan.program.lanes == 100


def long_memory() -> nn.Module:
    cell = nn.LSTMCell(3, 10)
    with torch.no_grad():
        cell.bias_ih[10:20] += 3
    return cell


def lively() -> nn.Module:
    cell = nn.RNNCell(3, 16)
    with torch.no_grad():
        cell.weight_hh.copy_(torch.randn(16, 16) * 1.5 / 4)
    return cell


def heavy() -> nn.Module:
    cell = cells.ElementwiseGRU(9)
    with torch.no_grad():
        cell.u.mul_(3)
    return cell


@pytest.mark.parametrize("strategy", ["auto", "shooting", "newton"])
@pytest.mark.parametrize(("make", "inputs"), [(long_memory, 3), (lively, 3), (heavy, 27)], ids=lambda v: getattr(v, "__name__", ""))
def test_hard_dynamics_finish_exactly(make: Any, inputs: int, strategy: str) -> None:
    cell = make().double()
    rnn = seqparc.compile(cell, options={"strategy": strategy, "chunks": 16 if strategy == "shooting" else None})
    x = torch.randn(2, 1000, inputs, dtype=DOUBLE)
    close(rnn(x), rnn.sequential(x), 1e-9)
    assert rnn.stats.converged or rnn.stats.fallback


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["elementwise GRU", "GRU", "minGRU"])
def test_half_precision_is_stored_and_float32_computed(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cell = cells.CELLS[name].make().to(dtype)
    runs = Runs(cell, cells.CELLS[name].inputs, 2, 60)
    runs.x, runs.start = runs.x.to(dtype).double(), [s.to(dtype).double() for s in runs.start]
    truth = runs.truth()
    own = errors(runs.run(runs.plain, dtype), truth)
    rnn = seqparc.compile(cell)
    found = runs.run(runs.compiled(rnn), dtype)
    assert {t.dtype for t in found.values()} == {dtype}
    worst = max(own.values())
    assert all(e <= max(2 * worst, 4 * torch.finfo(dtype).eps) for e in errors(found, truth).values())
    assert rnn.stats.backend == "c"


@pytest.mark.parametrize("name", ["GRU", "elementwise GRU", "layer norm GRU"])
def test_autocast(name: str) -> None:
    cell = cells.CELLS[name].make()
    rnn = seqparc.compile(cell)
    x = torch.randn(2, 200, cells.CELLS[name].inputs)
    wanted = list(cell.parameters())
    close_to = {"rtol": 5e-2, "atol": 5e-2}
    plain = rnn(x)[0]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            right = rnn.sequential(x)[0]  # and leaves cast weights in autocast's cache
            y = rnn(x)[0]
            inside = torch.autograd.grad(y.float().square().mean(), wanted, retain_graph=True)
        torch.testing.assert_close(y, right, **close_to)
        exact = torch.autograd.grad(right.float().square().mean(), wanted)
        outside = torch.autograd.grad(y.float().square().mean(), wanted)
        for mine, also, theirs in zip(outside, inside, exact, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0.1 * scale)
            torch.testing.assert_close(also, mine, rtol=0, atol=0.02 * scale)
    torch.testing.assert_close(rnn(x)[0], plain, rtol=0, atol=0)  # nothing of it stays behind


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-12])
def test_small_gradients_are_as_exact_as_large_ones(scale: float) -> None:
    w = torch.full((8,), 0.97)
    rnn = seqparc.compile(lambda x, h: torch.tanh(w * h + x), state=torch.zeros(8), options={"strategy": "shooting", "chunks": 120})
    x = 0.1 * torch.randn(1, 6000, 8)
    found = []
    for run in (rnn, rnn.sequential):
        u = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(run(u)[0].square().sum() * scale, u)
        found.append(g / scale)
    assert float((found[0] - found[1]).abs().max() / found[1].abs().max()) < 5e-6


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_small_and_large_states_are_as_exact(scale: float) -> None:
    rnn = seqparc.compile(lambda x, h: 0.9 * h + x, state=torch.zeros(8), options={"strategy": "shooting", "chunks": 50})
    x = scale * torch.randn(1, 2000, 8)
    y, eager = rnn(x)[0], rnn.sequential(x)[0]
    assert float((y - eager).abs().max() / eager.abs().max()) < 2e-6
