"""Forked and spawned processes, and threads: they share compiled cells, and get the loop's numbers."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

import seqparc
from seqparc.codegen import build
from seqparc.errors import SeqparcWarning
from seqparc.locks import LOOKING
from seqparc.runtime.driver import Outcome, Problem
from seqparc.runtime.engine import Engine
from tests.living import MODULES, close, eager, gradients, same
from tests.test_faults import Plain
from tests.test_held import Leaky
from tests.test_machine import fake

pytestmark = pytest.mark.usefixtures("quick")

#: Large enough for both threads.
X = torch.linspace(-1, 1, 16 * 200 * 4).reshape(16, 200, 4)


def right(rnn: Any, x: Tensor = X) -> None:
    with torch.no_grad():
        close(rnn(x)[0], rnn.sequential(x)[0])


# -- processes -------------------------------------------------------------------------------------------------------


def forked(run: Callable[[], None], seconds: float = 20) -> None:
    """Run this in a forked child, which must end well and in time."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the forked child hangs, after {seconds} s")


def test_a_fork_after_use() -> None:
    """OpenMP's threads, which the parent has and the child has not, are not waited for, and both go on."""
    rnn = seqparc.compile(Plain())
    same(rnn, X)
    assert rnn.stats.backend == "c"
    forked(lambda: same(rnn, X))
    forked(lambda: forked(lambda: right(rnn)))
    forked(lambda: same(seqparc.compile(Plain(5)), torch.randn(16, 200, 5)))  # compiled in the child
    same(rnn, X)


def test_a_fork_while_the_backward_kernel_is_being_made(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = fake(tmp_path, monkeypatch, f'while [ -e "{tmp_path}/wait" ]; do sleep 0.01; done; exec {build.compiler()[0][0]} "$@"')
    flag.unlink()
    rnn, wait = seqparc.compile(Plain()), tmp_path / "wait"
    right(rnn)
    flag.touch()
    wait.touch()
    y = rnn(X)[0]  # begins it

    def go_on() -> None:
        wait.unlink()
        close(gradients(y, [rnn.cell.w]), gradients(rnn.sequential(X)[0], [rnn.cell.w]))

    forked(go_on)
    same(rnn, X)


def test_a_fork_while_another_thread_looks_at_a_cell() -> None:
    rnn, begun, done = seqparc.compile(Plain(6)), threading.Event(), threading.Event()

    def look() -> None:
        with LOOKING():
            begun.set()
            done.wait()

    thread = threading.Thread(target=look)
    thread.start()
    begun.wait()
    try:
        forked(lambda: right(rnn, torch.randn(2, 9, 6)))
    finally:
        done.set()
        thread.join()


class Rows(Dataset):  # type: ignore[type-arg]
    """What a compiled cell makes of sequences, computed by whoever loads them."""

    def __init__(self, rnn: Any) -> None:
        self.rnn = rnn

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.rnn(X[i : i + 8])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader(start: str) -> None:
    rnn = seqparc.compile(Plain())
    same(rnn, X)
    loader = DataLoader(Rows(rnn), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60)
    for i, y in enumerate(loader):
        close(y, rnn.sequential(X[i : i + 8])[0])
    same(rnn, X)


def learn(rnn: Any) -> None:
    same(rnn, X)
    with torch.no_grad():
        rnn.cell.w.mul_(0.5)


def test_parameters_in_shared_memory() -> None:
    rnn = seqparc.compile(Plain()).share_memory()
    right(rnn)
    was = rnn.cell.w.detach().clone()
    process = mp.get_context("fork").Process(target=learn, args=(rnn,))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and torch.equal(rnn.cell.w, was / 2)
    same(rnn, X)


# -- threads ---------------------------------------------------------------------------------------------------------


def opaque(x: Tensor, h: Tensor) -> Tensor:
    return 0.5 * torch.special.bessel_j0(h) + x


def bernoulli(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h + x) * (torch.nn.functional.dropout(torch.ones_like(h), 0.0) + torch.bernoulli(torch.zeros_like(h)))


class Remembering(nn.Module):
    """Keeps its state on itself, and is called by every run."""

    def __init__(self) -> None:
        super().__init__()
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.h = opaque(x, torch.zeros_like(x) if self.h is None else self.h)
        return 2 * self.h


#: what is compiled, and the width of x
SHARED: dict[str, tuple[Callable[[], Any], int]] = {
    **{name: (lambda make=make: seqparc.compile(make()), width) for name, (make, width) in MODULES.items()},  # type: ignore[misc]
    "held, with a gradient of its own": (lambda: seqparc.compile(Leaky(), state={"potential": torch.zeros(5)}), 5),
    "held, opaque": (lambda: seqparc.compile(Remembering(), state={"h": torch.zeros(4)}), 4),
    "opaque": (lambda: seqparc.compile(opaque, state=torch.zeros(4)), 4),
    "a plain loop": (lambda: seqparc.compile(bernoulli, state=torch.zeros(4)), 4),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.filterwarnings("ignore::seqparc.errors.SeqparcWarning")
def test_eight_threads_share_a_cell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call included, each with shapes of its own, some twice."""
    make, width = SHARED[name]
    rnn, compiled = make(), []
    compiling = build._compile
    monkeypatch.setattr(build, "_compile", lambda *given: (compiled.append(given[1]), compiling(*given))[1])
    gate, failed = threading.Barrier(8), []
    xs = [torch.randn(1 + k % 3, 20 + 13 * (k % 4), width, requires_grad=True) for k in range(8)]
    parameters = list(rnn.parameters())
    found: dict[tuple[int, int], Any] = {}

    def work(k: int) -> None:
        try:
            torch.set_num_threads(1 + (name != "LSTM layer"))  # whose four kernels' threads would mostly wait for each other
            gate.wait()
            for turn in range(3):
                results = rnn(xs[k])
                found[k, turn] = tree_leaves(results), gradients(results, [xs[k], *parameters])
        except BaseException as error:
            failed.append(error)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(switching)
    assert not failed, failed
    assert [id(p) for p in rnn.parameters()] == [id(p) for p in parameters]
    assert torch.backends.mkldnn.enabled and gc.isenabled()
    for k, x in enumerate(xs):
        looped = eager(rnn)(x)
        expected = tree_leaves(looped), gradients(looped, [x, *parameters])
        for turn in range(3):
            close(found[k, turn], expected, rtol=1e-4, atol=1e-5)
    assert len(compiled) == len(set(compiled))
    if isinstance(rnn, seqparc.CompiledRNN) and rnn.stats.backend == "c":
        assert rnn.stats.history.calls == 24 == (rnn.stats.backward or rnn.stats).history.calls or name.startswith("held")


def test_eight_threads_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them fall back, once."""
    monkeypatch.setenv("CC", "no-such-compiler")
    rnn, failed, gate = seqparc.compile(Plain()), [], threading.Barrier(8)

    def work() -> None:
        try:
            gate.wait()
            same(rnn, X[:2, :9])
        except BaseException as error:
            failed.append(error)

    with pytest.warns(SeqparcWarning, match="no-such-compiler") as said:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failed, failed
    assert rnn.stats.backend == "torch" and len(said) == 1


def test_a_run_teaches_only_what_is_still_on_trial() -> None:
    """Two runs that were begun alike: the second says nothing about the warm-up that the first has led to."""
    rnn = seqparc.compile(Plain())
    right(rnn)
    engine = rnn.engine()
    assert isinstance(engine, Engine)
    kernel = engine.kernels["forward"][1]
    choice, cut, shape = engine._decide("forward", kernel, 1, 9000)
    p = Problem(kernel, torch.zeros(1, 4), 9000, [], [], [])
    outcome = Outcome(p.start, [], passes=2, gaps=[1e-6, 0.0])
    assert choice.chunks > 1
    engine._learn(p, shape, choice, cut, outcome, 1.0)
    known = repr(engine.experience[shape])
    engine._learn(p, shape, choice, cut, outcome, 1.0)
    assert repr(engine.experience[shape]) == known and not engine.experience[shape].settled
