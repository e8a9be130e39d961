"""What the examples share: their arguments, a clock, a progress bar, a table, and where the picture goes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
EAGER, COMPILED = "0.6", "tab:red"  # colours of the plain loop and of seqparc in every picture

Result = TypeVar("Result")


def arguments(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser with --quick, which `quick` explains, and --out."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder the picture goes to; default examples/out")
    return parser


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and how many seconds it took."""
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def learn(optimiser: Optimizer, model: nn.Module, loss_of: Callable[[], Tensor]) -> float:
    """One training step with clipped gradients; the loss before it."""
    optimiser.zero_grad()
    loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def step_times(axes: Axes, eager: str, before: Sequence[float], after: Sequence[float]) -> None:
    """Two bars, the median seconds of a training step: of what is called `eager`, and compiled."""
    both = [statistics.median(seconds) for seconds in (before, after)]
    bars = axes.bar([eager, "compiled"], both, color=[EAGER, COMPILED], width=0.6)
    axes.bar_label(bars, labels=[f"{s:.3g} s" for s in both], padding=3)
    axes.set(yscale="log", ylabel="time per training step (s)", title=f"{both[0] / both[1]:,.1f} times faster")
    axes.set_ylim(min(both) / 4, max(both) * 3)


def progress(console: Console, name: str, told: str) -> Progress:
    """A bar called `name`; `told` is what stands behind it, such as "loss {task.fields[loss]:.3f}"."""
    return Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn(told), TimeRemainingColumn(), console=console)


def table(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]], caption: str | None = None) -> Table:
    """A table with names on the left and numbers on the right; an empty row starts a section."""
    made = Table(title=title, caption=caption, caption_justify="left")
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number else "left")
    for row in map(tuple, rows):
        if row:
            made.add_row(*row)
        else:
            made.add_section()
    return made


def save(figure: Figure, folder: Path, name: str, console: Console) -> None:
    """Write the picture and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=120)
    console.print(f"picture: {folder / name}")
