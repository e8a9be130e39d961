"""The figures of docs/algorithm.md, from runs of seqparc: `python docs/figures.py` writes them into docs/figures/. Needs matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

import seqparc

HERE = Path(__file__).parent / "figures"
STEPS, CHUNKS = 240, 6
#: Of the picture of K: steps, and lengths of a chunk.
LONG, LENGTHS = 4096, (1, 4, 16, 64, 256, 1024)
UPDATES = {"none": ("no Jacobian (Picard)", "o-"), "diagonal": ("diagonal Jacobian", "s--"), "exact": ("exact Jacobian (Newton)", "^:")}


def slow(x: Tensor, h: Tensor) -> Tensor:
    """A cell of one number that forgets slowly: a chunk of 40 steps leaves about a sixth of what it started from."""
    return 0.97 * h + 0.3 * torch.tanh(x - 0.1 * h)


def wave() -> Tensor:
    """[1, STEPS, 1]"""
    t = torch.arange(STEPS)
    return (torch.sin(t / 9) + 0.5 * torch.sin(t / 31) + 0.6).reshape(1, -1, 1)


def compiled(**options: Any) -> Any:
    return seqparc.compile(slow, state=torch.zeros(1), options={"strategy": "shooting", "chunks": CHUNKS, "update": "none", **options})


def starts(passes: int, x: Tensor) -> Tensor:
    """The chunks' start states [CHUNKS, 1] after so many passes from zeros."""
    if not passes:
        return torch.zeros(CHUNKS, 1)
    try:
        compiled(warmup=0, max_passes=passes, on_divergence="raise")(x)
    except seqparc.ConvergenceError as error:
        return error.best.reshape(CHUNKS, 1).clone()  # type: ignore[no-any-return]
    raise AssertionError(f"{passes} passes are enough")


def picture_of_passes() -> Figure:
    """What each pass computes, and the jumps at its boundaries."""
    x = wave()
    sequential = seqparc.compile(slow, state=torch.zeros(1), options={"strategy": "sequential"})
    truth = sequential(x)[0].flatten()
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, sharey=True)
    width = STEPS // CHUNKS
    for n, ax in enumerate(axes):
        first = starts(n, x)
        states = sequential(x.reshape(CHUNKS, width, 1), first)[0][..., 0]
        ax.plot(truth, color="0.8", linewidth=4, label="plain loop")
        for c in range(CHUNKS):
            t = torch.arange(c * width, (c + 1) * width)
            ax.plot(torch.cat((t[:1] - 1, t)), torch.cat((first[c], states[c])), color="tab:blue", label="chunks" if c == 0 else None)
            if c:
                ax.plot([t[0] - 1] * 2, [states[c - 1, -1], first[c, 0]], color="tab:red", label="jumps" if c == 1 else None)
        ends = torch.cat((first[:1, 0], states[:-1, -1]))
        ax.set(ylabel="state", title=f"pass {n + 1}: largest jump {float((ends - first[:, 0]).abs().max()):.2g}")
        ax.margins(x=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[-1].set_xlabel("step")
    return figure


def picture_of_gaps() -> Figure:
    """The gap after each pass, by the length of the warm-up."""
    x = wave()
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    for warmup, style in zip((0, 20, 40, 80, 160), ("o-", "s-", "^-", "d-", "v-"), strict=True):
        rnn = compiled(warmup=warmup)
        rnn(x)
        gaps = [g for g in rnn.stats.gaps if g > 0]
        ax.semilogy(range(1, len(gaps) + 1), gaps, style, label=f"{warmup} steps")
    ax.set(xlabel="pass", ylabel="gap", title=f"{CHUNKS} chunks of {STEPS // CHUNKS} steps: the gap after each pass, by the warm-up")
    ax.legend(title="warm-up", ncols=2)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def picture_of_the_knob() -> Figure:
    """Passes, and steps that must be taken one after the other, from DEER to the sequential run."""
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 16)
    with torch.no_grad():
        cell.bias_ih[16:32] += 2  # remembers for long
    x = torch.randn(1, LONG, 3)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for update, (label, style) in UPDATES.items():
        passes: dict[int, int] = {LONG: 1}
        for length in LENGTHS:
            options = {"strategy": "shooting", "chunks": LONG // length, "warmup": 0, "update": update, "rtol": 1e-5, "max_passes": 40}
            rnn = seqparc.compile(cell, options=options)
            rnn(x)
            if rnn.stats.converged:
                passes[length] = rnn.stats.passes
        lengths = sorted(passes)
        left.loglog(lengths, [passes[k] for k in lengths], style, base=2, label=label)
        right.loglog(lengths, [passes[k] * k for k in lengths], style, base=2, label=label)
    for ax, title in ((left, "passes"), (right, "steps one after the other: passes × K")):
        ax.set(title=title, xlabel="K, the steps of a chunk")
    right.annotate("DEER", (1, 0.02), (12, 0), xycoords=("data", "axes fraction"), textcoords="offset points")
    right.annotate("sequential", (LONG, 0.02), xycoords=("data", "axes fraction"), ha="right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def picture_of_the_split() -> Figure:
    """What is run once over the sequence, and what at every step: of a GRU, by its plan."""
    rnn = seqparc.compile(nn.GRUCell(32, 64))
    rnn(torch.randn(1, 2000, 32))
    told = dict(rnn.explain().sections)["split"]
    prelude, core, readout = (next(line for line in told if line.startswith(name)) for name in ("prelude", "core, ", "readout"))
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    ax.set(xlim=(0, 12), ylim=(0, 4))
    _box(ax, 0.2, "prelude", "torch, once over all steps", prelude.split(": ", 1)[1], "tab:green")
    _box(ax, 4.3, "core", "generated kernel, every step", core.split(": ", 1)[1], "tab:blue")
    _box(ax, 8.4, "readout", "torch, once over all states", readout.split(": ", 1)[1], "tab:green")
    for left in (3.65, 7.75):
        ax.annotate("", (left + 0.6, 1.6), (left, 1.6), arrowprops={"arrowstyle": "->", "linewidth": 1.5})
    ax.annotate(
        "", (6.9, 3.15), (4.9, 3.15), arrowprops={"arrowstyle": "<-", "connectionstyle": "arc3,rad=-0.45", "linewidth": 1.5}
    )  # fmt: skip
    ax.text(5.95, 3.8, "state", ha="center")
    return figure


def _box(ax: Axes, x: float, name: str, when: str, what: str, colour: str) -> None:
    ax.add_patch(FancyBboxPatch((x, 0.1), 3.4, 3, boxstyle="round,pad=0.05", facecolor=colour, alpha=0.15, edgecolor=colour))
    ax.text(x + 1.7, 2.7, name, ha="center", weight="bold")
    ax.text(x + 1.7, 2.25, when, ha="center", style="italic", fontsize=9)
    ax.text(x + 1.7, 1.0, "\n".join(textwrap.wrap(what, 34)), ha="center", va="center", fontsize=8)


FIGURES = {"passes": picture_of_passes, "gaps": picture_of_gaps, "knob": picture_of_the_knob, "split": picture_of_the_split}


def main() -> None:
    matplotlib.rcParams |= {"svg.hashsalt": "seqparc", "svg.fonttype": "none"}  # the same picture is the same file, and a short one
    HERE.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(HERE / f"{name}.svg", metadata={"Date": None})
        print(HERE / f"{name}.svg")


if __name__ == "__main__":
    main()
