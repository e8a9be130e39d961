"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OUT = Path(__file__).parent / "out"


def parser(about: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser of what every benchmark on a processor takes. about: the module's docstring."""
    made = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    made.add_argument("--only", default="", help="cases whose name contains this")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--quick", action="store_true", help="short sequences, few repeats: only to see that it runs")
    made.add_argument("--out", type=Path, default=OUT, help="the folder for what is written")
    return made


def bar(console: Console) -> Progress:
    """Of cases, each shown by its name when it begins; nothing is drawn while one is timed."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=console, auto_refresh=False)
