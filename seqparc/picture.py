"""The picture of an explanation: four panels in one figure. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqparc.errors import SeqparcError
from seqparc.timeline import AUTOGRAD, REST, Timeline

#: Colours that people tell apart however they see colours (Okabe & Ito 2008), and one for what is left.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
REMAINDER = "#D0D0D0"
#: A part of a call has the same colour wherever it stands.
PARTS = {
    "on parameters alone": "#F0E442", "prelude": "#E69F00", "kernel": "#0072B2", "further passes": "#56B4E9", "updates": "#D55E00",
    "gap": "#000000", "sequential end": "#9A6324", "readout": "#009E73", "weights' gradients, memory": "#CC79A7", REST: REMAINDER,
}  # fmt: skip
SUFFIXES = (".png", ".svg")
#: Rows and columns of a pattern that are drawn one by one; larger ones are drawn in blocks. Rows of chunks that are drawn.
MOST, ROWS = 400, 96


class Row(NamedTuple):
    """A stretch of time that one thread runs: its number, the steps that lead up to it, its first step, its length, the thread."""

    number: int
    lead: int
    first: int
    length: int
    thread: int


def draw(
    path: Path, name: str, pattern: np.ndarray, leaves: Sequence[int], rows: Mapping[str, Sequence[Row]],
    gaps: Mapping[str, Sequence[float]], tolerance: float | None, timeline: Timeline,
) -> None:  # fmt: skip
    """Write the figure. Raises SeqparcError without matplotlib, and for a name that ends in neither .png nor .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise SeqparcError(f"the picture {path.name!r} should end in {' or '.join(SUFFIXES)}, which says how it is written")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise SeqparcError(f"plot needs matplotlib ({error}): pip install 'seqparc[demo]', or pip install matplotlib") from error
    figure = Figure(figsize=(12, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (a, b), (c, d) = figure.subplots(2, 2)
    _pattern(a, pattern, leaves)
    _chunks(b, rows)
    _gaps(c, gaps, tolerance)
    _times(d, timeline)
    figure.suptitle(_short(name.replace("$", r"\$"), 90), fontsize=13)
    figure.savefig(path, dpi=130, format=path.suffix[1:].lower(), metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _empty(axes: Any, title: str, why: str) -> None:
    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", wrap=True, transform=axes.transAxes)


def _pattern(axes: Any, pattern: np.ndarray, leaves: Sequence[int]) -> None:
    n = len(pattern)
    if not n:
        return _empty(axes, "State Jacobian", "the cell is not compiled")
    block = -(-n // MOST)
    shown: np.ndarray = pattern
    if block > 1:
        wide = np.zeros((-(-n // block) * block,) * 2, bool)
        wide[:n, :n] = pattern
        shown = wide.reshape(len(wide) // block, block, len(wide) // block, block).max((1, 3))
    from matplotlib.colors import ListedColormap

    end = len(shown) * block - 0.5
    colours = ListedColormap(["#FFFFFF", COLOURS[0]])
    axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest", extent=(-0.5, end, end, -0.5))
    for edge in np.cumsum(leaves)[:-1] - 0.5:
        axes.axhline(edge, color=COLOURS[5], linewidth=1)
        axes.axvline(edge, color=COLOURS[5], linewidth=1)
    filled = int(pattern.sum())
    note = f"; each dot {block} × {block}" if block > 1 else ""
    parts = f"; lines between the {len(leaves)} leaves" if len(leaves) > 1 else ""
    axes.set_title(f"State Jacobian: {filled:,} of {n * n:,} entries may be non-zero", pad=12)
    axes.set(xlabel=f"state number before the step{parts}{note}", ylabel="state number after the step")
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _chunks(axes: Any, rows: Mapping[str, Sequence[Row]]) -> None:
    title = "Which stretches of time run where"
    direction = next(iter(rows), None)
    if direction is None:
        return _empty(axes, title, "nothing was run yet for these shapes")
    every = rows[direction]
    shown = every[:ROWS]
    threads = sorted({r.thread for r in shown})
    gap = 0.15 if len(shown) <= 40 else 0.0
    for t in threads:
        mine, colour = [r for r in shown if r.thread == t], COLOURS[max(t, 0) % len(COLOURS)]
        at = [r.number for r in mine]
        led = any(r.lead for r in mine)
        axes.barh(at, [r.length for r in mine], 1 - gap, left=[r.first for r in mine], color=colour, label=_whose(t))
        if led:
            axes.barh(
                at, [r.lead for r in mine], 1 - gap, left=[r.first - r.lead for r in mine], color=colour, alpha=0.35, hatch="////",
                edgecolor="white", linewidth=0, label="its warm-ups" if t < 0 else f"warm-ups, thread {t}",
            )  # fmt: skip
    kind = "chunk" if len({r.first for r in every}) > 1 else "sample"
    some = f" (the first {len(shown)} of {len(every)})" if len(shown) < len(every) else ""
    axes.set_title(f"{title}: {direction}, {len(every)} {kind}{'s' * (len(every) != 1)}")
    axes.set(xlabel="time [steps]", ylabel=f"{kind} number{some}")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, max(r.first + r.length for r in shown))
    if len(shown) <= 12:
        axes.set_yticks(range(len(shown)))
    else:
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=9, frameon=False)


def _whose(thread: int) -> str:
    return f"thread {thread}" if thread >= 0 else "all at once"


def _gaps(axes: Any, gaps: Mapping[str, Sequence[float]], tolerance: float | None) -> None:
    title = "Gap between chunks after each pass"
    if not gaps:
        return _empty(axes, title, "the last call was one chunk, or none: there is no gap to close")
    least = 1e-9
    if tolerance:
        axes.axhline(tolerance, color="#666666", linestyle="--", linewidth=1, label="tolerance")
        least = tolerance / 100
    for k, (direction, values) in enumerate(gaps.items()):
        shown = np.maximum(np.nan_to_num(values, nan=np.inf, posinf=1e30), least)
        label = direction + (f" (below {least:.0e} drawn there)" if min(values) < least else "")
        axes.semilogy(range(1, len(shown) + 1), shown, ("o-", "s--")[k % 2], color=COLOURS[(0, 5)[k % 2]], label=label, markersize=7)
    axes.set(title=title, xlabel="pass", ylabel="largest move of a start state [relative]")
    axes.set_xlim(0.5, max(2, *(len(v) for v in gaps.values())) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _times(axes: Any, timeline: Timeline) -> None:
    title = "Where the time of a call goes"
    if not timeline.parts:
        return _empty(axes, title, f"not measured: {timeline.reason or 'give explain an input, explain(x)'}")
    names: dict[str, None] = {}
    longest = max(total for total, *_ in timeline.total.values())
    for y, (direction, parts) in enumerate(timeline.parts.items()):
        left = 0.0
        for name, seconds in parts.items():
            name = name.removesuffix(AUTOGRAD)
            label = None if name in names else name
            names[name] = None
            axes.barh(y, 1e3 * seconds, 0.5, left=1e3 * left, color=PARTS[name], edgecolor="white", linewidth=0.5, label=label)
            left += seconds
        middle, least, most = timeline.total[direction]
        text = f"{1e3 * middle:.3g} ms ({1e3 * least:.3g} to {1e3 * most:.3g})"
        axes.text(0, y - 0.3, text, ha="left", va="bottom", fontsize=9)
    axes.set_yticks(range(len(timeline.parts)), list(timeline.parts))
    axes.set_ylim(len(timeline.parts) - 0.4, -0.7)
    axes.set_xlim(0, 1e3 * longest * 1.02)
    whole = "" if timeline.steps == timeline.whole else f", of {timeline.whole:,}"
    axes.set(title=f"{title}: {timeline.batch} × {timeline.steps:,} steps{whole}", xlabel=f"time [ms], median of {timeline.runs} runs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=9, frameon=False)
