"""What is aimed at, and what was measured of it."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

#: target, bound, measured, met; the last two are None where what is compared with is not installed.
Verdict = dict[str, Any]


def verdict(target: str, bound: float, measured: float | None, least: bool = False) -> Verdict:
    """least: more is better."""
    met = None if measured is None else bool(measured >= bound if least else measured <= bound)
    return {"target": target, "bound": f"{'at least' if least else 'at most'} {bound:g}", "measured": measured, "met": met}


def told(v: Verdict) -> tuple[str, str, str, str]:
    """A row of a table."""
    words = {True: "met", False: "missed", None: "not measured"}
    return v["target"], v["bound"], "" if v["measured"] is None else f"{v['measured']:.3g}", words[v["met"]]


#: The median speed-up over the eager loop that the public cells are to have, of those with a fused kernel.
ZOO = 100


def zoo(page: Path) -> list[Verdict]:
    """Of the table in docs/zoo.md, which `python -m tests.zoo` makes: speed-ups over the eager loop, forward and with gradients."""
    text = page.read_text()
    steps = re.search(r"over ([\d,]+) steps", text)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| c \|.*× \(", line)]
    found = []
    for column, what in ((6, "fwd"), (7, "fwd+bwd")):
        each = [float(r[column].partition("×")[0].replace(",", "")) for r in rows if len(r) > column and "×" in r[column]]
        if each and steps:
            spread = f"{min(each):.3g} to {max(each):,.0f}"
            what = f"docs/zoo.md, {len(each)} cells, {steps[1]} steps: {what} faster than eager loop, median ({spread})"
            found.append(verdict(what, ZOO, statistics.median(each), least=True))
    return found
