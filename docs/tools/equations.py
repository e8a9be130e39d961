"""Equations of pages: LaTeX becomes MathML, which browsers show without a script."""

from __future__ import annotations

import html
from typing import Any

from latex2mathml.converter import convert


def equation(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any) -> str:
    """A fence ```math, one equation a line."""
    shown = "".join(convert(line, display="block") for line in source.splitlines() if line.strip())
    return f'<div class="{html.escape(css_class)}">{shown}</div>'
