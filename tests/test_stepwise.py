"""States too large for a chip, step by step: under Triton's interpreter against the torch backend, and compiled for cards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.codegen import offline
from seqparc.codegen.launcher import interpreted as in_interpreter
from seqparc.codegen.parts import Product, split
from seqparc.runtime.engine import Engine
from tests.test_triton import interpreted

triton = pytest.importorskip("triton")

SCRIPT = """
import sys, warnings
import torch
from torch import nn
import seqparc
from seqparc.codegen import stepwise
from seqparc.codegen.gpulaunch import TritonKernel
from tests.cells import CELLS
from tests.test_stepwise import BIG, TOO_LARGE

warnings.simplefilter("error", seqparc.SeqparcWarning)  # so that nothing falls back
eps = {torch.float32: 1.2e-7, torch.float64: 2.3e-16, torch.bfloat16: 1e-4}  # the last rounds its results to 8e-3


def tiles(*args):
    raise stepwise.TooIrregularError("not wanted")


def run(rnn, x):
    y, last = rnn(x)
    leaves = [t for part in (y, last) for t in seqparc.tree.flatten(part)[0]]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).mean() for t in leaves)
    grads = torch.autograd.grad(loss, [x, *rnn.parameters()], allow_unused=True)
    return [t.detach() for t in leaves] + [g for g in grads if g is not None]


for name in sys.argv[1:]:
    big = name in BIG
    stepwise.TritonKernel = TritonKernel if name in TOO_LARGE else tiles
    for dtype in (torch.float64, torch.bfloat16 if big else torch.float32):
        torch.manual_seed(0)
        make, inputs = BIG[name] if big else (CELLS[name].make, CELLS[name].inputs)
        cell = make().to(dtype)
        x = torch.randn(2, 6 if big else 11, inputs, dtype=dtype, requires_grad=True)
        shooting = {"strategy": "shooting", "chunks": 2, "warmup": 3}
        for options in (shooting, {"strategy": "sequential"}, {**shooting, "update": "exact", "warmup": 0})[: 1 if big else 3]:
            done, passes, gaps = {}, [], []
            for backend in ("triton", "torch"):
                rnn = seqparc.compile(cell, backend=backend, options=options)
                done[backend] = run(rnn, x)
                assert rnn.stats.backend == rnn.stats.backward.backend == backend
                gaps += rnn.stats.gaps[:1]
                passes.append((rnn.stats.passes, rnn.stats.backward.passes))
                if backend == "triton":
                    kernels = [k for _, part in rnn.engine().parts for _, k in part.kernels.values()]
                    kinds = {type(k) for k in kernels}
                    assert kinds == {stepwise.StepKernel}, kinds
                    given = {d for k in kernels for run_part in k._run for key in run_part.made for d in key[0]}
                    assert dtype in given  # of what is read, also where it has 16 bits
            assert all(abs(p - q) <= 1 for p, q in zip(*passes, strict=True)), (name, dtype, options, passes)
            if gaps and gaps[0] > 1e-6 and dtype == torch.float64:  # what the warm-up leaves is the same
                assert abs(gaps[0] - gaps[1]) < 1e-6 * gaps[0], (name, options, gaps)
            for mine, right in zip(*done.values(), strict=True):
                error = float((mine.double() - right).abs().max() / (right.abs().max() + 1e-30))
                assert error < 100 * eps[dtype], (name, dtype, options, error / eps[dtype])
print("equal")
"""


class Rotated(nn.Module):
    """Reads its state in pieces, in another order, and multiplies two parts of it: nothing that tiles express."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4) / 3)
        self.register_buffer("order", torch.tensor([3, 7, 0, 5, 1, 8, 2, 6, 4]))

    def init_state(self, batch: int) -> Tensor:
        return self.w.new_zeros(batch, 9)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        mixed = h.index_select(1, self.order)
        a, b = mixed[:, :5], mixed[:, 4:]
        pairs = (a.unsqueeze(2) * b.unsqueeze(1)).sum(2).tanh()
        low = (h[:, ::2] @ self.w).sigmoid()
        return torch.cat((low * x[:, :4], pairs + torch.softmax(a, 1)), 1)


class Separate(nn.Module):
    """Three products of the same state."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.r, self.z, self.c = (nn.Linear(n, n, bias=False) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.r(h) + x), torch.sigmoid(self.z(h) + x)
        return z * h + (1 - z) * torch.tanh(r * self.c(h) + x)


class TwoBlocks(nn.Module):
    """Two states of ten that never meet, one lane each."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 10, 10) / 3)

    def init_state(self, batch: int) -> Tensor:
        return self.w.new_zeros(batch, 2, 10)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bgk,gke->bge", h, self.w) + x.unsqueeze(1))


class Viewed(nn.Module):
    """Its weight lies in the middle of a larger piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 9
        self.w = nn.Parameter(torch.randn(200)[20:101].view(9, 9) / 3)

    def _apply(self, fn: Any, recurse: bool = True) -> Viewed:
        self.w = nn.Parameter(fn(torch.cat((torch.zeros(20), self.w.detach().flatten())))[20:].view(9, 9))
        return self

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.w + x)


BIG = {
    "viewed": (Viewed, 9),
    "separate": (lambda: Separate(9), 9),
    "two blocks": (TwoBlocks, 10),
    "RNN 260": (lambda: nn.RNNCell(3, 260), 3),
    "rotated": (Rotated, 4),
}
TOO_LARGE = ("RNN 260", "rotated")
GROUPS = [
    pytest.param(("GRU",), marks=pytest.mark.nightly),
    pytest.param(("LSTM", "layer norm GRU", "two levels", "LEM", "block GRU"), marks=pytest.mark.nightly),
    tuple(BIG),
]


@pytest.mark.parametrize("names", GROUPS, ids=["GRU", "more", "big"])
def test_a_step_in_parts_is_the_torch_backends(names: tuple[str, ...]) -> None:
    interpreted(SCRIPT, "equal", *names)


def programs(cell: nn.Module, inputs: int) -> dict[str, ir.Program]:
    engine = seqparc.compile(cell, backend="triton").engine(torch.zeros(2, 5, inputs))
    assert isinstance(engine, Engine)
    return offline.programs(engine.plan)


def test_products_of_the_same_state_become_one() -> None:
    parts = split(programs(Separate(70), 70)["forward"])
    products = [w for w in parts.work if isinstance(w, Product)]
    assert [len(p.members) for p in products] == [3] and parts.widths[products[0].buffer] == 210
    assert len(parts.work) == 2  # the product and one kernel


@pytest.mark.skipif(in_interpreter(), reason="an interpreted kernel has no machine code")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_parts_compile_for_cards(target: str) -> None:
    for direction, program in programs(nn.GRUCell(4, 256), 4).items():
        reports = offline.inspect(program, torch.float32, target)
        assert [r.kernel for r in reports] == [f"part{i}" for i in range(1 if direction == "forward" else len(reports))]
        for r in reports:
            assert r.spills == 0 and r.problems == () and 0 < r.registers <= 64 and "do not fit on the chip" in r.lines()[0]
            assert r.bytes_per_element > 0 and r.seconds_per_element > 0


def test_a_graph_that_cannot_wait_runs_sequentially(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = nn.GRUCell(4, 6), torch.randn(2, 300, 4)
    rnn = seqparc.compile(cell, backend="torch", options={"strategy": "shooting", "chunks": 4})
    before = rnn(x)[0]
    assert rnn.stats.strategy == "shooting"
    monkeypatch.setattr(Engine, "capturing", staticmethod(lambda: True))
    during = rnn(x)[0]
    assert rnn.stats.strategy == "sequential" and rnn.stats.chunks == 1 and "CUDA graph" in rnn.stats.reasons[0]
    torch.testing.assert_close(during, before)
    monkeypatch.undo()
    rnn(x)
    assert rnn.stats.strategy == "shooting"
