"""Timing: systems of one case by turns, medians, errors against float64; and compile times in processes of their own."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case
from resident import peak
from subjects import SYSTEMS, Subject
from torch import Tensor

import seqparc
from seqparc.codegen.floor import Floor, floor
from seqparc.runtime.reference import loop
from seqparc.validate import Precise

#: What is measured beside where it is installed; of pararnn-torch peers.py knows.
PEERS = ("jax", "numba")
#: Milliseconds after which a system is not timed again.
LONG = 1_000
#: Calls before those that are timed, in which adaptive choices settle. One that takes SLOW milliseconds is the last, and is timed, if it is
#: not the first of what compiles in its first calls.
SETTLING, SLOW = 3, 1_000
#: Calls of fewer milliseconds than SHORT are timed in a row, as in a loop, for TURN milliseconds a turn, after as many in which caches
#: become the system's own and cores that slept are there again; those of fewer than WAKING one by one, after one that is not timed.
SHORT, TURN, WAKING = 20, 10, 200


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    from seqparc.codegen.build import compiler

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "compiler": compiler()[1],
        **{name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)},
        "seqparc": seqparc.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def truth(cell: Any, x: Tensor, most: int = 4000) -> Tensor:
    """The first steps of the plain loop in float64."""
    rnn = seqparc.compile(cell)
    x = x[:, :most]
    _, convention, start = rnn.understand(x)
    with torch.no_grad(), Precise(torch.float64):
        outputs, _ = loop(lambda a, b: convention.call(cell, a, b), [x.double()], [s.double() for s in start])
    return outputs[0]


class Timed:
    """A subject, and what is found out about it: milliseconds, bytes, the largest error against `right`, the first steps in float64."""

    def __init__(self, subject: Subject, right: Tensor) -> None:
        self.subject = subject
        self.calls = {"fwd": subject.forward} | ({"fwd+bwd": subject.both} if subject.both else {})
        self.times: dict[str, list[float]] = {what: [] for what in self.calls}  # a turn's median each
        self.memory: dict[str, int | None] = {}
        self.stats: dict[str, Any] = {}  # of the last call of each direction
        self.ratios: list[float] = []  # of what the recurrence of a call took backward and forward
        self.once: dict[str, float] = {}  # about what a call takes
        self.first_s = self.before_s = 0.0  # in the first calls; in all that came before the turns
        for what, times in self.times.items():
            for n in range(SETTLING):
                self.memory[what], (took, result) = peak(functools.partial(self.take, what))
                if what == "fwd" and n == 0:
                    y = subject.read(result)[:, : right.shape[1]]
                    self.error = float((y.double() - right[:, : y.shape[1]]).abs().max())
                del result
                self.first_s += took / 1000 if n == 0 else 0
                if subject.once or (took > SLOW and (n > 0 or subject.rnn is None)):
                    times.append(took)
                    self.look(what)
                    break
            self.once[what] = took

    def take(self, what: str) -> tuple[float, Any]:
        """The milliseconds of a call, and what it gave."""
        begin = time.perf_counter()
        result = self.calls[what]()
        return 1000 * self.subject.scale * (time.perf_counter() - begin), result

    def turn(self, what: str) -> None:
        """A call, timed, or as many short ones as there is time for, after as many that are not."""
        took: list[float] = []
        for _ in range(2 if self.once[what] < WAKING else 1):
            took.clear()
            until = time.perf_counter() + (TURN / 1000 if self.once[what] < SHORT else 0)
            while not took or time.perf_counter() < until:
                took.append(self.take(what)[0])
        self.times[what].append(statistics.median(took))
        self.look(what)

    def look(self, what: str) -> None:
        """Note what is told of the last call."""
        if self.subject.rnn is not None:
            self.stats[what] = stats = self.subject.rnn.stats
            if stats.backward is not None and stats.seconds and stats.backward.seconds:
                self.ratios.append(stats.backward.seconds / stats.seconds)

    def row(self) -> dict[str, Any]:
        s = self.subject
        row: dict[str, Any] = {"system": s.name, "note": s.note, "largest_error": self.error}
        row |= {"first_call_s": self.first_s, "before_s": self.before_s}
        for what, times in self.times.items():
            row[what] = {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}
            if s.scale == 1 and self.memory[what] is not None:
                row[what]["bytes"] = self.memory[what]
        seconds = s.compile_s if s.rnn is None else s.rnn.stats.compile_seconds
        if seconds is not None:
            row["compile_s"] = seconds
        if self.ratios:
            row["backward_over_forward"] = statistics.median(self.ratios)
        if self.stats:
            for key, part in (("forward", self.stats["fwd"]), ("backward", self.stats["fwd+bwd"].backward)):
                if part is not None:
                    row[key] = {"chunks": part.chunks, "warmup": part.warmup, "passes": part.passes, "gap": part.gap}
        return row


def measure(case: Case, repeats: int, tick: Callable[[str], None], skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of one case: systems and directions take turns, so that a slow moment of the machine hits all. skip: names of systems."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it compiles a function for so many cells at most
    cell, x = case.make(), torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    right = truth(cell, x)
    systems = []
    for name, make in SYSTEMS.items():
        tick(f"{case.name}: {name}")
        begin = time.perf_counter()
        subject = None if name in skip else make(name, case, cell, x)
        if subject is not None:
            systems.append(Timed(subject, right))
            systems[-1].before_s = time.perf_counter() - begin
    tick(f"{case.name}: all by turns")
    for _ in range(repeats):
        for what in ("fwd", "fwd+bwd"):
            for s in systems:
                if not s.subject.once and what in s.calls and sum(s.times[what]) < LONG:
                    s.turn(what)
    rnn = systems[-1].subject.rnn
    assert rnn is not None
    least = floors(rnn, case)
    return [{"case": case.name, "shape": list(case.shape), "floor": least} | s.row() for s in systems]


def floors(rnn: Any, case: Case) -> dict[str, Any]:
    """The least milliseconds that the recurrence takes on this processor, forward and with gradients, and what takes most of them."""
    engine = rnn.engine()
    plan, adjoint = engine.plan, engine.plan.adjoint()
    weights = sum(o.columns.shape[0] * o.ix.shape[0] * o.ix.shape[1] for o in adjoint.outers)  # whose gradients are made outside the kernel
    batch, steps, _ = case.shape
    found = [
        floor(program, plan.dtype, batch, steps, torch.get_num_threads(), products)
        for program, products in ((plan.program, 0), (adjoint.program, weights))
    ]
    both = Floor(sum(f.seconds for f in found), found[1].unit)
    return {what: {"ms": 1000 * f.seconds, "unit": f.unit} for what, f in (("fwd", found[0]), ("fwd+bwd", both))}


_COMPILE = """
import json, sys, time
begin = time.perf_counter()
import torch
import_torch = time.perf_counter() - begin
import seqparc
imported = time.perf_counter() - begin - import_torch
from tests.cells import CELLS
name, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
rnn = seqparc.compile(CELLS[name].make())
x = torch.randn(1, steps, CELLS[name].inputs)
begin = time.perf_counter()
y, last = rnn(x)
y = y if isinstance(y, torch.Tensor) else y[0]
y.sum().backward()
first = time.perf_counter() - begin
begin = time.perf_counter()
y, last = rnn(x)
y = y if isinstance(y, torch.Tensor) else y[0]
y.sum().backward()
second = time.perf_counter() - begin
print(json.dumps({"import_s": imported, "first_s": first, "compile_s": first - second}))
"""


def compile_times(name: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Seconds from the cell to both kernels, in processes of their own.

    Cold: with an empty cache, for each length. Warm: from the cache that the first length left.
    """
    root = Path(__file__).parent.parent
    row: dict[str, Any] = {"cell": name}

    def run(steps: int, folder: str) -> dict[str, Any]:
        env = {**os.environ, "SEQPARC_CACHE": folder, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", _COMPILE, name, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=root)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    with tempfile.TemporaryDirectory() as first:
        row[f"cold T={lengths[0]}"] = run(lengths[0], first)
        row |= {f"warm T={steps}": run(steps, first) for steps in lengths}
    for steps in lengths[1:]:
        with tempfile.TemporaryDirectory() as folder:
            row[f"cold T={steps}"] = run(steps, folder)
    return row
