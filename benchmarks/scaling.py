"""How time grows with length, width, batch and threads: `python benchmarks/scaling.py`.

Nanoseconds per step and sample of a call, forward and with gradients, beside torch's layer where there is one and the least that this
processor needs. Writes benchmarks/out/scaling.json and benchmarks/out/scaling.png.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from cases import Case, ElementwiseGRU, same_weights  # noqa: E402
from measure import Subject, floors, machine  # noqa: E402
from shell import bar, parser  # noqa: E402

import seqparc  # noqa: E402

#: Calls before those that are timed, in which chunks and warm-ups settle.
SETTLING = 8
#: Steps of torch's layer with gradients at most: it takes 0.3 ms for each.
MOST = 20_000
#: A cost per step is flat if the dearest length from FLAT on takes at most so much more than the cheapest.
FLAT, LEVEL = 10_000, 0.15


def elementwise(d: int, batch: int, steps: int) -> Case:
    return Case(f"elementwise GRU {d}", lambda: ElementwiseGRU(d), (batch, steps, 3 * d))


def dense(d: int, batch: int, steps: int) -> Case:
    return Case(f"GRU {d}", lambda: torch.nn.GRUCell(8, d), (batch, steps, 8), same_weights(torch.nn.GRU))


#: What is varied -> (the values, the cells that it is varied for by name, value -> (case, threads)).
Make = Callable[[int, int], tuple[Case, int]]
PANELS: dict[str, tuple[tuple[int, ...], dict[str, Make]]] = {
    "steps": ((1_000, 10_000, 100_000, 1_000_000), {
        "elementwise GRU 16": lambda v, n: (elementwise(16, 1, v), n), "GRU 32": lambda v, n: (dense(32, 1, v), n)}),
    "state numbers": ((4, 16, 64, 256), {
        "elementwise GRU": lambda v, n: (elementwise(v, 1, 16_384), n), "GRU": lambda v, n: (dense(v, 1, 4_096), n)}),
    "batch": ((1, 4, 16, 64), {
        "elementwise GRU 16": lambda v, n: (elementwise(16, v, 4_096), n), "GRU 32": lambda v, n: (dense(32, v, 1_024), n)}),
    "threads": ((1, 2, 4, 8, 16), {
        "elementwise GRU 64": lambda v, n: (elementwise(64, 1, 16_384), v), "GRU 32": lambda v, n: (dense(32, 1, 17_984), v)}),
}  # fmt: skip


def look(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Nanoseconds per step and sample of every system: medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cell = case.make()
    rnn = seqparc.compile(cell)
    systems = [Subject("seqparc", case, rnn, rnn)]
    if case.builtin is not None:
        layer = case.builtin(cell)
        systems.append(Subject("torch's layer", case, layer, layer))
    each = 1e9 / (case.shape[0] * case.shape[1])
    row: dict[str, Any] = {}
    for s in systems:
        ours = s.name == "seqparc"
        for what, call in (("fwd", s.forward), ("fwd+bwd", s.both)):
            if not ours and case.shape[1] > (MOST if what == "fwd+bwd" else 10 * MOST):
                continue
            for _ in range(SETTLING if ours else 1):
                call()
            times = []
            for _ in range(repeats if ours else 3):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            row.setdefault(s.name, {})[what] = each * statistics.median(times)
    row["floor"] = {what: each * least["ms"] / 1000 for what, least in floors(systems[0], case).items()}
    return row


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
        axes.set(xlabel=varied, ylabel="ns per step and sample")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle("solid: forward; dashed: with gradients; circles and squares: two cells")
    figure.savefig(path, dpi=120)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the cost per step is flat in the length."""
    found = []
    for cell in dict.fromkeys(r["cell"] for r in rows if r["varied"] == "steps"):
        for what in ("fwd", "fwd+bwd"):
            each = [r["seqparc"][what] for r in rows if r["varied"] == "steps" and r["cell"] == cell and r["value"] >= FLAT]
            if len(each) > 1:
                spread = max(each) / min(each) - 1
                kept = "flat" if spread <= LEVEL else "not flat"
                found.append(f"{cell}, {what}: from {FLAT} steps on a step costs {100 * spread:.0f} % more at most: {kept}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweeps; 0 when they ran, whatever they show."""
    shell = parser(__doc__, repeats=9)
    shell.add_argument("--picture", type=Path, help="copy the picture here too")
    args = shell.parse_args(argv)
    console, about = Console(width=150), machine()
    rows: list[dict[str, Any]] = []
    points = [
        (varied, cell, value, make)
        for varied, (values, cells) in PANELS.items() if args.only in varied
        for cell, make in cells.items() for value in values if varied != "threads" or value <= args.threads
    ]  # fmt: skip
    with bar(console) as progress:
        task = progress.add_task("", total=len(points))
        for varied, cell, value, make in points:
            progress.update(task, description=f"{cell}: {value} {varied}", refresh=True)
            case, threads = make(value, args.threads)
            row = look(case.shorter(64) if args.quick else case, threads, 2 if args.quick else args.repeats)
            rows.append({"varied": varied, "cell": cell, "value": value, **row})
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
    told = verdicts(rows)
    for line in told:
        console.print(line)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps({"machine": about, "rows": rows, "verdicts": told}, indent=1))
    if rows:
        draw(args.out / "scaling.png", rows)
        if args.picture:
            shutil.copyfile(args.out / "scaling.png", args.picture)
    console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
