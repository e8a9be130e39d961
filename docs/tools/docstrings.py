"""Docstrings as pages want them: the columns in which they explain names become definition lists, and examples become fences."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: "name, name    what they are": at least two spaces between.
_ROW = re.compile(r"([a-z_]+(?:, [a-z_]+)*) {2,}(\S.*)")


def listed(text: str) -> str:
    """A docstring with its columns turned into definition lists and its examples into fences."""
    made: list[str] = []
    inside = example = False
    for line in [*text.splitlines(), ""]:
        row = _ROW.fullmatch(line)
        if example or line.startswith(">>> "):
            made += [] if example else ["```pycon"]
            example = bool(line.strip())
            made += [line] if example else ["```", ""]
        elif row:
            names = ", ".join(f"`{name}`" for name in row[1].split(", "))
            made += ["", names, f":   {row[2]}"]
            inside = True
        elif inside and line.startswith("   "):  # goes on
            made.append(f"    {line.strip()}")
        else:
            made += [""] * (inside and bool(line.strip())) + [line]
            inside = False
    return "\n".join(made)


class Columns(griffe.Extension):
    """Applied to every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)
