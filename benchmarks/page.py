"""docs/performance.md, made from a run of benchmarks/run.py: what was run where, and where seqparc loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cases import Case

Results = Sequence[tuple[Case, list[dict[str, Any]]]]

HEAD = """
Medians of calls from Python, preparation and allocation included; systems take turns, so that a slow moment of the machine hits all.
The C loops are written by hand for the benchmark (`benchmarks/baselines.c`): fused, vectorised, one pass over time. "× floor" is the
time over the least that this processor needs for the arithmetic or the memory traffic of the recurrence, at the rates measured on it
(`codegen/floor.py`): no system can be below 1. Errors are the largest against the loop in float64; min–max says how noisy the machine was.
"""


def _number(value: float) -> str:
    return f"{value:.3g}"


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| system | forward, ms | min–max | × floor | with gradients, ms | min–max | × floor | largest error | chunks × passes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        cells = [f"**{r['system']}**" if r["system"] == "seqparc" else r["system"]]
        for what in ("fwd", "fwd+bwd"):
            t = r.get(what)
            cells += (
                [_number(t["median"]), f"{t['min']:.3g}–{t['max']:.3g}", _number(t["median"] / r["floor"][what]["ms"])] if t else [""] * 3
            )
        runs = [f"{r[d]['chunks']} × {r[d]['passes']}" for d in ("forward", "backward") if d in r]
        lines.append("| " + " | ".join([*cells, f"{r['largest_error']:.1e}", ", ".join(runs)]) + " |")
    return lines


def _losses(results: Results) -> list[str]:
    """Cases in which something else is faster."""
    found = []
    for case, rows in results:
        ours = next(r for r in rows if r["system"] == "seqparc")
        for what, words in (("fwd", "forward"), ("fwd+bwd", "with gradients")):
            for r in rows:
                if what in r and r["system"] != "seqparc" and r[what]["median"] < ours[what]["median"]:
                    ratio = ours[what]["median"] / r[what]["median"]
                    found.append(f"- {case.name}, {words}: {ratio:.2f} times the time of {r['system']}")
    return found


def page(about: dict[str, Any], results: Results, compiled: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> str:
    """The page."""
    lines = ["# Performance", "", f"Made by `python benchmarks/run.py --page`: {', '.join(f'{k} {v}' for k, v in about.items())}.", HEAD]
    losses = _losses(results)
    lines += ["## Where something else is faster", "", *(losses or ["Nowhere in this run."]), ""]
    for case, rows in results:
        units = {what: least["unit"] for what, least in rows[0]["floor"].items()}
        shape = " × ".join(map(str, case.shape))
        lines += [
            f"## {case.name}, batch × time × inputs {shape}", "",
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
    lines += ["## What is aimed at", "", "| | bound | measured | |", "|---|---|--:|---|"]
    lines += [f"| {v['target']} | {v['bound']} | {_number(v['measured'])} | {'met' if v['met'] else 'missed'} |" for v in verdicts]
    return "\n".join(lines) + "\n"
