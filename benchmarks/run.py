"""Speed and compile time against what one would use instead: `python benchmarks/run.py`.

Writes benchmarks/out/results.json and benchmarks/out/speed.png, and prints the same as tables. Every time is what a user waits for:
a call from Python, preparation and allocation included. Systems take turns; the figure is the median.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from cases import CASES, Case  # noqa: E402
from measure import compile_times, machine, measure  # noqa: E402
from page import page  # noqa: E402
from shell import bar, parser  # noqa: E402

#: Cells whose compile time is taken, and the most it may be (seconds).
COMPILED = ("elementwise GRU", "GRU", "LSTM", "RNN tanh", "RNN relu", "minGRU", "sLSTM", "block GRU", "layer norm GRU", "IndRNN", "LEM",
            "peephole LSTM", "two levels", "affine", "sparse")  # fmt: skip
COLD, WARM, FLAT = 4.0, 0.3, 0.2


def speed_table(case: Case, rows: Sequence[dict[str, Any]]) -> Table:
    units = {what: least["unit"] for what, least in rows[0]["floor"].items()}
    least = f"the floor is {units['fwd']} forward, {units['fwd+bwd']} with gradients"
    table = Table(title=f"{case.name}: batch, time, inputs = {case.shape}; {least}", title_justify="left")
    heads = [head for what in ("fwd", "fwd+bwd") for head in (f"{what} ms", "min–max", "× floor")]
    for head in ("system", *heads, "largest error", "chunks", "passes", "compile s"):
        table.add_column(head, justify="left" if head == "system" else "right")
    for r in rows:
        cells = [r["system"]]
        for what in ("fwd", "fwd+bwd"):
            t = r.get(what)
            least = r["floor"][what]["ms"]
            cells += [f"{t['median']:.3g}", f"{t['min']:.3g}–{t['max']:.3g}", f"{t['median'] / least:.1f}"] if t else ["", "", ""]
        f, b = r.get("forward"), r.get("backward")
        both = [f"{f[k]}" + (f" / {b[k]}" if b else "") for k in ("chunks", "passes")] if f else ["", ""]
        table.add_row(*cells, f"{r['largest_error']:.1e}", *both, f"{r['compile_s']:.2f}" if "compile_s" in r else "")
    return table


def judge(case: Case, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target of a case with what was measured."""
    by_name = {r["system"]: r for r in rows}
    ours = by_name["seqparc"]
    found = []
    for what in ("fwd", "fwd+bwd"):
        value = ours[what]["median"] / ours["floor"][what]["ms"]
        found.append({"target": f"{case.name}: {what} over its floor", "bound": "at most 2", "measured": value, "met": value <= 2})
    for t in case.targets:
        name, _, other_what = t.other.partition(" fwd")
        other = by_name[name]["fwd" if other_what or t.other.endswith(" fwd") else t.what]["median"]
        mine = ours[t.what]["median"]
        value = other / mine if t.speedup else mine / other
        sign = "at least" if t.speedup else "at most"
        met = value >= t.bound if t.speedup else value <= t.bound
        what = f"{case.name}: {t.what} {'faster than' if t.speedup else 'over'} {t.other}"
        found.append({"target": what, "bound": f"{sign} {t.bound:g}", "measured": value, "met": bool(met)})
    return found


def judge_compile(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Cold, warm and flat, the worst cell of each."""
    if not rows:
        return []
    short, long = f"T={lengths[0]}", f"T={lengths[-1]}"

    def worst(value: Any) -> tuple[float, str]:
        return max((value(r), r["cell"]) for r in rows)

    found = (
        (f"cold compile seconds at {short}", COLD, lambda r: r[f"cold {short}"]["compile_s"]),
        (f"cold compile seconds at {long}", COLD, lambda r: r[f"cold {long}"]["compile_s"]),
        ("warm compile seconds", WARM, lambda r: r[f"warm {short}"]["compile_s"]),
        # With the kernels of the short sequence in the cache, a long one that needed others would take a second more.
        (f"seconds more at {long} than at {short} from the same cache", FLAT,
         lambda r: r[f"warm {long}"]["compile_s"] - r[f"warm {short}"]["compile_s"]),
    )  # fmt: skip
    verdicts = []
    for what, bound, value in found:
        measured, who = worst(value)
        target = f"{what}, worst cell ({who})"
        verdicts.append({"target": target, "bound": f"at most {bound:g}", "measured": measured, "met": measured <= bound})
    return verdicts


def draw(path: Path, results: Sequence[tuple[Case, list[dict[str, Any]]]]) -> None:
    """Milliseconds per case and system, forward and forward+backward, on a log scale."""
    from matplotlib.figure import Figure

    systems = list(dict.fromkeys(r["system"] for _, rows in results for r in rows))
    colours = dict(zip(systems, ("0.75", "tab:orange", "tab:green", "lightskyblue", "tab:blue"), strict=False))
    figure = Figure(figsize=(12, 1.5 + 0.95 * len(results)), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("fwd", "fwd+bwd"), strict=True):
        for i, (_, rows) in enumerate(results):
            timed = [r for r in rows if what in r]
            for j, r in enumerate(timed):
                y = i + 0.8 * ((j + 0.5) / len(timed) - 0.5)
                first = r["system"] not in axes.get_legend_handles_labels()[1]
                axes.barh(y, r[what]["median"], 0.8 / len(timed), color=colours[r["system"]], label=r["system"] if first else None)
        axes.set(xscale="log", xlabel="milliseconds (median)", title={"fwd": "forward", "fwd+bwd": "forward and backward"}[what])
        axes.grid(axis="x", alpha=0.3)
    left = figure.axes[0]
    left.set_yticks(range(len(results)), [f"{c.name}\n{list(c.shape)}" for c, _ in results])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems))
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 0 when they ran, whatever they show."""
    shell = parser(__doc__, repeats=15)
    shell.add_argument("--page", type=Path, help="write the tables as Markdown here too")
    args = shell.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=150)
    about = machine()
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    chosen = [c.shorter(200) if args.quick else c for c in CASES if args.only in c.name]
    lengths = (100, 1000) if args.quick else (100, 100_000)
    compiled = [] if args.only not in ("", "compile") else list(COMPILED[:2] if args.quick else COMPILED)
    results: list[tuple[Case, list[dict[str, Any]]]] = []
    compile_rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(chosen) + len(compiled))

        def tick(text: str) -> None:
            progress.update(task, description=text, refresh=True)

        for case in chosen:
            rows = measure(case, 2 if args.quick else args.repeats, tick)
            results.append((case, rows))
            verdicts += judge(case, rows)
            progress.console.print(speed_table(case, rows))
            progress.advance(task)
        for name in compiled:
            tick(f"compile times: {name}")
            compile_rows.append(compile_times(name, lengths))
            progress.advance(task)
    if compile_rows:
        verdicts += judge_compile(compile_rows, lengths)
        table = Table(title="seconds from the cell to both kernels, beyond the time of a second call", title_justify="left")
        table.add_column("cell")
        heads = [k for k in compile_rows[0] if k != "cell"]
        for head in (*heads, "import seqparc"):
            table.add_column(head, justify="right")
        for r in compile_rows:
            table.add_row(r["cell"], *(f"{r[h]['compile_s']:.2f}" for h in heads), f"{r[heads[0]]['import_s']:.2f}")
        console.print(table)
    table = Table(title="targets", title_justify="left")
    for head in ("target", "bound", "measured", ""):
        table.add_column(head, justify="right" if head == "measured" else "left")
    for v in verdicts:
        table.add_row(v["target"], v["bound"], f"{v['measured']:.3g}", "met" if v["met"] else "missed")
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": about, "rows": [r for _, rows in results for r in rows], "compile": compile_rows, "targets": verdicts}
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    if results:
        draw(args.out / "speed.png", results)
    if args.page:
        args.page.write_text(page(about, results, compile_rows, verdicts))
    console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
