"""Is what is chosen the best there is? `python benchmarks/choice.py`

At every point of a grid (cell, batch, time, state numbers) the library's own choice, once it has settled, is held against an exhaustive
search over chunks, warm-ups, threads and, where a cell has a narrow input, whether its product is folded into the loop. The search leaves
out nothing that converges. The best few and the choice are then timed again by turns, since the fastest of many noisy times is too fast.
Writes benchmarks/out/choice.json, and prints what is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from measure import machine  # noqa: E402
from shell import bar, parser  # noqa: E402

import seqparc  # noqa: E402
from seqparc.options import Options  # noqa: E402
from seqparc.runtime.engine import Engine  # noqa: E402
from seqparc.runtime.module import TOOLS  # noqa: E402
from seqparc.runtime.run import run  # noqa: E402
from tests.cells import SLSTM, BlockGRU, ElementwiseGRU, MinGRU  # noqa: E402

#: The choice is good where it takes at most so much more than the best, and the model is where so many of the points are good.
GOOD, SHARE = 0.15, 0.9
#: Multiply-adds and the like of one run at most: a point beyond takes too long to search.
MOST = 1.2e9
#: Calls in which the choice settles, at most so many seconds of them, and turns in which finalists are timed.
SETTLING, PATIENCE, TURNS, FINALISTS = 40, 3.0, 11, 4

WARMUPS = (4, 8, 16, 32, 64, 128, 256)
BATCHES, STEPS = (1, 4, 16, 64), (64, 256, 1024, 4096, 16384)

#: Cell by name -> (widths, width -> the cell, width -> inputs, width -> work of a step and sample, about).
Maker = Callable[[int], nn.Module]
CELLS: dict[str, tuple[tuple[int, ...], Maker, Callable[[int], int], Callable[[int], float]]] = {
    "elementwise GRU": ((1, 8, 64), ElementwiseGRU, lambda d: 3 * d, lambda d: 40.0 * d),
    "minGRU": ((4, 64), lambda d: MinGRU(4, d), lambda d: 4, lambda d: 20.0 * d),
    "sLSTM": ((2, 16), SLSTM, lambda d: 4 * d, lambda d: 150.0 * d),
    "block GRU": ((16, 64), lambda d: BlockGRU(d // 4, 4), lambda d: 3 * d, lambda d: 60.0 * d),
    "GRU": ((8, 32, 96), lambda d: nn.GRUCell(8, d), lambda d: 8, lambda d: 3.0 * d * (d + 20)),
    "GRU, wide input": ((32,), lambda d: nn.GRUCell(64, d), lambda d: 64, lambda d: 3.0 * d * (d + 80)),
    "LSTM": ((16, 64), lambda d: nn.LSTMCell(8, d), lambda d: 8, lambda d: 4.0 * d * (d + 30)),
    "RNN": ((16, 48), lambda d: nn.RNNCell(8, d), lambda d: 8, lambda d: 1.0 * d * (d + 30)),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run: chunks, steps of warm-up before each, threads, and whether a narrow input's product is part of the loop."""

    chunks: int
    warmup: int
    threads: int
    folded: bool


class Point:
    """A cell at a shape, with an engine for every way to run it."""

    def __init__(self, cell: str, width: int, batch: int, steps: int, threads: int, gradients: bool) -> None:
        self.about = {"cell": cell, "D": width, "B": batch, "T": steps}
        self.threads, self.gradients = threads, gradients
        _, make, inputs, _ = CELLS[cell]
        torch.manual_seed(0)
        module = make(width)
        rnn = seqparc.compile(module)
        x = torch.randn(batch, steps, inputs(width), requires_grad=gradients)
        leaves, _, start = rnn.understand(x)
        found = rnn.engine(x)
        assert isinstance(found, Engine), found
        self.x, self.start, self.engine = leaves, start, found
        self.engines = {True: found}
        self.weights = list(module.parameters())
        other = self._plan(rnn, False)
        if other is not None:
            self.engines[False] = other

    def _plan(self, rnn: seqparc.CompiledRNN, fold: bool) -> Engine | None:
        """The cell compiled with its input's product outside of the loop, if it is inside."""
        call = rnn._call(self.x[0], None)
        start = [s[:3] for s in call.start] if len(call.start[0]) >= 3 else [s[:1].expand(3, *s.shape[1:]) for s in call.start]
        plan = TOOLS["compile_plan"](rnn.cell, call.convention, [v[:1, 0].expand(3, *v.shape[2:]) for v in call.leaves], start, fold=fold)
        if plan.program.stream_sizes == self.engine.plan.program.stream_sizes:
            return None
        return Engine(plan, TOOLS["backends"](rnn.options, self.x[0].device), Options(), TOOLS["choose"])

    def caller(self, way: Way | None) -> tuple[Callable[[], Any], Engine]:
        """A call that runs one way, or as the library chooses."""
        engine = self.engine
        if way is not None:
            like = self.engines[way.folded]
            asked = Options(strategy="shooting" if way.chunks > 1 else "sequential", chunks=way.chunks, warmup=way.warmup, update="none")
            engine = Engine(like.plan, like.backends, asked, TOOLS["choose"])
            engine.kernels = like.kernels  # made once

        def call() -> Any:
            if not self.gradients:
                with torch.no_grad():
                    return run(engine, self.x, self.start)
            y = run(engine, self.x, self.start).outputs[0]
            return torch.autograd.grad(y, [self.x[0], *self.weights], torch.ones_like(y))

        return call, engine

    def ways(self) -> Iterator[Way]:
        batch, steps = self.about["B"], self.about["T"]
        for folded in self.engines:
            for threads in {1, self.threads}:
                yield Way(1, 0, threads, folded)
            chunks = 2
            while chunks * batch <= 1024 and chunks <= steps // 8:
                for warmup in WARMUPS:
                    if warmup <= steps // chunks:
                        yield Way(chunks, warmup, self.threads, folded)
                chunks *= 2


def timed(call: Callable[[], Any], threads: int) -> float:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def converged(engine: Engine) -> bool:
    return all(last[3].seen().converged for last in engine.last.values())


def look(cell: str, width: int, batch: int, steps: int, threads: int, gradients: bool) -> dict[str, Any]:
    """The choice and the best of a point: seconds of each, and what they are."""
    p = Point(cell, width, batch, steps, threads, gradients)
    chosen, engine = p.caller(None)
    timed(chosen, threads)  # kernels are made
    until = time.perf_counter() + PATIENCE
    for _ in range(SETTLING):
        timed(chosen, threads)
        if time.perf_counter() > until:
            break
    found: list[tuple[float, Way, Callable[[], Any]]] = []
    for way in p.ways():
        call, other = p.caller(way)
        timed(call, way.threads)
        if converged(other):
            found.append((min(timed(call, way.threads) for _ in range(2)), way, call))
    found.sort(key=lambda f: f[0])
    best = [f for f in found[: 3 * FINALISTS] if f[0] < 1.5 * found[0][0]]
    best = sorted(((min(timed(call, way.threads) for _ in range(4)), way, call) for _, way, call in best), key=lambda f: f[0])[:FINALISTS]
    times: list[list[float]] = [[] for _ in (None, *best)]
    for _ in range(TURNS):
        for t, (call, team) in zip(times, [(chosen, threads), *((c, w.threads) for _, w, c in best)], strict=True):
            t.append(timed(call, team))
    torch.set_num_threads(threads)
    mine, *others = map(statistics.median, times)
    at = min(range(len(others)), key=others.__getitem__)
    choice = {k: {"chunks": last[1].chunks, "warmup": last[1].warmup, "passes": last[3].seen().passes} for k, last in engine.last.items()}
    return {**p.about, "chosen_s": mine, "best_s": others[at], "chosen": choice, "best": vars(best[at][1]), "searched": len(found)}


def grid(gradients: bool) -> list[tuple[str, int, int, int]]:
    """All points that do not take too long to search."""
    return [
        (cell, width, batch, steps)
        for cell, (widths, _, _, work) in CELLS.items() for width in widths for batch in BATCHES for steps in STEPS
        if work(width) * batch * steps * (4 if gradients else 1) <= MOST
    ]  # fmt: skip


def over(row: dict[str, Any]) -> float:
    return float(row["chosen_s"] / row["best_s"] - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Search the grid; 0 when it was searched, whatever it shows."""
    shell = parser(__doc__, repeats=1)
    shell.add_argument("--gradients", action="store_true", help="forward and backward together")
    shell.add_argument("--points", type=int, default=200, help="so many of the grid's points, evenly spread")
    args = shell.parse_args(argv)
    torch.set_num_threads(args.threads)
    console, about = Console(width=150), machine()
    points = [p for p in grid(args.gradients) if args.only in p[0]]
    points = [points[i * len(points) // args.points] for i in range(args.points)] if len(points) > args.points else points
    if args.quick:
        points = [p for p in points if p[3] <= 256][:2]
    rows: list[dict[str, Any]] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(points))
        for cell, width, batch, steps in points:
            progress.update(task, description=f"{cell} {width}, {batch} × {steps}", refresh=True)
            rows.append(look(cell, width, batch, steps, args.threads, args.gradients))
            progress.advance(task)
    missed = sorted((r for r in rows if over(r) > GOOD), key=over, reverse=True)
    table = Table(title=f"more than {100 * GOOD:.0f} % slower than the best of a search", title_justify="left")
    for head in ("cell", "D", "B", "T", "chosen, ms", "best, ms", "more", "chosen", "best"):
        table.add_column(head, justify="left" if head in ("cell", "chosen", "best") else "right")
    for r in missed:
        mine = "; ".join(f"{c['chunks']} chunks, warm-up {c['warmup']}, {c['passes']} passes" for c in r["chosen"].values())
        b = r["best"]
        best = f"{b['chunks']} chunks, warm-up {b['warmup']}, {b['threads']} threads" + ("" if b["folded"] else ", input outside")
        times = f"{1e3 * r['chosen_s']:.3g}", f"{1e3 * r['best_s']:.3g}", f"{100 * over(r):.0f} %"
        table.add_row(r["cell"], str(r["D"]), str(r["B"]), str(r["T"]), *times, mine, best)
    console.print(table)
    share = 1 - len(missed) / max(1, len(rows))
    told = f"{len(rows)} points; within {100 * GOOD:.0f} % of the best at {100 * share:.0f} % of them; asked for: {100 * SHARE:.0f} %"
    console.print(told)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "choice-gradients.json" if args.gradients else "choice.json"
    (args.out / name).write_text(json.dumps({"machine": about, "rows": rows, "verdict": told}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
