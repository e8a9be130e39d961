"""Tables as text, as HTML, and on a terminal."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 130


def rendered(*parts: RenderableType) -> str:
    """What rich would print, as plain text."""
    out = io.StringIO()
    console = Console(
        file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False,
        markup=False, emoji=False,  # names and messages hold brackets and colons of their own
    )  # fmt: skip
    console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))
