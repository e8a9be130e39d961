"""Speed and compile time against what one would use instead: `python benchmarks/run.py`.

Writes benchmarks/out/results.json and benchmarks/out/speed.png, and prints the same as tables; with --scaling also how time grows with
length, width, batch and threads (scaling.py). Every time is what a user waits for: a call from Python, preparation and allocation
included. Systems take turns; the figure is the median. jax, numba and pararnn-torch take part where they are installed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import peers  # noqa: E402
import scaling  # noqa: E402
from cases import CASES, Case  # noqa: E402
from measure import compile_times, machine, measure  # noqa: E402
from page import figures, marked, page, readme  # noqa: E402
from shell import bar, parser  # noqa: E402
from subjects import SLOW  # noqa: E402
from targets import Verdict, told, verdict, zoo  # noqa: E402

#: Cells whose compile time is taken, and the most it may be (seconds).
COMPILED = ("elementwise GRU", "GRU", "LSTM", "RNN tanh", "RNN relu", "minGRU", "sLSTM", "block GRU", "layer norm GRU", "IndRNN", "LEM",
            "peephole LSTM", "two levels", "affine", "sparse")  # fmt: skip
COLD, WARM, FLAT = 2.0, 0.15, 0.2
#: What a recurrence backward may take, in what it takes forward.
ADJOINT = 2.5

COLOURS = {
    "eager loop": "0.8", "torch.compile, step": "0.65", "torch.compile, chunk": "0.5", "torch built-in": "tab:orange",
    "jax.lax.scan": "tab:purple", "numba": "tab:olive", "C loop": "tab:green", "seqparc sequential": "lightskyblue", "seqparc": "tab:blue",
}  # fmt: skip


def speed_table(case: Case, rows: Sequence[dict[str, Any]]) -> Table:
    units = {what: least["unit"] for what, least in rows[0]["floor"].items()}
    least = f"the floor is {units['fwd']} forward, {units['fwd+bwd']} with gradients"
    table = Table(title=f"{case.name}: batch, time, inputs = {case.shape}; {least}", title_justify="left")
    heads = [head for what in ("fwd", "fwd+bwd") for head in (f"{what} ms", "min–max", "× floor", "MiB")]
    for head in ("system", *heads, "error", "chunks", "passes", "compile s"):
        table.add_column(head, justify="left" if head == "system" else "right", no_wrap=True)
    table.caption = "\n".join(f"{r['system']}: {r['note']}" for r in rows if r["note"])
    for r in rows:
        cells = [r["system"], *figures(r, "fwd"), *figures(r, "fwd+bwd")]
        f, b = r.get("forward"), r.get("backward")
        both = [f"{f[k]}" + (f" / {b[k]}" if b else "") for k in ("chunks", "passes")] if f else ["", ""]
        table.add_row(*cells, f"{r['largest_error']:.1e}", *both, f"{r['compile_s']:.2f}" if "compile_s" in r else "")
    return table


def judge(case: Case, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Each target of a case with what was measured."""
    by_name = {r["system"]: r for r in rows}
    ours = by_name["seqparc"]
    found = [
        verdict(f"{case.name}: {what} over its floor", 2, ours[what]["median"] / ours["floor"][what]["ms"]) for what in ("fwd", "fwd+bwd")
    ]
    if "backward_over_forward" in ours:
        found.append(verdict(f"{case.name}: recurrence backward over forward", ADJOINT, ours["backward_over_forward"]))
    for t in case.targets:
        other_what = t.other_what or t.what
        other = by_name.get(t.other, {}).get(other_what)
        ratio = None if other is None else ours[t.what]["median"] / other["median"]
        whose = f"{t.other} {t.other_what}".strip()
        if t.speedup:
            found.append(verdict(f"{case.name}: {t.what} faster than {whose}", t.bound, None if ratio is None else 1 / ratio, least=True))
        else:
            found.append(verdict(f"{case.name}: {t.what} over {whose}", t.bound, ratio))
    return found


def judge_compile(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[Verdict]:
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
        verdicts.append(verdict(f"{what}, worst cell ({who})", bound, measured))
    return verdicts


def draw(path: Path, results: Sequence[tuple[Case, list[dict[str, Any]]]]) -> None:
    """Milliseconds per case and system, forward and forward+backward, on a log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 1.4 * len(results)), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("fwd", "fwd+bwd"), strict=True):
        for i, (_, rows) in enumerate(results):
            timed = [r for r in rows if what in r]
            for j, r in enumerate(timed):
                y = i + 0.8 * ((j + 0.5) / len(timed) - 0.5)
                name = r["system"]
                label = None if name in axes.get_legend_handles_labels()[1] else name
                axes.barh(y, r[what]["median"], 0.8 / len(timed), color=COLOURS.get(name, "tab:brown"), label=label)
        axes.set(xscale="log", xlabel="milliseconds (median)", title={"fwd": "forward", "fwd+bwd": "forward and backward"}[what])
        axes.grid(axis="x", alpha=0.3)
    left = figure.axes[0]
    left.set_yticks(range(len(results)), [f"{c.name}\n{list(c.shape)}" for c, _ in results])
    left.invert_yaxis()
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(handles, key=lambda name: list(COLOURS).index(name) if name in COLOURS else len(COLOURS))
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 0 when they ran, whatever they show."""
    shell = parser(__doc__, repeats=15)
    shell.add_argument("--page", type=Path, help="write the tables as Markdown here too, and the pictures beside it")
    shell.add_argument("--readme", type=Path, help="put the shorter table into this file, between its two marks")
    shell.add_argument("--scaling", action="store_true", help="also how time grows with length, width, batch and threads")
    args = shell.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=175)
    about = machine()
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    chosen = [c.shorter(200) if args.quick else c for c in (*CASES, *peers.cases()[:1]) if args.only in c.name]
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
            rows = measure(case, 2 if args.quick else args.repeats, tick, SLOW if args.quick or case not in CASES else ())
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
    if args.only in ("", "zoo"):
        verdicts += zoo(ROOT.parent / "docs" / "zoo.md")
    swept = scaling.sweep(args, console) if args.scaling else []
    verdicts += scaling.verdicts(swept)
    table = Table(title="targets", title_justify="left")
    for head in ("target", "bound", "measured", ""):
        table.add_column(head, justify="right" if head == "measured" else "left")
    for v in verdicts:
        table.add_row(*told(v))
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [r for _, rows in results for r in rows]
    found = {"machine": about, "rows": rows, "compile": compile_rows, "scaling": swept, "targets": verdicts}
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    pictures = []
    for name, wanted, painter in (("speed.png", results, draw), ("scaling.png", swept, scaling.draw)):
        if wanted:
            painter(args.out / name, wanted)
            pictures.append(name)
    if args.page:
        args.page.write_text(page(about, results, compile_rows, verdicts, pictures))
        for name in pictures:
            shutil.copyfile(args.out / name, args.page.parent / name)
    if args.readme:
        args.readme.write_text(marked(args.readme.read_text(), readme(about, [r for r in results if r[0].targets])))
    console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
