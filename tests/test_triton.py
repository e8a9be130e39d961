"""Triton kernels, run by Triton's interpreter: every cell, both directions, against the plain loop and the torch backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import seqparc

pytest.importorskip("triton")

SCRIPT = """
import os, sys, warnings
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
import numpy as np, torch
import seqparc
from tests.cells import CELLS

warnings.simplefilter("error", seqparc.SeqparcWarning)  # so that nothing falls back
eps = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def run(rnn, x, h0):
    y, last = rnn(x, h0)
    leaves = [t for part in (y, last) for t in seqparc.tree.flatten(part)[0]]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).mean() for t in leaves)
    grads = torch.autograd.grad(loss, [x, *seqparc.tree.flatten(h0)[0], *rnn.parameters()], allow_unused=True)
    return [t.detach() for t in leaves], [g for g in grads if g is not None], rnn.stats


def apart(a, b):
    return max(float((p.double() - q.double()).abs().max() / (q.abs().max() + 1e-30)) for p, q in zip(a, b, strict=True))


for name in sys.argv[1:]:
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        cell = CELLS[name].make().to(dtype)
        x = torch.randn(2, 23, CELLS[name].inputs, dtype=dtype, requires_grad=True)
        probe = seqparc.compile(cell, backend="torch")
        _, convention, start = probe.understand(x)
        h0 = convention.state.unflatten([(0.3 * torch.randn(s.shape, dtype=dtype)).abs().requires_grad_() for s in start])
        shooting, sequential = {"strategy": "shooting", "chunks": 3, "warmup": 3}, {"strategy": "sequential"}
        for options in (shooting,) if dtype == torch.float32 else (sequential, shooting):
            done = {}
            for backend in ("triton", "torch"):
                rnn = seqparc.compile(cell, backend=backend, options=options)
                done[backend] = run(rnn, x, h0)
                assert rnn.stats.backend == rnn.stats.backward.backend == backend
            (values, grads, stats), (right, right_grads, other) = done["triton"], done["torch"]
            # Both round, in another order; what they differ by is rounding, and so is the tolerance of the passes.
            assert apart(values, right) < 60 * eps[dtype], (name, dtype, options, apart(values, right) / eps[dtype])
            assert apart(grads, right_grads) < 400 * eps[dtype], (name, dtype, options, apart(grads, right_grads) / eps[dtype])
            assert abs(stats.passes - other.passes) <= 1 and abs(stats.backward.passes - other.backward.passes) <= 1
            print(name, dtype, options["strategy"], stats.passes, apart(values, right) / eps[dtype], apart(grads, right_grads) / eps[dtype])
print("equal")
"""

ALONE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import seqparc
from tests.cells import CELLS


def run(rnn, cell, x):
    y, last = rnn(x)
    y = seqparc.tree.flatten(y)[0][0]
    wanted = [x, *cell.parameters()]
    return [y.detach(), *(g for g in torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) if g is not None)]


for name in ("elementwise GRU", "RNN tanh", "sLSTM"):
    torch.manual_seed(0)
    cell = CELLS[name].make().double()
    x = torch.randn(2, 22, CELLS[name].inputs, dtype=torch.float64, requires_grad=True)
    right = run(seqparc.compile(cell, backend="torch", options={"strategy": "sequential"}), cell, x)
    for warmup, chunks in ((3, 4), (0, 3)):
        options = {"strategy": "shooting", "warmup": warmup, "chunks": chunks, "update": "none"}
        rnn = seqparc.compile(cell, backend="triton", options=options)
        run(rnn, cell, x)
        watched = rnn.stats
        for passes in (1, 2, 3):  # too few, mostly: then the card itself must finish, and say so
            (engine,) = rnn._engines.values()
            for direction, (_, _, cut, outcome) in engine.last.items():
                outcome.converged = True
                engine.sure[direction, 2, (22).bit_length()] = cut, passes, outcome
            for mine, correct in zip(run(rnn, cell, x), right, strict=True):
                assert float((mine - correct).abs().max()) < 1e-12 * float(correct.abs().max() + 1), (name, warmup, passes)
            for stats, before in ((rnn.stats, watched), (rnn.stats.backward, watched.backward)):
                settled = before.passes <= passes
                assert stats.converged == settled and (stats.fallback is None) == settled, (name, warmup, passes, stats, before)
                assert all(abs(g - h) <= 1e-9 * h for g, h in zip(stats.gaps, before.gaps)), (stats.gaps, before.gaps)
        # What was finished by the sequential kernel is watched the next time.
        engine.last["forward"][3].seen()
        finished = not rnn.stats.converged
        run(rnn, cell, x)
        assert not finished or (rnn.stats.converged and rnn.stats.passes == watched.passes)
print("exact")
"""

GROUPS = [
    ("elementwise GRU", "IndRNN", "minGRU", "sLSTM", "affine", "RNN tanh"),
    ("GRU", "RNN relu", "sparse", "block GRU"),
    ("LSTM", "peephole LSTM", "LEM"),
    ("layer norm GRU", "two levels"),
]


@pytest.mark.parametrize("names", GROUPS, ids=lambda g: g[0])
def test_every_cell_runs_as_the_torch_backend_does(names: tuple[str, ...]) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout[-1500:] + done.stderr[-3000:]


def test_a_run_that_nobody_watches_is_as_exact() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "exact" in done.stdout, done.stdout[-1500:] + done.stderr[-3000:]


def test_weights_that_do_not_fit_on_the_chip_are_said_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rnn, x = seqparc.compile(nn.RNNCell(3, 300), backend="triton"), torch.randn(1, 3, 3)
    with pytest.warns(seqparc.SeqparcWarning, match="its weights, 1024 KB, do not fit on the chip"), torch.no_grad():
        y, _ = rnn(x)
    assert rnn.stats.backend == "torch"
    torch.testing.assert_close(y, rnn.sequential(x)[0])


def test_without_a_gpu_it_is_said_what_there_is_instead() -> None:
    with pytest.warns(seqparc.SeqparcWarning, match="run on a GPU, x is on cpu; TRITON_INTERPRET=1"):
        rnn = seqparc.compile(nn.RNNCell(3, 4), backend="triton")
        rnn(torch.randn(1, 3, 3))
    assert rnn.stats.backend == "torch"
