"""What the examples share: their arguments, a clock, a progress bar, a table, and where the picture goes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
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
