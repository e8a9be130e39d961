"""How time grows with length, width, batch and threads: `python benchmarks/scaling.py`, or a part of `python benchmarks/run.py --scaling`.

Nanoseconds per step and sample of a call, forward and with gradients, beside torch's layer where there is one and the least that this
processor needs. Writes benchmarks/out/scaling.json and benchmarks/out/scaling.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from cases import Case, ElementwiseGRU, same_weights  # noqa: E402
from measure import floors, machine  # noqa: E402
from shell import bar, parser  # noqa: E402
from subjects import of_torch  # noqa: E402
from targets import Verdict, told, verdict  # noqa: E402

import seqparc  # noqa: E402

#: Calls before those that are timed, in which chunks and warm-ups settle.
SETTLING = 8
#: Seconds after which calls before the timed ones, and the timed ones, end; three of each are made in any case.
ENOUGH = 1.5
#: Steps of torch's layer with gradients at most: it takes 0.3 ms for each.
MOST = 10_000
#: A cost per step is flat if the dearest length from FLAT on takes at most so many times what the cheapest does.
FLAT, LEVEL = 10_000, 1.15


def elementwise(d: int, batch: int, steps: int) -> Case:
    return Case(f"elementwise GRU {d}", lambda: ElementwiseGRU(d), (batch, steps, 3 * d))


def dense(d: int, batch: int, steps: int) -> Case:
    return Case(f"GRU {d}", lambda: torch.nn.GRUCell(8, d), (batch, steps, 8), same_weights(torch.nn.GRU))


@dataclass(frozen=True)
class Sweep:
    """One cell by what is varied: make(value, threads) -> the case and its threads."""

    varied: str
    cell: str
    values: tuple[int, ...]
    make: Callable[[int, int], tuple[Case, int]]


SWEEPS = (
    Sweep("steps", "elementwise GRU 4", (1_000, 10_000, 100_000, 1_000_000, 10_000_000), lambda v, n: (elementwise(4, 1, v), n)),
    Sweep("steps", "GRU 32", (1_000, 10_000, 100_000, 1_000_000), lambda v, n: (dense(32, 1, v), n)),
    Sweep("state numbers", "elementwise GRU", (4, 16, 64, 256), lambda v, n: (elementwise(v, 1, 16_384), n)),
    Sweep("state numbers", "GRU", (4, 16, 64, 256), lambda v, n: (dense(v, 1, 4_096), n)),
    Sweep("batch", "elementwise GRU 16", (1, 4, 16, 64), lambda v, n: (elementwise(16, v, 4_096), n)),
    Sweep("batch", "GRU 32", (1, 4, 16, 64), lambda v, n: (dense(32, v, 1_024), n)),
    Sweep("threads", "elementwise GRU 64", (1, 2, 4, 8, 16), lambda v, n: (elementwise(64, 1, 16_384), v)),
    Sweep("threads", "GRU 32", (1, 2, 4, 8, 16), lambda v, n: (dense(32, 1, 17_984), v)),
)


def look(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Nanoseconds per step and sample of every system: medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cell, x = case.make(), torch.randn(case.shape)
    rnn = seqparc.compile(cell)
    systems = [of_torch("seqparc", rnn, rnn, x)]
    if case.builtin is not None:
        layer = case.builtin(cell)
        systems.append(of_torch("torch's layer", layer, layer, x))
    each = 1e9 / (case.shape[0] * case.shape[1])
    row: dict[str, Any] = {}
    for s in systems:
        ours = s.name == "seqparc"
        for what, call in (("fwd", s.forward), ("fwd+bwd", s.both)):
            if call is None or (not ours and case.shape[1] > (MOST if what == "fwd+bwd" else 10 * MOST)):
                continue
            seconds(call, SETTLING if ours else 1)
            row.setdefault(s.name, {})[what] = each * statistics.median(seconds(call, repeats if ours else 3))
    row["floor"] = {what: each * least["ms"] / 1000 for what, least in floors(rnn, case).items()}
    return row


def seconds(call: Callable[[], Any], most: int) -> list[float]:
    """Of so many calls, or of at least three that take long."""
    times: list[float] = []
    while len(times) < most and (len(times) < 3 or sum(times) < ENOUGH):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def sweep(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All rows, told as tables. args: as parser() has them."""
    rows: list[dict[str, Any]] = []
    points = [
        (s, value) for s in SWEEPS if args.only in s.varied for value in s.values if s.varied != "threads" or value <= args.threads
    ]
    with bar(console) as progress:
        task = progress.add_task("", total=len(points))
        for s, value in points:
            progress.update(task, description=f"{s.cell}: {value:,} {s.varied}", refresh=True)
            case, threads = s.make(value, args.threads)
            row = look(case.shorter(64) if args.quick else case, threads, 2 if args.quick else args.repeats)
            rows.append({"varied": s.varied, "cell": s.cell, "value": value, **row})
            progress.advance(task)
    torch.set_num_threads(args.threads)
    for varied in dict.fromkeys(r["varied"] for r in rows):
        table = Table(title=f"nanoseconds per step and sample, by {varied}", title_justify="left")
        for head in ("cell", varied, "seqparc fwd", "fwd+bwd", "torch's layer fwd", "fwd+bwd", "floor fwd", "fwd+bwd"):
            table.add_column(head, justify="left" if head == "cell" else "right")
        for r in (r for r in rows if r["varied"] == varied):
            times = [r.get(s, {}).get(what) for s in ("seqparc", "torch's layer", "floor") for what in ("fwd", "fwd+bwd")]
            table.add_row(r["cell"], f"{r['value']:,}", *("" if t is None else f"{t:.3g}" for t in times))
        console.print(table)
    return rows


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A panel for everything that is varied, on two logarithmic scales; with gradients dashed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["varied"] for r in rows))
    figure = Figure(figsize=(12, 8), layout="constrained")
    colours = {"seqparc": "tab:blue", "torch's layer": "tab:orange", "floor": "0.6"}
    for axes, varied in zip(figure.subplots(2, 2).flat, names, strict=False):
        mine = [r for r in rows if r["varied"] == varied]
        for cell, marker in zip(dict.fromkeys(r["cell"] for r in mine), "os", strict=False):
            for system, colour in colours.items():
                for what, line in (("fwd", "-"), ("fwd+bwd", "--")):
                    at = [(r["value"], r[system][what]) for r in mine if r["cell"] == cell and what in r.get(system, {})]
                    label = f"{cell}, {system}" if what == "fwd" and at else None
                    axes.loglog(*zip(*at, strict=True), marker + line, color=colour, markersize=4, label=label) if at else None
        values = sorted({r["value"] for r in mine})
        axes.set_xticks(values, [f"{v:,}" for v in values])
        axes.set_xticks([], minor=True)
        axes.set(xlabel=varied, ylabel="ns per step and sample")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle("solid: forward; dashed: with gradients; circles and squares: two cells")
    figure.savefig(path, dpi=120)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Whether the cost per step is flat in the length."""
    found = []
    for cell in dict.fromkeys(r["cell"] for r in rows if r["varied"] == "steps"):
        for what in ("fwd", "fwd+bwd"):
            each = {r["value"]: r["seqparc"][what] for r in rows if r["varied"] == "steps" and r["cell"] == cell and r["value"] >= FLAT}
            if len(each) > 1:
                target = f"{cell}, {min(each):,} to {max(each):,} steps: {what} a step, dearest over cheapest"
                found.append(verdict(target, LEVEL, max(each.values()) / min(each.values())))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweeps; 0 when they ran, whatever they show."""
    args = parser(__doc__, repeats=9).parse_args(argv)
    console, about = Console(width=150), machine()
    rows = sweep(args, console)
    found = verdicts(rows)
    for v in found:
        console.print(": ".join(told(v)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps({"machine": about, "rows": rows, "targets": found}, indent=1))
    if rows:
        draw(args.out / "scaling.png", rows)
    console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
