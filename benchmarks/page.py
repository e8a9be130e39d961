"""docs/performance.md and the README's table, made from a run of benchmarks/run.py: what was run where, and where seqparc loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cases import Case
from targets import Verdict, told

Results = Sequence[tuple[Case, list[dict[str, Any]]]]

DIRECTIONS = (("fwd", "forward"), ("fwd+bwd", "with gradients"))

HEAD = """
Medians of calls from Python, preparation and allocation included; systems take turns, so that a slow moment of the machine hits all;
min–max says how noisy its turns were. What takes less than 20 ms is called in a row for 20, as in a loop, and a turn is the median of the
second half; what takes up to 200 ms is timed after one call that is not: on a virtual machine the first call in two threads after a pause
may wait 3 to 6 ms for the second core. What takes seconds is called once or twice and, where its row says so, over a part of the steps.
Errors are the largest of the outputs against the loop in float64.

MiB is what the process's resident set grew by at most during a call, above what was there before, results included and inputs not: VmHWM
over VmRSS, one heap for all threads, after what earlier calls freed was given back; to about a quarter of a MiB. "× floor" is the time
over the least that this processor needs for the arithmetic or the memory traffic of the recurrence, at the rates measured on it
(`codegen/floor.py`): no system can be below 1. Compile seconds are of both directions, and in no other column; seqparc's are of what its
cache did not have, and [below](#compile-times) with an empty one.

- torch.compile: one step of the cell in a loop over time, and many steps at once, which takes it long to compile.
- jax.lax.scan: jitted, products with x outside the scan, the best of several unrollings in each direction.
- numba and C loops: written by hand for the benchmark (`benchmarks/numbaloops.py`, `benchmarks/baselines.c`), forward only: one pass over
  time, everything fused and vectorised, tanh and the logistic function inlined (in numba from a rational function, in C seqparc's own).
- seqparc sequential: seqparc's kernels over the whole sequence in one piece.
"""

ZOO = """
What public cells gain over their eager loops: the table of [zoo.md](zoo.md) has every one, and says where that was measured.
"""


def _number(value: float) -> str:
    """Three digits, and no exponent up to a million."""
    return f"{float(f'{value:.3g}'):g}"


def figures(r: dict[str, Any], what: str) -> list[str]:
    """A system's time in one direction, its spread, how far it is from the floor, and its memory; empty where it was not timed."""
    t = r.get(what)
    if t is None:
        return [""] * 4
    memory = _number(t["bytes"] / 2**20) if "bytes" in t else ""
    return [_number(t["median"]), f"{_number(t['min'])}–{_number(t['max'])}", _number(t["median"] / r["floor"][what]["ms"]), memory]


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = " | ".join(f"{words}, ms | min–max | × floor | MiB" for _, words in DIRECTIONS)
    lines = [f"| system | {heads} | largest error | compile, s | chunks × passes |", "|---|" + "--:|" * 10 + "---|"]
    for r in rows:
        name = f"**{r['system']}**" if r["system"] == "seqparc" else r["system"]
        cells = [name + f" ({r['note']})" * bool(r["note"]), *figures(r, "fwd"), *figures(r, "fwd+bwd"), f"{r['largest_error']:.1e}"]
        runs = [f"{r[d]['chunks']} × {r[d]['passes']}" for d in ("forward", "backward") if d in r]
        lines.append("| " + " | ".join([*cells, f"{r['compile_s']:.2f}" if "compile_s" in r else "", ", ".join(runs)]) + " |")
    return lines


def _losses(results: Results) -> list[str]:
    """Cases in which something else is faster."""
    found = []
    for case, rows in results:
        ours = next(r for r in rows if r["system"] == "seqparc")
        for what, words in DIRECTIONS:
            for r in rows:
                if what in r and r["system"] != "seqparc" and r[what]["median"] < ours[what]["median"]:
                    ratio = ours[what]["median"] / r[what]["median"]
                    found.append(f"- {case.name}, {words}: {ratio:.2f} times the time of {r['system']}")
    return found


def _about(about: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in about.items())


def _shape(case: Case) -> str:
    return " × ".join(map(str, case.shape))


def page(
    about: dict[str, Any], results: Results, compiled: Sequence[dict[str, Any]], verdicts: Sequence[Verdict], pictures: Sequence[str]
) -> str:
    """The page. pictures: files beside it."""
    lines = ["# Performance", "", f"Made by `python benchmarks/run.py --page`: {_about(about)}.", HEAD]
    lines += ["## Where something else is faster", "", *(_losses(results) or ["Nowhere in this run."]), ""]
    lines += [line for name in pictures for line in (f"![{name.partition('.')[0].capitalize()}]({name})", "")]
    for case, rows in results:
        units = {what: least["unit"] for what, least in rows[0]["floor"].items()}
        lines += [
            f"## {case.name}, batch × time × inputs {_shape(case)}", "",
            f"Most of the floor is {units['fwd']} forward and {units['fwd+bwd']} with gradients.", "", *_rows(rows), "",
        ]  # fmt: skip
    if compiled:
        heads = [k for k in compiled[0] if k != "cell"]
        lines += [
            "## Compile times", "",
            "Seconds from the cell to both kernels, beyond the time of a second call, in processes of their own.", "",
            "| cell | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads),
            *("| " + " | ".join([r["cell"], *(f"{r[h]['compile_s']:.2f}" for h in heads)]) + " |" for r in compiled), "",
        ]  # fmt: skip
    lines += ["## What is aimed at", ZOO, "| | bound | measured | |", "|---|---|--:|---|"]
    lines += [f"| {' | '.join(told(v))} |" for v in verdicts]
    return "\n".join(lines) + "\n"


# -- the README ------------------------------------------------------------------------------------------------------

#: What the README's table lies between.
MARKS = "<!-- measured by benchmarks/run.py --readme -->", "<!-- end of what was measured -->"

#: Columns of the README's table -> the systems whose best is shown.
COLUMNS = {
    "eager loop": ("eager loop",), "torch.compile": ("torch.compile, step", "torch.compile, chunk"), "torch's layer": ("torch built-in",),
    "jax.lax.scan": ("jax.lax.scan",), "numba": ("numba",), "C loop": ("C loop",), "**seqparc**": ("seqparc",),
}  # fmt: skip


def readme(about: dict[str, Any], results: Results) -> str:
    """A sentence and a table of medians."""
    there = {r["system"] for _, rows in results for r in rows}
    columns = {head: names for head, names in COLUMNS.items() if there & set(names)}
    lines = [
        f"One run of `python benchmarks/run.py`: {_about(about)}.",
        "Medians in milliseconds, everything a call costs included; of torch.compile the faster of two ways to use it.", "",
        f"| cell, batch × time × inputs | {' | '.join(columns)} | largest error |", "|---|" + "--:|" * (len(columns) + 1),
    ]  # fmt: skip
    for case, rows in results:
        for what, words in DIRECTIONS:
            cells = [f"{case.name}, {_shape(case)}, {words}" if what == "fwd" else words]
            for names in columns.values():
                times = [r[what]["median"] for r in rows if r["system"] in names and what in r]
                cells.append(_number(min(times)) if times else "")
            error = next(r["largest_error"] for r in rows if r["system"] == "seqparc")
            lines.append(f"| {' | '.join(cells)} | {f'{error:.1e}' if what == 'fwd' else ''} |")
    return "\n".join(lines)


def marked(text: str, inside: str) -> str:
    """The text with what lies between the marks replaced. Raises ValueError where it has no such marks."""
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise ValueError(f"no {MARKS[0]} ... {MARKS[1]} to write between")
    return f"{before}{first}\n\n{inside}\n\n{last}{after}"
