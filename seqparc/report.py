"""Tables as text, as HTML, and on a terminal."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 130


def rendered(*parts: RenderableType) -> str:
    """What rich would print, as plain text."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))
