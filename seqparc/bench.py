"""How fast a cell is: the plain loop, the sequential kernel, and what seqparc chooses, forward and with gradients.

Every time is a call from Python, everything included; medians over runs, with the least and the most. The plain loop may be run over
fewer steps, where all would take too long, and then says so: its time for all is in proportion. Compile times are those of processes of
their own, with an empty cache and with the one that the first has left.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import seqparc
from seqparc.errors import SeqparcError
from seqparc.report import rendered
from seqparc.runtime.module import CompiledRNN
from seqparc.targets import inputs, load
from seqparc.tree import flatten

#: Calls before those that count, and of the loop; runs at least; steps that tell how long the loop takes; seconds of one loop at most.
BEFORE, LOOP_BEFORE, LEAST, FIRST, LONGEST = 5, 1, 3, 64, 2.0
#: Steps over which errors are found, at most.
CHECKED = 1024
LOOP, SEQUENTIAL, AUTO = "plain loop", "seqparc, sequential", "seqparc, auto"
WHATS = ("forward", "forward and backward")


@dataclass(frozen=True)
class Timing:
    """Seconds of calls over `steps` of `whole` steps."""

    median: float
    least: float
    most: float
    runs: int
    steps: int
    whole: int

    @property
    def all(self) -> float:
        """The median for all steps, in proportion where fewer were run."""
        return self.median * self.whole / self.steps


@dataclass(frozen=True)
class Result:
    """times: by system and direction; errors: by system, the largest of values and of gradients against the loop in float64, over
    `checked` steps, relative to the tensor's largest magnitude; ok: within what `validate` allows; compiled: seconds, cold and warm.
    """

    name: str
    shape: tuple[int, ...]
    times: dict[str, dict[str, Timing]]
    errors: dict[str, dict[str, float]]
    checked: int
    ok: bool
    how: dict[str, str]
    compiled: dict[str, float]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """Everything in it, of plain types, times for all steps too."""
        found = asdict(self)
        found["times"] = {
            name: {what: {**asdict(t), "all": t.all, "extrapolated": t.steps < t.whole} for what, t in row.items()}
            for name, row in self.times.items()
        }
        return found

    def table(self) -> Table:
        table = Table(title=f"{self.name}: batch, time, … = {', '.join(map(str, self.shape))}", title_justify="left")
        for head in ("system", "what", "median [ms]", "least", "most", "runs", "× as fast as the loop", "largest error"):
            table.add_column(head, justify="left" if head in ("system", "what") else "right")
        for name, row in self.times.items():
            for what, kind in zip(WHATS, ("values", "gradients"), strict=True):
                t = row[what]
                per, mark = 1e3 * t.whole / t.steps, "*" if t.steps < t.whole else ""
                figures = [_figure(per * seconds) + mark for seconds in (t.median, t.least, t.most)]
                error = self.errors[name].get(kind)
                told = "" if error is None else f"{kind} {error:.1e}"
                faster = _figure(self.times[LOOP][what].all / t.all)
                table.add_row(name if what == WHATS[0] else "", what, *figures, str(t.runs), faster, told, end_section=what == WHATS[1])
        table.caption, table.caption_justify = "\n".join(self.lines()), "left"
        return table

    def lines(self) -> list[str]:
        """What the figures are of."""
        lines = ["medians of runs, everything that a call costs included"]
        for what in WHATS:
            t = self.times[LOOP][what]
            if t.steps < t.whole:
                lines.append(f"* the plain loop ran over {t.steps} of {t.whole} steps ({1e3 * t.median:.3g} ms, {what}); all in proportion")
        whole = self.times[LOOP][WHATS[0]].whole
        over = f"{self.checked} steps" if self.checked == whole else f"the first {self.checked} of {whole} steps"
        lines.append(f"errors: the largest against the loop in float64 over {over}, relative to the largest magnitude; " + self._verdict())
        lines += [f"{name}: {text}" for name, text in self.how.items()]
        if self.compiled:
            lines.append(", ".join(f"{kind}: {t:.2f} s" for kind, t in self.compiled.items()))
        return [*lines, self.machine]

    def _verdict(self) -> str:
        return "within what rounding allows" if self.ok else "LARGER than rounding allows"

    def __str__(self) -> str:
        return rendered(self.table())


def _figure(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"


def bench(target: str, shapes: Sequence[str], seconds: float, runs: int, compiling: bool) -> Result:
    """Measure what `module:object` names on random inputs: each figure of at most so many runs, in about so many seconds."""
    rnn = load(target)
    x = inputs(shapes, rnn)
    compiled = compile_times(target, shapes) if compiling else {}
    leaves, _, _ = rnn.understand(x)
    whole, shape = leaves[0].shape[1], tuple(leaves[0].shape)
    systems = {SEQUENTIAL: _with(rnn, "sequential"), AUTO: _with(rnn, "auto")}
    fit = {what: _fit(rnn, x, what) for what in WHATS}
    times = {LOOP: {what: _timed(_call(rnn.sequential, rnn, _cut(x, fit[what]), what), fit[what], whole, seconds, runs, LOOP_BEFORE)
                    for what in WHATS}}  # fmt: skip
    how, errors, ok, checked = {}, {}, True, min(CHECKED, fit[WHATS[1]])
    for name, system in systems.items():
        times[name] = {what: _timed(_call(system, system, x, what), whole, whole, seconds, runs, BEFORE) for what in WHATS}
        s = system.stats
        how[name] = f"{s.backend}, {s.verdict}" + ("" if s.backward is None else f"; backward {s.backward.verdict}")
        report = system.validate(_cut(x, checked))
        errors[name] = _largest(report.rows, lambda r: r.largest)
        errors[LOOP] = _largest(report.rows, lambda r: r.loop)
        ok = ok and report.ok
    return Result(rnn.name, shape, times, errors, checked, ok, how, compiled, _machine())


def _with(rnn: CompiledRNN, strategy: Any) -> CompiledRNN:
    """The same cell, with nothing made for it yet."""
    made = copy.copy(rnn)
    made.options = replace(rnn.options, strategy=strategy)
    return made


def _cut(x: Any, steps: int) -> Any:
    leaves, structure = flatten(x)
    return structure.unflatten([v[:, :steps] for v in leaves])


def _call(run: Callable[..., Any], rnn: CompiledRNN, x: Any, what: str) -> Callable[[], Any]:
    """A call to time: of the cell's parameters' gradients, or where it has none, of those of x."""
    if what == WHATS[0]:

        def forward() -> Any:
            with torch.no_grad():
                return run(x)

        return forward
    parameters: list[Tensor] = [p for p in rnn.parameters() if p.requires_grad]
    leaves, structure = flatten(x)
    wanted = parameters or [v.detach().requires_grad_() for v in leaves]
    given = x if parameters else structure.unflatten(wanted)

    def both() -> Any:
        y, last = run(given)
        results = [t for t in (*flatten(y)[0], *flatten(last)[0]) if t.requires_grad]
        if not results:
            raise SeqparcError(f"{rnn.name} gives nothing that has a gradient")
        return torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)

    return both


def _fit(rnn: CompiledRNN, x: Any, what: str) -> int:
    """Steps that the plain loop can be run over in LONGEST seconds."""
    whole = flatten(x)[0][0].shape[1]
    first = min(FIRST, whole)
    call = _call(rnn.sequential, rnn, _cut(x, first), what)
    call()
    began = time.perf_counter()
    call()
    return max(first, min(whole, int(LONGEST / max(time.perf_counter() - began, 1e-9) * first)))


def _timed(call: Callable[[], Any], steps: int, whole: int, seconds: float, runs: int, before: int) -> Timing:
    for _ in range(before):
        call()
    times: list[float] = []
    while len(times) < min(LEAST, runs) or (len(times) < runs and sum(times) < seconds):
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - began)
    return Timing(statistics.median(times), min(times), max(times), len(times), steps, whole)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _largest(rows: Sequence[Any], of: Callable[[Any], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for r in rows:
        kind = "gradients" if r.name.startswith("gradient") else "values"
        found[kind] = max(found.get(kind, 0.0), of(r))
    return found


def _machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"vectors {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, seqparc {seqparc.__version__}"
    )


def compile_times(target: str, shapes: Sequence[str]) -> dict[str, float]:
    """Seconds from the cell to its kernels, forward and backward, in processes of their own: with an empty cache, and with a full one."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="seqparc-bench-") as folder:
        where = os.pathsep.join(filter(None, (str(Path(seqparc.__file__).parent.parent), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "SEQPARC_CACHE": folder, "PYTHONPATH": where}
        for kind in ("compiling with an empty cache", "with a full one"):
            command = [sys.executable, "-c", "from seqparc.bench import first_call; first_call()", target, *shapes]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                raise SeqparcError(f"a process of its own could not compile {target}:\n{done.stderr.strip()}")
            found[kind] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def first_call() -> None:
    """In a process of its own: make the kernels of a cell, and print how long that took. Steps do not matter, so there are few."""
    target, *shapes = sys.argv[1:]
    rnn = load(target)
    x = _cut(inputs(shapes, rnn), FIRST)
    wanted: list[Tensor] = [p for p in rnn.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        y, last = rnn(x)
        results = [t.sum() for t in (*flatten(y)[0], *flatten(last)[0]) if t.requires_grad]
    if results:
        torch.stack(results).sum().backward()
    print(json.dumps(rnn.stats.compile_seconds))
