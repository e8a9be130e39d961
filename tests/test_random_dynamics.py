"""Dynamics nobody chose: gains, biases, eigenvalues, lengths and ways to cut, drawn at random; chaos, overflow and NaN included.

Whatever a cell does, what a run gives must be a run of it: every state follows from the one before, up to rounding. That can be asked of a
chaotic cell as well, where two correct runs have nothing to do with each other after a while.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import seqparc

pytestmark = pytest.mark.clocked

#: Rounding units by which a state may miss what follows from the one before: what a jump between chunks may be, when it counts as none.
UNITS = 64
#: Gradients: times the error that the sequential kernel's have, which counts as at least this many units.
FACTOR, LEAST = 8, 64
#: In float64 they may differ by this part of the largest, unless that shows that they grow without bound.
DOUBLE, CHAOTIC = 1e-10, 1e6


#: (h [batch, n], x [batch, n], w [n, n], p [2]) -> h; p are the numbers that make a dynamics what it is.
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "tanh network": lambda h, x, w, p: torch.tanh(p[0] * (h @ w) + x),
    "gated": lambda h, x, w, p: (lambda z: z * h + (1 - z) * torch.tanh(p[0] * (h @ w) + x))(torch.sigmoid(x + p[1])),
    "elementwise gate": lambda h, x, w, p: (lambda z: z * h + (1 - z) * torch.tanh(p[0] * h + x))(torch.sigmoid(p[0] * h + p[1])),
    "affine": lambda h, x, w, p: 0.1 * p[0] * (h @ w) + x,
    "scaled": lambda h, x, w, p: (1 + 0.01 * p[1]) * h + x,
    "integrator": lambda h, x, w, p: h + 0.1 * torch.tanh(x),
    "logistic": lambda h, x, w, p: (2.5 + 0.15 * p[0].abs()) * h * (1 - h) + 0 * x,
    "spikes": lambda h, x, w, p: torch.where(h > 1, 0.0, torch.sigmoid(p[1]) * h + 0.3 * x.abs()),
    "sign": lambda h, x, w, p: torch.tanh(p[0]) * h - 0.5 * torch.sign(h) + x,
    "stiff": lambda h, x, w, p: h - (1 + torch.tanh(p[0])) * (h - torch.sin(x)),
    "cubic": lambda h, x, w, p: h + 0.05 * (p[0] * h - h**3 + x),
    "exponential": lambda h, x, w, p: torch.exp(-h.abs()) * p[0] + 0.5 * h + x,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A run as data, so that one that fails is shown and shrinks."""

    kind: str
    n: int
    gain: float
    bias: float
    steps: int
    strategy: str
    chunks: int | None
    warmup: int | None
    update: str
    double: bool
    broken: bool  # whether an input is NaN
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32


class Cell(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.hidden_size = recipe.kind, recipe.n
        generator = torch.Generator().manual_seed(recipe.seed)
        self.w = nn.Parameter((torch.randn(recipe.n, recipe.n, generator=generator, dtype=torch.float64) / recipe.n**0.5).to(recipe.dtype))
        self.p = nn.Parameter(torch.tensor([recipe.gain, recipe.bias], dtype=recipe.dtype))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return STEPS[self.kind](h, x, self.w, self.p)


def results(cell: Cell, run: Callable[[Tensor, Tensor], Any], x: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """States, and the gradients of x, the start and the parameters."""
    x, h = x.detach().clone().requires_grad_(), h.detach().clone().requires_grad_()
    y, last = run(x, h)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad((y * weights).sum() + last.sum(), [x, h, *cell.parameters()], materialize_grads=True, allow_unused=True)
    return y.detach(), list(grads)


def follows(cell: Cell, x: Tensor, h: Tensor, y: Tensor) -> None:
    """Every state is what the cell makes of the one before."""
    before = torch.cat((h[:, None], y[:, :-1]), 1).flatten(0, 1)
    with torch.no_grad():
        right = cell(x.flatten(0, 1), before).reshape(y.shape).double()
        precise = Cell.__new__(Cell)
        nn.Module.__init__(precise)
        precise.kind, precise.w, precise.p = cell.kind, cell.w.double(), cell.p.double()
        own = (precise.forward(x.flatten(0, 1).double(), before.double()).reshape(y.shape) - right).abs().nan_to_num(0, 0, 0)
    finite = right.isfinite()
    assert torch.equal(y.double().nan_to_num(7.0)[~finite], right.nan_to_num(7.0)[~finite]) and torch.equal(y.isfinite(), finite)
    size, lately = [], h.abs().double().nan_to_num(0, 0, 0)
    for t in range(y.shape[1]):  # a number that crosses zero is judged by what it was just before
        lately = torch.maximum(lately / 2, y[:, t].abs().double().nan_to_num(0, 0, 0))
        size.append(lately)
    bound = UNITS * torch.finfo(y.dtype).eps * (torch.stack(size, 1) + torch.finfo(y.dtype).tiny) + 4 * own
    missed = ((y.double() - right).abs() > bound) & finite
    assert not missed.any(), (missed.nonzero()[:5].tolist(), float(((y.double() - right).abs() / bound)[finite].max()))


def largest(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.abs().flatten() for t in tensors] + [torch.zeros(1)]).max())


def check(recipe: Recipe) -> None:
    cell = Cell(recipe)
    options = {"strategy": recipe.strategy, "chunks": recipe.chunks, "warmup": recipe.warmup, "update": recipe.update}
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    x = torch.randn(2, recipe.steps, recipe.n, generator=generator, dtype=torch.float64).to(recipe.dtype)
    h = torch.rand(2, recipe.n, generator=generator, dtype=torch.float64).to(recipe.dtype)
    if recipe.broken:
        x[1, recipe.steps // 2, 0] = float("nan")
    rnn = seqparc.compile(cell, backend="c", options=options)
    y, grads = results(cell, rnn, x, h)
    follows(cell, x, h, y)
    assert rnn.stats.backend == "c" and rnn.stats.backward is not None
    # Gradients against the sequential kernel's, which err as much as the dynamics make them.
    one = seqparc.compile(cell, backend="c", options={"strategy": "sequential"})
    _, right = results(cell, one, x, h)
    precise = cell.double() if recipe.double else Cell(recipe).double()
    _, truth = results(precise, seqparc.compile(precise, backend="c", options={"strategy": "sequential"}), x.double(), h.double())
    rows = list(zip(grads, right, truth, strict=True))
    assert all(torch.equal(mine.isnan(), kernel.isnan()) for mine, kernel, _ in rows)
    finite = [[t.double()[m.isfinite() & k.isfinite() & e.isfinite()] for t in (m, k, e)] for m, k, e in rows]
    # They share their scale of error: the kernel may have been lucky in one of them.
    scale = largest([e for _, _, e in finite])
    lost, off = largest([k - e for _, k, e in finite]), largest([m - k for m, k, _ in finite])
    if recipe.double:
        assert scale > CHAOTIC or off <= DOUBLE * scale
    else:
        assert lost > scale / 1000 or off <= FACTOR * max(lost, LEAST * torch.finfo(recipe.dtype).eps * scale)


def recipes(longest: int) -> st.SearchStrategy[Recipe]:
    few = st.sampled_from
    return st.builds(
        Recipe, kind=few(list(STEPS)), n=few([1, 3, 12]), gain=st.floats(-10, 10, width=32), bias=st.floats(-6, 6, width=32),
        steps=st.integers(1, longest), strategy=few(["auto", "shooting", "newton"]), chunks=st.none() | st.integers(1, 40),
        warmup=st.none() | st.integers(0, 70), update=few(["auto", "none", "diagonal", "exact"]), double=st.booleans(),
        broken=few([False, False, False, True]), seed=st.integers(0, 99),
    )  # fmt: skip


#: Runs that something was wrong with, once or on purpose, as they shrank. What the suites below find belongs here too.
FOUND = {
    "the sequential kernel went on one chunk too late": Recipe(
        "tanh network", n=1, gain=1.0, bias=0.0, steps=4, strategy="auto", chunks=None, warmup=0, update="auto", double=False, broken=False,
        seed=0,
    ),
    "a correction that overflows": Recipe(
        "affine", n=3, gain=10.0, bias=0.0, steps=400, strategy="newton", chunks=None, warmup=None, update="exact", double=False,
        broken=False, seed=3,
    ),
    "NaN from the middle on": Recipe(
        "gated", n=12, gain=3.0, bias=5.0, steps=500, strategy="shooting", chunks=9, warmup=3, update="diagonal", double=True, broken=True,
        seed=1,
    ),
    "jumps that cross zero slowly": Recipe(
        "gated", n=12, gain=1.0, bias=5.0, steps=5000, strategy="shooting", chunks=16, warmup=32, update="none", double=False, broken=False,
        seed=5,
    ),
    "lengths that differ by one": Recipe(
        "elementwise gate", n=3, gain=-2.0, bias=1.0, steps=499, strategy="shooting", chunks=40, warmup=7, update="none", double=True,
        broken=False, seed=9,
    ),
}  # fmt: skip

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", seqparc.errors.SeqparcWarning)
        check(FOUND[what])


@pytest.mark.usefixtures("quick")
@settings(max_examples=50, derandomize=True, database=None, **QUIET)
@given(recipes(500))
def test_a_run_is_a_run_of_the_cell(recipe: Recipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", seqparc.errors.SeqparcWarning)
        check(recipe)


@pytest.mark.nightly
@settings(max_examples=4000, **QUIET)
@given(recipes(5000))
def test_many(recipe: Recipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", seqparc.errors.SeqparcWarning)
        check(recipe)
