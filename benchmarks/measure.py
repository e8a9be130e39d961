"""Timing: systems of one case by turns, medians, errors against float64; and compile times in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case
from torch import Tensor

import seqparc
from seqparc.codegen.floor import Floor, floor
from seqparc.runtime.reference import loop
from seqparc.validate import Precise

Timed = Callable[[], Any]

#: Milliseconds after which a system is not timed again.
LONG = 8_000


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    from seqparc.codegen.build import compiler

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "compiler": compiler()[1],
        "seqparc": seqparc.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _first(result: Any) -> Tensor:
    """The output of a layer or compiled cell; of a pair of states the first."""
    y = result[0]
    return y if isinstance(y, Tensor) else y[0]


class Subject:
    """One system on one case."""

    def __init__(self, name: str, case: Case, cell: Any, call: Callable[[Tensor], Any], backward: bool = True, once: bool = False) -> None:
        self.name, self.cell, self.call, self.once = name, cell, call, once
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(case.shape, generator=generator)
        self.given = self.x.clone().requires_grad_()
        self.weights = list(cell.parameters())
        self.backward = backward
        self.times: dict[str, list[float]] = {"fwd": [], "fwd+bwd": []}
        self.cotangent: Tensor | None = None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return _first(self.call(self.x))

    def both(self) -> None:
        """Forward, and the gradients of x and every parameter."""
        y = _first(self.call(self.given))
        if self.cotangent is None:
            self.cotangent = torch.ones_like(y)
        torch.autograd.grad(y, [self.given, *self.weights], self.cotangent)

    def take(self, what: str) -> None:
        begin = time.perf_counter()
        self.forward() if what == "fwd" else self.both()
        self.times[what].append(1000 * (time.perf_counter() - begin))


def subjects(case: Case) -> list[Subject]:
    """Every system that can run a case, on the same weights."""
    torch.manual_seed(0)
    cell = case.make()
    found = []
    plain = seqparc.compile(cell)
    found.append(Subject("eager loop", case, cell, plain.sequential, once=True))
    if case.builtin is not None:
        layer = case.builtin(cell)
        found.append(Subject("torch built-in", case, layer, layer))
    if case.hand is not None:
        h0 = torch.zeros(case.shape[0], cell.hidden_size)
        hand = case.hand
        found.append(Subject("C loop", case, cell, lambda x: hand(cell, x, h0), backward=False))
    for name, strategy in (("seqparc sequential", "sequential"), ("seqparc", "auto")):
        rnn = seqparc.compile(cell, options={"strategy": strategy})
        found.append(Subject(name, case, rnn, rnn))
    return found


def truth(cell: Any, case: Case, x: Tensor, most: int = 4000) -> Tensor:
    """The first steps of the plain loop in float64."""
    rnn = seqparc.compile(cell)
    x = x[:, :most]
    _, convention, start = rnn.understand(x)
    with torch.no_grad(), Precise(torch.float64):
        outputs, _ = loop(lambda a, b: convention.call(cell, a, b), [x.double()], [s.double() for s in start])
    return outputs[0]


def measure(case: Case, repeats: int, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of one case: systems and directions take turns, so that a slow moment of the machine hits all of them."""
    systems = subjects(case)
    right = truth(systems[0].cell, case, systems[0].x)
    rows = []
    for s in systems:
        tick(f"{case.name}: {s.name}")
        begin = time.perf_counter()
        y = s.forward()
        if s.backward and not s.once:
            s.both()
        first = time.perf_counter() - begin
        error = float((y[:, : right.shape[1]].double() - right).abs().max())
        rows.append({"case": case.name, "shape": list(case.shape), "system": s.name, "first_call_s": first, "largest_error": error})
        if not s.once:
            for _ in range(2):  # the warm-up of adaptive choices
                s.forward()
                if s.backward:
                    s.both()
    for turn in range(repeats):
        for what in ("fwd", "fwd+bwd"):
            for s in systems:
                if (turn == 0 or not s.once) and (what == "fwd" or s.backward) and sum(s.times[what]) < LONG:
                    s.take(what)
    least = floors(systems[-1], case)
    for s, row in zip(systems, rows, strict=True):
        row["floor"] = least
        for what, times in s.times.items():
            if times:
                row[what] = {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}
        if isinstance(s.cell, seqparc.CompiledRNN):
            stats = s.cell.stats
            row["compile_s"] = stats.compile_seconds
            for key, part in (("forward", stats), ("backward", stats.backward)):
                if part is not None:
                    row[key] = {"chunks": part.chunks, "warmup": part.warmup, "passes": part.passes, "gap": part.gap}
    return rows


def floors(s: Subject, case: Case) -> dict[str, Any]:
    """The least milliseconds that the recurrence takes on this processor, forward and with gradients, and what takes most of them."""
    engine = s.cell.engine()
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
