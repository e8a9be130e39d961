"""Interrupts, and devices that fail: afterwards everything is where it was, and compiled cells work."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.codegen import build, tools
from seqparc.codegen.launch import CKernel
from seqparc.codegen.launcher import Launcher
from seqparc.options import Options
from seqparc.plan import Setting
from seqparc.runtime.engine import Engine
from seqparc.runtime.module import TOOLS
from seqparc.runtime.tuning import Tuner
from tests.living import gradients, same
from tests.test_faults import Plain
from tests.test_held import Leaky
from tests.test_machine import ROOT, fake

pytestmark = pytest.mark.usefixtures("quick")

#: Large enough for both threads.
X = torch.linspace(-1, 1, 16 * 200 * 4).reshape(16, 200, 4)


# -- interrupts ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Ctrl-C after so many seconds, which must end what is inside.

    Python drops what is raised while it forgets an object, in a weak reference's callback; whoever sees that presses again.
    """

    def again(dropped: sys.UnraisableHookArgs) -> None:
        assert dropped.exc_type is KeyboardInterrupt, dropped
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    hook, sys.unraisablehook = sys.unraisablehook, again
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
    inside = threading.Event()  # on a slow machine a thread takes longer to start than the time that is waited for

    def press() -> None:
        inside.wait()
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Thread(target=press)
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            inside.set()
            yield
            time.sleep(10)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, was)
        sys.unraisablehook = hook


def living(groups: Iterable[int]) -> list[str]:
    """Processes of these groups that run; what has ended stays in the table until somebody asks for it."""
    wanted, found = set(groups), []
    assert wanted
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) in wanted and state != "Z":
                found.append(path.read_text())
    return found


def free(folder: Path) -> bool:
    """Whether nobody holds a lock in it."""
    for path in folder.glob("*.lock"):
        with filelock.FileLock(path).acquire(timeout=1):
            pass
    return True


def test_an_interrupt_while_compiling(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "note"
    flag = fake(tmp_path, monkeypatch, f'echo half > "$out"; echo $$ >> {note}; sleep 60; echo rest >> "$out"')
    rnn = seqparc.compile(Plain())
    begin = time.monotonic()
    with interrupted(0.7), torch.no_grad():
        rnn(X)
    assert time.monotonic() - begin < 5
    assert note.exists() and not tools._running  # and what it started is gone:
    assert not living(map(int, note.read_text().split()))
    assert free(fresh) and not list(fresh.glob("*.so")) and not list(fresh.glob("write-*"))
    flag.unlink()
    same(rnn, X)
    assert rnn.stats.backend == "c"


@pytest.mark.parametrize("first", [True, False], ids=["first calls", "later calls"])
def test_interrupts_at_any_time(first: bool, fresh: Path) -> None:
    """Whatever is being done: afterwards everything is where it was, and the module works."""
    modules = [seqparc.compile(Plain()), seqparc.compile(Leaky(), state={"potential": torch.zeros(4)})]
    x = X[:2, :20]
    for rnn in modules:
        same(rnn, x)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for k in range(24):
        rnn = modules[k % 2]
        was = dict(vars(rnn.cell)), dict(rnn.cell._parameters)
        with interrupted(0.003 + 0.004 * (k // 2)):
            end = time.monotonic() + 5
            while time.monotonic() < end:
                if first:
                    rnn._forget()
                gradients(rnn(x), list(rnn.parameters()))
        assert was == (dict(vars(rnn.cell)), dict(rnn.cell._parameters))
        assert torch.equal(torch.get_rng_state(), state) and torch.backends.mkldnn.enabled and gc.isenabled()
    for rnn in modules:
        same(rnn, x)
        assert rnn.stats.backend == "c"
    assert free(fresh)


LEAVING = """
import pathlib, sys, time
import torch, seqparc
from tests.test_interrupts import Plain, X
y, _ = seqparc.compile(Plain())(X)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("done")
"""


def test_the_end_does_not_wait_for_a_kernel_that_nobody_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, note = build.compiler()[0][0], tmp_path / "note"
    fake(tmp_path, monkeypatch, f'grep -q "^// adjoint" "$TMPDIR/kernel.c" || exec {compiler} "$@"; echo $$ >> {note}; exec sleep 60')
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-c", LEAVING, str(note)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not living(map(int, note.read_text().split()))
    assert not list(tmp_path.glob("seqparc-*"))


# -- devices that fail -----------------------------------------------------------------------------------------------


class Failing(CKernel):
    """A kernel whose launches go wrong when they are told to, as one on a GPU may: after it has written something."""

    left = -1  # launches that go well before

    def sweep(self, spans: Any, start: Tensor, streams: Any, params: Any, emits: Any, *rest: Any) -> Tensor:
        end = super().sweep(spans, start, streams, params, emits, *rest)
        if Failing.left == 0:
            for t in (end, *(e for e in emits if e is not None)):
                t.fill_(float("nan"))
            raise RuntimeError("an illegal memory access was encountered")
        Failing.left -= 1
        return end


@pytest.mark.parametrize(("direction", "left"), [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)])
def test_a_launch_that_fails_is_an_error_and_teaches_nothing(direction: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "backends", lambda *_: [("c", lambda p, dtype, _: Failing(p, dtype)), ("torch", None)])
    monkeypatch.setattr(Failing, "left", -1)
    rnn = seqparc.compile(nn.GRUCell(4, 3), options={"strategy": "shooting", "chunks": 20})
    x = X[:2, :60]
    same(rnn, x)
    engine = rnn.engine()
    assert isinstance(engine, Engine) and min(engine.last[d][3].passes for d in engine.last) > 1

    def learnt() -> str:
        of = [{k: v for k, v in known.items() if k[0] == direction} for known in (engine.experience, engine.sure)]
        return repr((of, engine.history[direction], [s for s in engine.converged if s[0] == direction], engine.kernels, engine.backends))

    y = None if direction == "forward" else rnn(x)[0]
    before, Failing.left = learnt(), left
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gradients(rnn(x)[0] if y is None else y, list(rnn.parameters()))
    assert Failing.left == 0 and learnt() == before
    Failing.left = -1
    same(rnn, x)
    assert rnn.stats.backend == "c"


def test_a_kernel_that_could_not_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(program: Any, dtype: torch.dtype, _: Any) -> CKernel:
        made.append(program.name)
        if len(made) % 2:
            raise RuntimeError("out of memory")
        return CKernel(program, dtype)

    monkeypatch.setitem(TOOLS, "backends", lambda *_: [("c", make), ("torch", None)])
    rnn = seqparc.compile(Plain())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="out of memory"):
            rnn(X)
        torch.testing.assert_close(rnn(X)[0], rnn.sequential(X)[0])
    same(rnn, X)  # the backward kernel failed in the background, and not the second time
    assert made == ["cell", "cell", "adjoint", "adjoint"] and rnn.stats.backend == "c"


class Function:
    """A Triton kernel whose first launch fails."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            if self.launches == 1:
                raise RuntimeError("unspecified launch failure")
            return {(3, 1, 1): lambda *_: None}

        return launch


def test_a_failed_first_launch_is_not_kept() -> None:
    function = Function()
    launcher = Launcher(function)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        launcher(3, [torch.zeros(1)], {"N": 1}, 4)
    assert not launcher.made
    for _ in range(2):
        launcher(3, [torch.zeros(1)], {"N": 1}, 4)
    assert function.launches == 2


def test_a_setting_that_fails_while_tuning_is_not_stayed_with(fresh: Path) -> None:
    class Kernel:
        settings = (Setting(1, 1, 2), Setting(2, 1, 2), Setting(4, 1, 2))
        setting, device, identity = settings[0], torch.device("cpu"), "kernel"

        @staticmethod
        def chunks_wanted(batch: int, threads: int) -> int:
            return batch * threads

    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    def run(error: Exception) -> bool:
        if kernel.setting == Kernel.settings[1]:
            raise error
        return True

    kernel, tuner = Kernel(), Tuner(Options(tune=True))
    key = tuner.adopt(kernel, "forward", 1, 9)
    with pytest.raises(RuntimeError, match="illegal"):
        tuner.search(kernel, key, lambda: run(RuntimeError("an illegal memory access")))
    assert kernel.setting == Kernel.settings[0] and not list(fresh.glob("tuned-*"))
    tuner = Tuner(Options(tune=True))
    tuner.search(kernel, key, lambda: run(OutOfResources("shared memory")))
    assert tuner.known[key] in (Kernel.settings[0], Kernel.settings[2]) and len(list(fresh.glob("tuned-*"))) == 1
