"""Triton kernels, run by Triton's interpreter: every cell, both directions, against the plain loop and the torch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seqparc
from seqparc.codegen.launcher import Launcher
from seqparc.codegen.sweep import emit

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
VERSION = """
import os
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
import triton
print("triton", triton.__version__)
"""

SCRIPT = """
import sys, warnings
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
        x = torch.randn(2, 9, CELLS[name].inputs, dtype=dtype, requires_grad=True)
        probe = seqparc.compile(cell, backend="torch")
        _, convention, start = probe.understand(x)
        h0 = convention.state.unflatten([(0.3 * torch.randn(s.shape, dtype=dtype)).abs().requires_grad_() for s in start])
        shooting, sequential = {"strategy": "shooting", "chunks": 3, "warmup": 2}, {"strategy": "sequential"}
        for options in (sequential, shooting) if dtype == torch.float64 and name == sys.argv[1] else (shooting,):
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
import sys
import torch
import seqparc
from tests.cells import CELLS


def run(rnn, cell, x):
    y, last = rnn(x)
    y = seqparc.tree.flatten(y)[0][0]
    wanted = [x, *cell.parameters()]
    return [y.detach(), *(g for g in torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) if g is not None)]


for name in sys.argv[1:]:
    torch.manual_seed(0)
    cell = CELLS[name].make().double()
    x = torch.randn(2, 11, CELLS[name].inputs, dtype=torch.float64, requires_grad=True)
    right = run(seqparc.compile(cell, backend="torch", options={"strategy": "sequential"}), cell, x)
    for warmup, chunks in ((2, 4), (0, 3)):
        options = {"strategy": "shooting", "warmup": warmup, "chunks": chunks, "update": "none"}
        rnn = seqparc.compile(cell, backend="triton", options=options)
        run(rnn, cell, x)
        watched = rnn.stats
        for passes in (1, 2, 3):  # too few, mostly: then the card itself must finish, and say so
            (engine,) = rnn._engines.values()
            for direction, (_, _, cut, outcome) in engine.last.items():
                outcome.converged = True
                engine.sure[direction, 2, (11).bit_length()] = cut, passes, outcome
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

GAP = """
import warnings
import torch
from seqparc.codegen.gpugap import gap, measure
from seqparc.runtime.interpreter import TorchKernel

warnings.simplefilter("ignore", RuntimeWarning)  # infinities meet on purpose
single, double = torch.float32, torch.float64
for chunks, batch, row, dtype in ((2, 1, 1, single), (7, 3, 5, double), (60, 2, 40, double), (1100, 1, 1, double)):
    torch.manual_seed(chunks)
    shape = chunks, batch, row
    start, end = (torch.randn(shape, dtype=dtype) * 10 ** torch.randn(shape, dtype=dtype) for _ in range(2))
    near = torch.rand(chunks - 1, batch, row) < 0.9
    start[1:][near] = (end[:-1] * (1 + 1e-7 * torch.randn(chunks - 1, batch, row, dtype=dtype)))[near]
    sizes = end.abs() * torch.rand(shape, dtype=dtype) * 3
    for special in (None, (float("nan"), float("nan")), (float("nan"), 1.0), (float("inf"), float("inf")), (float("inf"), 1.0)):
        if special is not None:
            end[chunks // 2 - 1, 0, 0], start[chunks // 2, 0, 0] = special
        right = TorchKernel.gap(None, start, end, sizes, 1e-12, 1e-7)
        found = gap(start, end, sizes, 1e-12, 1e-7)
        torch.testing.assert_close(found[1], right[1].double(), rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=0)
        assert found[0] == float(found[1].max())
        # The same marked: what moved, by sample, and how much of a sample is left from there.
        begun, worst, marks = start.clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, chunks + 1, batch, dtype=torch.int32)
        measure(begun, end, sizes, 1e-12, 1e-7, worst, marks, (chunks + 1) * batch)
        one = [[t[:, b : b + 1].clone() for t in (start, end, sizes)] for b in range(batch)]
        moved = torch.stack([gap(*ts, 1e-12, 1e-7)[1] > 1 for ts in one], 1)
        assert worst[0] == 0 and worst[1] == found[0] and not marks[0].any() and not marks[1, 1].any()
        assert torch.equal(marks[1, 2:].bool(), moved)
        for b in range(batch):
            assert int(marks[1, 0, b]) == (chunks - 1 - int(moved[:, b].nonzero()[0]) if moved[:, b].any() else 0)
        changed = (begun != start) & ~(begun.isnan() & start.isnan())
        replaced, ends = begun[1:][changed[1:]], end[:-1][changed[1:]]
        assert not changed[0].any() and torch.equal(replaced.nan_to_num(7), ends.nan_to_num(7))
        assert torch.equal(changed[1:].any(2), moved)
print("equal")
"""

TUNE = """
import torch
import seqparc
from seqparc.runtime import tuning
from tests.cells import CELLS

real, seen = tuning.timed, []


def timed(run, device):  # the setting with tiles of half as many lanes and chunks of one warm-up is the fastest
    found = real(run, device)
    assert found is None or found > 0
    seen.append(kernel().setting)
    return 1.0 if seen[-1] == best else None if seen[-1].chunk_per_warmup == 4 else 2.0


def kernel():
    return rnn.engine().kernels["forward"][1]


def run(rnn, calls):
    with torch.no_grad():
        for _ in range(calls):
            y = rnn(x)[0]
    return y


tuning.timed, tuning.RUNS = timed, 1
cell, x = CELLS["minGRU"].make().double(), torch.randn(1, 40, CELLS["minGRU"].inputs, dtype=torch.float64)
right = seqparc.compile(cell, backend="torch", options={"strategy": "sequential"})(x)[0]
given = {"backend": "triton", "options": {"tune": True, "warmup": 8}}
rnn = seqparc.compile(cell, **given)
torch.testing.assert_close(run(rnn, 1), right)
assert not seen  # the first run is watched: there is nothing to be tried before it is known how many passes are needed
best = kernel().settings[4]
assert best.block == kernel().settings[0].block // 2 and best.chunk_per_warmup == 1
torch.testing.assert_close(run(rnn, 1), right)
assert seen == list(kernel().settings) and kernel().setting == best
torch.testing.assert_close(run(rnn, 2), right)
assert len(seen) == len(kernel().settings) and rnn.stats.chunks == 40 // 8 and kernel().setting == best  # chunks of 8 steps at least
chosen = best
for options, expected in (({}, chosen), ({"deterministic": True}, None), ({"deterministic": True, "tune": True}, None)):
    rnn = seqparc.compile(cell, backend="triton", options={"warmup": 8, **options})  # another process would find the same on disk
    torch.testing.assert_close(run(rnn, 3), right)
    assert kernel().setting == (expected or kernel().settings[0]), (options, kernel().setting)
assert len(seen) == len(kernel().settings)
# What is nearly as fast as the usual is not worth another kernel; what is spoilt on disk is nothing.
tuning.timed = lambda run, device: 0.98 if kernel().setting == best else 1.0
rnn = seqparc.compile(cell, backend="triton", options={"tune": True, "warmup": 3})
x = x[:, :20]
torch.testing.assert_close(run(rnn, 3), right[:, :20])
assert kernel().setting == kernel().settings[0]
recall = tuning.store.recall
tuning.store.recall = lambda name, key: [7, 7] if name == "tuned" else recall(name, key)
rnn = seqparc.compile(cell, backend="triton", options={"warmup": 8})
run(rnn, 1)
assert kernel().setting == kernel().settings[0]
print("tuned")
"""

FAR = """
import numpy as np
import torch
import seqparc
from seqparc.codegen import stepwise
from seqparc.codegen.gpulaunch import TritonKernel
from tests.cells import CELLS


def tiles(*args):
    raise stepwise.TooIrregularError("not wanted")


# Memory that nobody writes to is not there: of these 17 GB a few pages are.
cell, steps, width = CELLS["elementwise GRU"].make(), 6, CELLS["elementwise GRU"].inputs
room = torch.from_numpy(np.zeros(2**32 + 2**20, np.float32))
for stride in ((2**32, 1000), (2**20, 2**29 + 1)):  # samples so far apart, or steps
    x = room.as_strided((2, steps, width), (*stride, 1))
    x.copy_(torch.randn(2, steps, width))
    right = seqparc.compile(cell, backend="torch")(x.contiguous())[0]
    for make in (TritonKernel, tiles):
        stepwise.TritonKernel = make
        with torch.no_grad():
            rnn = seqparc.compile(cell, backend="triton", options={"strategy": "shooting", "chunks": 2, "warmup": 2})
            torch.testing.assert_close(rnn(x)[0], right)
        assert rnn.stats.backend == "triton"
print("far")
"""

SCAN = """
import torch
from seqparc.codegen.gpuscan import scan
from seqparc.scan import doubling

shapes = ((1, 1, 1, 1), (1, 2, 1, 3), (1, 530, 1, 1), (1, 70, 2, 5), (2, 40, 2, 3), (3, 9, 1, 1), (4, 21, 2, 9), (5, 6, 1, 2))
for n, chunks, batch, groups in shapes:
    torch.manual_seed(chunks)
    a = torch.randn(chunks - 1, batch, groups, n, n, dtype=torch.float64) / (1.2 * n**0.5)  # matrices that do not commute
    r = torch.randn(chunks, batch, groups, n, dtype=torch.float64)
    rows = [r[0]]
    for c in range(1, chunks):
        rows.append(r[c] + (a[c - 1] @ rows[-1].unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(scan(a, r), torch.stack(rows), rtol=1e-10, atol=1e-12)
    larger = scan(a.abs(), r.abs(), True)
    assert bool((larger >= r.abs()).all())
    if n == 1:  # where "the larger" is associative too
        torch.testing.assert_close(larger, doubling(a.abs(), r.abs(), True), rtol=1e-12, atol=0)
print("scanned")
"""

HALF = """
import torch
import seqparc
from tests.cells import CELLS

for name in ("elementwise GRU", "RNN tanh"):
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        cell, results = CELLS[name].make().to(dtype), {}
        x = torch.randn(2, 23, CELLS[name].inputs, dtype=dtype, requires_grad=True)
        for backend in ("triton", "torch"):
            rnn = seqparc.compile(cell, backend=backend, options={"strategy": "shooting", "chunks": 3, "warmup": 4})
            y, last = rnn(x)
            results[backend] = [y, last, *torch.autograd.grad(y.sum() + last.sum(), [x, *cell.parameters()])]
            assert all(t.dtype == dtype for t in results[backend]) and rnn.stats.backend == backend
            if backend == "triton":  # that is what the kernels were given, and not a copy in float32
                for kernel in [k for _, part in rnn.engine().parts for _, k in part.kernels.values()]:
                    assert any(dtype in key[0] for key in kernel._run.made), (name, list(kernel._run.made))
        for mine, right in zip(*results.values(), strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(mine, right, rtol=4 * eps, atol=4 * eps * float(right.abs().max()))
print("halved")
"""

RANDOM = """
import sys
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_random_cells import QUIET, check, recipes


@settings(max_examples=int(sys.argv[1]), **QUIET)
@given(recipes(5), st.sampled_from(["sequential", "shooting"]))
def hold(recipe, strategy):
    check(recipe, "triton", strategy)


hold()
print("held")
"""

GROUPS = [
    ("elementwise GRU", "IndRNN", "minGRU", "sLSTM", "affine", "RNN tanh"),
    ("GRU", "RNN relu", "sparse", "block GRU"),
    ("LSTM", "peephole LSTM", "LEM"),
    ("layer norm GRU", "two levels"),
]



def interpreted(script: str, says: str, *args: str) -> None:
    """Run a script under Triton's interpreter, by the oldest Triton we support where that is installed beside the newest."""
    oldest = ROOT / ".venv" / "oldest"
    env = {**os.environ, "PYTHONPATH": str(oldest)} if oldest.exists() else dict(os.environ)
    done = subprocess.run([sys.executable, "-c", VERSION + script, *args], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and says in done.stdout, done.stdout[-1500:] + done.stderr[-5000:]
    assert not oldest.exists() or "triton 3.6" in done.stdout, done.stdout


@pytest.mark.parametrize("names", GROUPS, ids=lambda g: g[0])
def test_every_cell_runs_as_the_torch_backend_does(names: tuple[str, ...]) -> None:
    interpreted(SCRIPT, "equal", *names)


@pytest.mark.parametrize("names", [("elementwise GRU", "RNN tanh"), pytest.param(("sLSTM",), marks=pytest.mark.nightly)])
def test_a_run_that_nobody_watches_is_as_exact(names: tuple[str, ...]) -> None:
    interpreted(ALONE, "exact", *names)


def test_without_a_gpu_it_is_said_what_there_is_instead() -> None:
    with pytest.warns(seqparc.SeqparcWarning, match="run on a GPU, x is on cpu; TRITON_INTERPRET=1"):
        rnn = seqparc.compile(nn.RNNCell(3, 4), backend="triton")
        rnn(torch.randn(1, 3, 3))
    assert rnn.stats.backend == "torch"


def test_the_gap_is_the_torch_backends() -> None:
    interpreted(GAP, "equal")


def test_a_later_launch_gives_the_compiled_kernel_what_the_first_gave_triton() -> None:
    given: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: given.append((grid, *args))

    class Function:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> Compiled:
                given.append(((*grid, 1, 1), *args, *constants.values()))
                return Compiled()

            return launch

    launch, x = Launcher(Function()), torch.zeros(3)
    for _ in range(2):
        launch(5, (x, None, 7), {"LEAD": True, "BLOCK": 64}, 4)
    launch(5, (x, x, 7), {"LEAD": True, "BLOCK": 64}, 4)
    assert all(a is b or a == b for a, b in zip(given[0], given[1], strict=True)) and len(launch.made) == 2


def test_constants_are_the_last_parameters_of_a_kernel() -> None:
    engine = seqparc.compile(nn.RNNCell(3, 12), backend="triton").engine(torch.zeros(1, 1, 3))
    assert engine is not None and not isinstance(engine, str)
    kinds = emit(engine.plan.program, double=False).signature
    assert [name for name, kind in kinds.items() if kind == "constexpr"] == list(kinds)[-4:] == ["LEAD", "SIZES", "FINISH", "BLOCK"]


@pytest.mark.parametrize("examples", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_cells_nobody_wrote_run_as_the_plain_loop_does(examples: int) -> None:
    interpreted(RANDOM, "held", str(examples))


def test_settings_are_tried_out_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPARC_CACHE", str(tmp_path))
    interpreted(TUNE, "tuned")


def test_offsets_may_be_wider_than_32_bits() -> None:
    interpreted(FAR, "far")


def test_the_scan_over_chunks_is_the_loop() -> None:
    interpreted(SCAN, "scanned")


def test_sixteen_bits_are_read_as_they_are() -> None:
    interpreted(HALF, "halved")
