"""Options(save="store"): backward reads what forward wrote, and gradients are those of save="recompute"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.ops import OPS

from .cells import CELLS, BlockGRU, Case
from .oracle import Runs, errors

pytestmark = pytest.mark.usefixtures("quick")

#: Two lanes of a program over vectors, beside what there is.
CASES = {**CELLS, "wide blocks": Case(lambda: BlockGRU(2, 9), 54, "block")}
#: Numbers that forward keeps for a step.
KEPT = {
    "elementwise GRU": 3 * 7, "GRU": 4 * 10, "LSTM": 5 * 9, "RNN tanh": 11, "minGRU": 0, "sLSTM": 6 * 5, "block GRU": 4 * 24, "LEM": 4 * 6,
    "affine": 0, "IndRNN": 0, "sparse": 8,
}  # fmt: skip


def compiled(cell: Any, save: str, backend: str = "torch", **options: Any) -> seqparc.CompiledRNN:
    return seqparc.compile(cell, backend=backend, options={"save": save, **options})  # type: ignore[no-any-return]


def check(name: str, dtype: torch.dtype, backend: str, steps: int = 40, **options: Any) -> None:
    """Gradients by both, against each other and against the plain loop in float64."""
    torch.manual_seed(0)
    runs = Runs(CASES[name].make().to(dtype), CASES[name].inputs, 3, steps)
    found = {}
    for save in ("recompute", "store"):
        rnn = compiled(runs.cell, save, backend, **options)
        found[save] = runs.run(runs.compiled(rnn), dtype)
        names = {direction.removesuffix(" 2") for by, direction in rnn.kernels() if by == backend}
        assert ("backward stored" in names) == (save == "store" and KEPT.get(name, 1) > 0), names
        assert ("backward" in names) != ("backward stored" in names)
    apart, truth = errors(found["store"], found["recompute"]), errors(found["store"], runs.truth())
    bound = 1e-12 if dtype is torch.float64 else 4e-6
    assert max(apart.values()) < bound and max(truth.values()) < 1e3 * bound, (apart, truth)


@pytest.mark.parametrize("name", ["elementwise GRU", "LSTM", "sLSTM", "layer norm GRU", "two levels", "LEM", "affine"])
def test_torch_backend(name: str) -> None:
    check(name, torch.float64, "torch", strategy="shooting", chunks=4)


@pytest.mark.parametrize("name", ["elementwise GRU", "GRU", "wide blocks"])
def test_c_backend(name: str) -> None:
    check(name, torch.float64, "c", strategy="shooting", chunks=3)


def test_float32_and_newton() -> None:
    check("GRU", torch.float32, "torch", strategy="sequential")
    check("elementwise GRU", torch.float32, "torch", 8, strategy="newton")  # whose Jacobians are of the same programs
    check("LSTM", torch.float64, "torch", 8, strategy="newton", update="diagonal")


@pytest.mark.parametrize("name", KEPT)
def test_the_adjoint_computes_nothing_costly_anew(name: str) -> None:
    rnn = compiled(CELLS[name].make(), "store")
    plan = rnn.engine(torch.zeros(1, 2, CELLS[name].inputs)).plan  # type: ignore[union-attr]
    stored = plan.stored()
    assert (0 if stored is None else stored.numbers) == KEPT[name]
    if stored is None:
        return
    program, n = stored.adjoint.program, len(plan.program.stream_sizes) + len(plan.program.state_sizes)
    assert stored.program.next == plan.program.next  # the step itself is the same
    for v in ir.topological(program.outputs):
        told = [leaf for leaf in ir.leaves([v]) if leaf.kind == "state" or (leaf.kind == "stream" and n <= leaf.slot < 2 * n)]
        costly = isinstance(v, ir.Contract) or (isinstance(v, ir.Map) and OPS[v.op].cost >= 8)
        assert told or not costly, v  # what is left of products carries cotangents


def test_without_gradients_nothing_is_kept() -> None:
    rnn = compiled(nn.GRUCell(3, 10), "store", "c")
    x = torch.randn(2, 30, 3)
    with torch.no_grad():
        rnn(x)
    assert set(rnn.kernels()) == {("c", "forward")}


def test_where_it_cannot_be_kept_it_is_computed_anew() -> None:
    rnn, plain = (compiled(CELLS["GRU"].make().double(), save) for save in ("store", "recompute"))
    plain.load_state_dict(rnn.state_dict())
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    by_transform = torch.func.grad(lambda x: rnn(x)[0].square().sum())(x)
    torch.testing.assert_close(by_transform, torch.func.grad(lambda x: plain(x)[0].square().sum())(x))
    assert ("torch", "backward") in rnn.kernels() and ("torch", "backward stored") not in rnn.kernels()
    x.requires_grad_()
    (eager,) = torch.autograd.grad(rnn(x)[0].square().sum(), x)
    torch.testing.assert_close(eager, by_transform)
    assert ("torch", "backward stored") in rnn.kernels()
    y = rnn(x)[0]
    many = torch.stack([torch.randn_like(y) for _ in range(2)])  # asked for by a call that kept it
    rows = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(rows[1], torch.autograd.grad(y, x, many[1])[0])


def test_a_gradient_of_its_own() -> None:
    class Spike(nn.Module):
        hidden_size = 4

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(x + 0.5 * h.detach() + 0.2 * h)

    x = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    found = [torch.autograd.grad(compiled(Spike(), save)(x)[0].sum(), x)[0] for save in ("store", "recompute")]
    torch.testing.assert_close(*found)


def test_a_maximum_is_compared_with_what_was_rounded_alike() -> None:
    """Of values that tie for the largest, one that was kept and one computed anew would not tie any more."""

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size, self.u = 10, nn.Linear(10, 10)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            a = torch.tanh(self.u(h)) * 0.37 + x
            return a - a.amax(-1, keepdim=True)

    runs = Runs(Largest(), 10, 2, 30)
    rnn = compiled(runs.cell, "store", "c")
    found = errors(runs.run(runs.compiled(rnn), torch.float32), runs.truth())
    assert max(found.values()) < 1e-5 and ("c", "backward stored") in rnn.kernels(), found
    adjoint = rnn.engine().plan.stored().adjoint.program  # type: ignore[union-attr]
    assert any(isinstance(v, ir.Reduce) and v.fold == "max" for v in ir.topological(adjoint.outputs))


SCRIPT = """
import torch
import seqparc
from tests.cells import CELLS

for name in ("elementwise GRU", "RNN tanh"):
    cell = CELLS[name].make().double()
    x, found = torch.randn(1, 4, CELLS[name].inputs, dtype=torch.float64, requires_grad=True), []
    for backend, save in (("triton", "store"), ("torch", "recompute")):
        rnn = seqparc.compile(cell, backend=backend, options={"save": save, "strategy": "sequential"})
        found.append(torch.autograd.grad(rnn(x)[0].square().sum(), [x, *cell.parameters()]))
        assert rnn.stats.backward.backend == backend and (("triton", "backward stored") in rnn.kernels()) == (backend == "triton")
    for mine, right in zip(*found):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
print("equal")
"""


def test_triton() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent.parent, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr
