"""Cells nobody wrote: random graphs over the operation table, mixing and unmixed axes, against the plain loop and against jacrev."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import seqparc
from seqparc.convention import Convention
from seqparc.tree import LEAF, Structure

#: What a step of a random cell may be; every one keeps values between about -2 and 2, and is smooth where it is met.
UNARY = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "erf": torch.erf,
    "exp": lambda v: torch.exp(-v * v), "log": lambda v: torch.log(v * v + 1), "sqrt": lambda v: torch.sqrt(v * v + 0.5),
    "rsqrt": lambda v: torch.rsqrt(v * v + 0.5), "reciprocal": lambda v: 1 / (v * v + 0.7), "softplus": nn.functional.softplus,
    "silu": nn.functional.silu, "gelu": nn.functional.gelu, "expm1": lambda v: torch.expm1(torch.tanh(v)),
    "log1p": lambda v: torch.log1p(torch.sigmoid(v)), "asinh": torch.asinh, "half": lambda v: 0.5 * v,
    "square": lambda v: torch.tanh(v) ** 2,
}  # fmt: skip
BINARY = {
    "add": lambda a, b: 0.5 * (a + b), "sub": lambda a, b: 0.5 * (a - b), "mul": lambda a, b: torch.tanh(a) * b,
    "div": lambda a, b: a / (1.5 + torch.tanh(b)), "gate": lambda a, b: torch.sigmoid(a) * b, "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "where": lambda a, b: torch.where(a > 5, a, b), "maximum": lambda a, b: torch.maximum(a, b + 9),
    "atan2": lambda a, b: torch.atan2(a, b + 4),
}  # fmt: skip
MOVES = ("matmul", "roll", "flip", "mean", "softmax", "layer_norm", "slice", "block")


@dataclass(frozen=True)
class Recipe:
    """A cell as data, so that a failing one is shown and shrinks: steps are (operation, where its operands lie)."""

    n: int
    leaves: int
    steps: tuple[tuple[str, int, int], ...]
    double: bool
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32


class Cell(nn.Module):
    """The cell of a recipe: all values are [batch, n]; the last ones become the state."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        n = recipe.n
        self.w = nn.Parameter(torch.randn(len(recipe.steps), n, n, generator=generator, dtype=recipe.dtype) * 0.5 / n**0.5)
        self.a = nn.Parameter(torch.randn(n, generator=generator, dtype=recipe.dtype) * 0.5)

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(self.a.new_full((batch, self.recipe.n), 0.1 * (i + 1)) for i in range(self.recipe.leaves))

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n = self.recipe.n
        values = [x, *state, self.a + 0 * x]
        for k, (op, i, j) in enumerate(self.recipe.steps):
            a, b = values[i % len(values)], values[j % len(values)]
            if op in UNARY:
                new = UNARY[op](a)
            elif op in BINARY:
                new = BINARY[op](a, b)
            elif op == "matmul":
                new = a @ self.w[k]
            elif op == "roll":
                new = torch.roll(a, 1, -1)
            elif op == "flip":
                new = a.flip(-1)
            elif op == "mean":
                new = a - a.mean(-1, keepdim=True)
            elif op == "softmax":
                new = torch.softmax(a, -1)
            elif op == "layer_norm":
                new = 0.5 * nn.functional.layer_norm(a, (n,), self.a, None, 0.1)
            elif op == "slice":
                new = torch.cat((a[:, n // 2 :], b[:, : n // 2]), -1)
            else:
                half = max(1, n // 2)
                new = torch.cat((a[:, :half] @ self.w[k, :half, :half], a[:, half:]), -1)
            values.append(new)
        return tuple(0.9 * torch.tanh(v) for v in values[-self.recipe.leaves :])


def recipes(longest: int = 7) -> st.SearchStrategy[Recipe]:
    step = st.tuples(st.sampled_from([*UNARY, *BINARY, *MOVES]), st.integers(0, 20), st.integers(0, 20))
    steps = st.lists(step, min_size=1, max_size=longest).map(tuple)
    return st.builds(Recipe, st.integers(1, 6), st.integers(1, 3), steps, st.booleans(), st.integers(0, 99))


def check(recipe: Recipe, backend: str, strategy: str) -> None:
    cell = Cell(recipe)
    rnn = seqparc.compile(cell, backend=backend, options={"strategy": strategy, "chunks": 3 if strategy == "shooting" else None})
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    x = torch.randn(2, 9, recipe.n, generator=generator, dtype=torch.float64).to(recipe.dtype)
    found = []
    for run in (rnn, rnn.sequential):
        u = x.clone().requires_grad_()
        y, last = run(u)
        results = [*y, *last]
        total = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).reshape(r.shape)).sum() for r in results)
        wanted = [u, *cell.parameters()]
        assert isinstance(total, Tensor)
        total = total + 0 * u.sum()  # a state that depends on nothing still has zero gradients
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        found.append([*(r.detach() for r in results), *grads])
    tolerance = 1e-9 if recipe.double else 2e-4
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance * (1 + float(right.abs().max())))
    assert rnn.stats.backend == backend


def check_pattern(recipe: Recipe) -> None:
    """The proved pattern holds every non-zero that jacrev finds."""
    cell = Cell(recipe).double()
    rnn = seqparc.compile(cell, backend="torch")
    x = torch.randn(1, 1, recipe.n, dtype=torch.float64, generator=torch.Generator().manual_seed(recipe.seed))
    engine: Any = rnn.engine(x)
    convention = Convention(("x", "state"), Structure("tuple", children=(LEAF,) * recipe.leaves), LEAF)

    def step(*state: Tensor) -> Tensor:
        return torch.cat([f.reshape(-1) for f in convention.call(cell, [x[:, 0]], list(state))[1]])

    blocks = torch.func.jacrev(step, argnums=tuple(range(recipe.leaves)))(*cell.init_state(1))
    jacobian = torch.cat([b.detach().reshape(b.shape[0], -1) for b in blocks], 1).numpy()
    assert not np.any(jacobian[~engine.plan.structure.pattern])


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "derandomize": True, "database": None}


@settings(max_examples=200, **QUIET)
@given(recipes(), st.sampled_from(["sequential", "shooting", "newton"]))
def test_values_and_gradients(recipe: Recipe, strategy: str) -> None:
    check(recipe, "torch", strategy)


@pytest.mark.usefixtures("quick")
@settings(max_examples=40, **QUIET)
@given(recipes(), st.sampled_from(["sequential", "shooting", "newton"]))
def test_values_and_gradients_in_c(recipe: Recipe, strategy: str) -> None:
    check(recipe, "c", strategy)


@settings(max_examples=200, **QUIET)
@given(recipes(10))
def test_the_pattern_holds_every_nonzero(recipe: Recipe) -> None:
    check_pattern(recipe)


@pytest.mark.nightly
@settings(max_examples=600, **{**QUIET, "derandomize": False})
@given(recipes(14), st.sampled_from(["sequential", "shooting", "newton"]), st.sampled_from(["c", "torch", "torch", "torch"]))
def test_many(recipe: Recipe, strategy: str, backend: str) -> None:
    check(recipe, backend, strategy)
    check_pattern(recipe)
