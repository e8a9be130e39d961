"""The pages of docs/ that hold Python: their blocks, run in order in one namespace, as a reader would.

A fence ```text right after a fence ```python is what that block prints. `python -m tests.pages docs/tutorial.md …` runs pages and writes
what their blocks print now into them; `--show` prints it instead.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: A block of Python and, if there is one, what it prints.
_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.M | re.S)


class Block(NamedTuple):
    code: str
    shown: str | None  # what the page says it prints
    line: int  # of the page, the first of the code
    span: tuple[int, int]  # of `shown`


def pages() -> list[Path]:
    """Every page that holds Python."""
    return [p for p in sorted(DOCS.rglob("*.md")) if _BLOCK.search(p.read_text("utf-8"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [Block(m["code"], m["shown"], text[: m.start("code")].count("\n") + 1, m.span("shown")) for m in _BLOCK.finditer(text)]


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Every block of a page, with what it printed."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    space: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in blocks(page):
        code = compile("\n" * (block.line - 1) + block.code, str(page.relative_to(ROOT)), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, space)
        yield block, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def write(page: Path) -> None:
    """Put what a page's blocks print now into it."""
    text = page.read_text("utf-8")
    for block, printed in reversed(list(run(page))):
        if block.shown is not None:
            text = text[: block.span[0]] + printed + text[block.span[1] :]
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    from seqparc.runtime.engine import Engine

    Engine.by_the_clock = False  # what pages show does not depend on how busy the machine is
    for name in [a for a in sys.argv[1:] if a != "--show"]:
        try:
            if "--show" not in sys.argv:
                write(Path(name).resolve())
                continue
            for one, told in run(Path(name).resolve()):
                print(f"--- line {one.line}\n{told}", end="")
        except Exception:
            traceback.print_exc()
            sys.exit(f"{name} does not run")
