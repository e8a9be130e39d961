"""Where the time of a call goes: runs of a cell by an engine of their own, whose kernels and pieces are timed one by one.

What is added up is wall-clock time between two readings around each part, on a GPU with the device waited for, which an ordinary call does
not do. The engine of the cell itself is left alone: it learns nothing from these runs, and its statistics stay those of the last call.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from seqparc.errors import SeqparcError, SeqparcWarning
from seqparc.plan import Plan
from seqparc.runtime.engine import Engine
from seqparc.runtime.module import TOOLS
from seqparc.runtime.run import run
from seqparc.runtime.slabs import count
from seqparc.spans import Spans

#: Runs before those that count, in which the engine learns and memory is touched for the first time, and runs that count.
BEFORE, RUNS = 2, 7
#: Seconds that one of them may take, as far as a first run of so many steps tells, and all of them; beyond there are LEAST of them.
SECONDS, FIRST, LEAST = 1.0, 1024, 3
#: Bytes beyond which nothing is run for the sake of being measured.
MOST = 1 << 30

#: What ends the names of what torch's autograd does of a part.
AUTOGRAD = ", autograd"
FORWARD = ("on parameters alone", "prelude", "kernel", "further passes", "updates", "gap", "sequential end", "readout")
BACKWARD = ("readout" + AUTOGRAD, *FORWARD[2:-1], "weights' gradients, memory", "prelude" + AUTOGRAD)
#: What no part accounts for.
REST = "rest (Python, memory)"


@dataclass(frozen=True)
class Timeline:
    """Seconds by direction and part, of the run of median length of `runs` runs; `total` is (median, least, most) by direction.

    batch, steps: of what was run, of `whole` steps; reason: why nothing was.
    """

    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    runs: int = 0
    batch: int = 0
    steps: int = 0
    whole: int = 0
    reason: str = ""

    def lines(self) -> tuple[str, ...]:
        """In words."""
        if self.reason:
            return (f"not measured: {self.reason}",)
        of = "" if self.steps == self.whole else f", the first of {self.whole}, as all would take too long"
        lines = [f"{self.batch} × {self.steps} steps{of}; the median of {self.runs} runs after {BEFORE} others, its parts timed one by one"]
        for direction, parts in self.parts.items():
            middle, least, most = self.total[direction]
            lines.append(f"{direction}: {milliseconds(middle)} ({milliseconds(least)} to {milliseconds(most)})")
            lines += [f"  {name}: {milliseconds(t)}, {100 * t / middle:.0f}%" for name, t in parts.items()]
        return tuple(lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


class _Clock:
    """Seconds by part since it was last emptied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self.entered = self.left = 0.0  # when backward of the recurrence began first and ended last
        self.passes = 0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - begin)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


class _Kernel:
    """A kernel whose sweeps, scans and gaps are timed; otherwise the kernel itself."""

    def __init__(self, kernel: Any, clock: _Clock, jacobian: bool) -> None:
        self._kernel, self._clock, self._jacobian = kernel, clock, jacobian

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        return self._clock.timed("kernel", found) if name == "alone" else found

    def sweep(self, spans: Spans, start: Tensor, streams: Any, params: Any, emits: Sequence[Any], *rest: Any) -> Tensor:
        """Of the kind that it is: the first over all chunks, a further one, of Jacobians, or to the end by the sequential kernel."""
        clock = self._clock
        name = "updates" if self._jacobian else "kernel" if not clock.passes else "sequential end" if len(spans) == 1 else "further passes"
        clock.passes += not self._jacobian and any(y is not None for y in emits)
        with clock.part(name):
            return self._kernel.sweep(spans, start, streams, params, emits, *rest)  # type: ignore[no-any-return]

    def again(self, *args: Any) -> Any:
        sweep = self._kernel.again(*args)
        sweep.run = self._clock.timed("kernel", sweep.run)
        return sweep

    def scan(self, *args: Any) -> Any:
        with self._clock.part("updates"):
            return self._kernel.scan(*args)

    def gap(self, *args: Any) -> Any:
        with self._clock.part("gap"):
            return self._kernel.gap(*args)


class _Watched(Engine):
    """An engine for the plan of another, with what that has learnt and with its kernels, that takes the time."""

    def __init__(self, other: Engine, clock: _Clock) -> None:
        self.clock = clock
        plan = _timed(other.plan, clock)
        super().__init__(plan, other.backends, replace(other.options, tune=False), TOOLS["choose"])
        self.stages = [None if e is None else _Watched(e, clock) for e in other.stages]
        self.experience = copy.deepcopy(other.experience)
        self.kernels = {key: (name, self._watch(key, kernel)) for key, (name, kernel) in other.kernels.items()}

    def _watch(self, key: str, kernel: Any) -> Any:
        return _Kernel(kernel, self.clock, key.split()[-1] in ("exact", "diagonal"))

    def _make(self, direction: str, program: Any, device: torch.device) -> Any:
        name, kernel = super()._make(direction, program, device)
        return name, self._watch(direction, kernel)

    def solve(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.passes = 0
        return super().solve(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        clock, begin, before = self.clock, self.clock.now(), sum(self.clock.parts.values())
        clock.entered = clock.entered or begin
        found = super().backward(*args, **kwargs)
        clock.left = clock.now()
        clock.add("weights' gradients, memory", clock.left - begin - (sum(clock.parts.values()) - before))
        return found


def _timed(plan: Plan, clock: _Clock) -> Plan:
    pieces = {"weights": "on parameters alone", "prelude": "prelude", "readout": "readout"}
    found = {name: getattr(plan, name) for name in pieces}
    timed: dict[str, Any] = {n: p if p is None else replace(p, run=clock.timed(pieces[n], p.run)) for n, p in found.items()}
    return replace(plan, **timed)


def timeline(
    engine: Engine, x: Sequence[Tensor], start: Sequence[Tensor], gradient: bool, most: int = 0
) -> tuple[Timeline, Engine | None]:
    """Measure calls on x leaves [batch, time, ...] from start leaves [batch, ...], with backward if `gradient`.

    Returns the engine that ran them too. most: bytes that a call makes, so far as it is known.
    """
    batch, steps = x[0].shape[:2]
    if engine.backends[0][0] == "triton" and x[0].device.type == "cpu":
        return Timeline(reason="Triton kernels run on a processor by its interpreter, whose times say nothing"), None
    if most > MOST or count(batch, steps, engine.row_bytes) > 1:
        return Timeline(reason=f"a call on this input makes more than {MOST >> 30} GiB, or is made in stretches of time"), None
    if not batch or not steps:
        return Timeline(reason="the input is empty"), None
    clock = _Clock(x[0].device)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=sorted({t.device.index for t in x if t.is_cuda})):
            warnings.simplefilter("ignore", SeqparcWarning)
            watched = _Watched(engine, clock)
            return _measured(watched, clock, [v.detach() for v in x], [s.detach() for s in start], gradient), watched
    except SeqparcError as error:
        return Timeline(reason=str(error)), None


def _measured(engine: _Watched, clock: _Clock, x: list[Tensor], start: list[Tensor], gradient: bool) -> Timeline:
    whole, first = x[0].shape[1], [v[:, :FIRST] for v in x]
    _once(engine, clock, first, start, gradient)  # makes the kernels
    one = min(sum(_once(engine, clock, first, start, gradient)[0].values()) for _ in range(2))
    steps = max(FIRST, int(SECONDS / max(one, 1e-9) * min(FIRST, whole)))
    steps = whole if 2 * steps > whole else steps
    runs: list[tuple[dict[str, float], dict[str, dict[str, float]]]] = []
    begin = time.perf_counter()
    while len(runs) < BEFORE + LEAST or (len(runs) < BEFORE + RUNS and time.perf_counter() - begin < SECONDS):
        runs.append(_once(engine, clock, [v[:, :steps] for v in x], start, gradient))
    del runs[:BEFORE]
    found, spread = {}, {}
    for direction, order in (("forward", FORWARD), ("backward", BACKWARD)):
        ranked = sorted((total[direction], k) for k, (total, _) in enumerate(runs) if direction in total)
        if ranked:
            middle, k = ranked[len(ranked) // 2]
            parts = runs[k][1][direction]
            found[direction] = {name: parts[name] for name in (*order, REST) if name in parts}
            spread[direction] = middle, ranked[0][0], ranked[-1][0]
    return Timeline(found, spread, len(runs), x[0].shape[0], steps, whole)


def _once(
    engine: _Watched, clock: _Clock, x: list[Tensor], start: list[Tensor], gradient: bool
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds of one call: in all, and by part, by direction."""
    clock.parts, clock.entered, clock.left = {}, 0.0, 0.0
    with torch.set_grad_enabled(gradient):
        begin = clock.now()
        made = run(engine, x, start)
        end = clock.now()
    total, parts = {"forward": end - begin}, {"forward": clock.parts}
    results = [t for t in (*made.outputs, *made.last) if t.requires_grad]
    wanted = [t for get in engine.plan.attributes.values() if (t := get()).requires_grad]
    if gradient and results and wanted:
        given = [torch.ones_like(t) for t in results]
        clock.parts = {}
        begin = clock.now()
        torch.autograd.grad(results, wanted, given, allow_unused=True)
        end = clock.now()
        total["backward"], parts["backward"] = end - begin, clock.parts
        if clock.left:
            clock.add("readout" + AUTOGRAD, clock.entered - begin)
            clock.add("prelude" + AUTOGRAD, end - clock.left)
    for direction, seconds in total.items():
        parts[direction][REST] = max(0.0, seconds - sum(parts[direction].values()))
    return total, parts
