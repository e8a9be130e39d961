"""Gradients that are sums over all steps lose nothing that is small beside the whole, however long the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime.weights import _product

from .test_triton import interpreted

EPS = torch.finfo(torch.float32).eps


class Leak(nn.Module):
    """With the same input at every step all terms of the sum are alike, which is when a sum step by step loses most."""

    hidden_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.p * h + x)


def error(backend: str, steps: int, **options: object) -> float:
    """Of the parameter's gradient, relative to it in float64."""
    found = []
    for dtype, by in ((torch.float32, backend), (torch.float64, "c")):
        cell = Leak().to(dtype)
        rnn = seqparc.compile(cell, backend=by, options={"strategy": "sequential", **options})
        rnn(torch.full((1, steps, 1), 0.3, dtype=dtype))[0].sum().backward()
        assert rnn.stats.backend == by and cell.p.grad is not None
        found.append(float(cell.p.grad))
    return abs(found[0] / found[1] - 1)


@pytest.mark.parametrize("save", ["recompute", "store"])
@pytest.mark.parametrize(("backend", "steps"), [("c", 100_000), ("c", 63), ("c", 64), ("c", 65), ("torch", 1000)])
def test_equal_terms(backend: str, steps: int, save: str) -> None:
    assert error(backend, steps, save=save) < 4 * EPS


def test_equal_terms_in_triton() -> None:
    interpreted(TRITON, "summed")


TRITON = """
from seqparc.codegen import stepwise
from tests.test_sums import EPS, error

for steps in (65, 130):
    assert error("triton", steps) < 4 * EPS, steps


def tiles(*args):
    raise stepwise.TooIrregularError("not wanted")


stepwise.TritonKernel = tiles
assert error("triton", 130) < 4 * EPS
print("summed")
"""


@pytest.mark.parametrize(("batch", "steps"), [(1, 5000), (1, 517), (1, 40), (3, 700), (8, 300), (20, 7)])
@pytest.mark.parametrize(("m", "k"), [(12, 5), (5, 12), (1, 1)])
def test_a_product_over_all_steps_is_the_sum_of_its_pieces(batch: int, steps: int, m: int, k: int) -> None:
    d, x = torch.randn(batch, steps, m), torch.randn(batch, steps + 1, k)[:, :-1]  # states before a step are such a view
    right = torch.einsum("btm,btk->mk", d.double(), x.double())
    found = _product(d, x)
    assert found.shape == (m, k)
    assert float((found - right).abs().max()) < 1e-5 * (batch * steps) ** 0.5
