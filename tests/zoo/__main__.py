"""Run the zoo and write docs/zoo.md: `python -m tests.zoo`. With names, rows whose title has one of them in it, on the terminal alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import seqparc

from . import ROWS
from .page import PAGE, look, page
from .rows import FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of titles; all rows if left away")
    parser.add_argument("--steps", type=int, default=4096, help="steps of the sequence that is timed")
    given = parser.parse_args(arguments)
    if not FOLDER.is_dir():
        parser.error("the packages are not installed; `make zoo` does that")
    rows = [row for title, row in ROWS.items() if not given.names or any(name in title for name in given.names)]
    if not rows:
        parser.error(f"no row is called anything like {' or '.join(given.names)}")
    console, found = Console(), []
    seqparc.compile(torch.nn.RNNCell(2, 3))(torch.randn(2, 9, 2))[0].sum().backward()  # imports count for no row
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(task, description=row.title)
            found.append(look(row, given.steps))
            if not found[-1].agrees:
                progress.console.print(f"{row.title}: {found[-1].refused or 'does not agree'}", markup=False)
            progress.advance(task)
    text = page(found, given.steps)
    if given.names:
        console.print(text, markup=False, soft_wrap=True)
    else:
        PAGE.write_text(text)
        console.print(f"{PAGE} is written")
    return int(any(not f.agrees for f in found))


if __name__ == "__main__":
    sys.exit(main())
