"""What `explain` gives: the same sections as plain text, on a terminal, as HTML, in LaTeX, and as a picture."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sympy
from rich.console import Group
from rich.table import Table
from rich.text import Text

from seqparc.formula import Formula
from seqparc.picture import Row, draw
from seqparc.plan import Stats
from seqparc.report import rendered
from seqparc.runtime.memory import Memory
from seqparc.timeline import Timeline, milliseconds

#: Lines and shades that show on a light ground and on a dark one; the text has the page's own colour.
_LINE, _SHADE, _BAR = "rgba(128,128,128,.45)", "rgba(128,128,128,.12)", "rgba(0,114,178,.4)"
_CELL = f"border:1px solid {_LINE};padding:4px 8px;text-align:left;vertical-align:top"
#: Signs of the table's own that LaTeX has no letters for.
_SIGNS = {"J": r"\frac{\partial s'}{\partial s}"}
TIME = "time of a call"


@dataclass(frozen=True)
class Explanation:
    """Sections of text, the Jacobian's pattern, entries and matrix form, how the last call ran, and the memory and time that one takes.

    rows: which stretches of time ran where, by direction; tolerance: what a gap has to fall to.
    """

    name: str
    sections: tuple[tuple[str, tuple[str, ...]], ...]
    pattern: np.ndarray
    entries: tuple[tuple[str, sympy.Expr], ...]
    stats: Stats
    memory: dict[str, Memory] = field(default_factory=dict)  # of "forward" alone and of "forward and backward"
    formula: Formula = field(default_factory=Formula)
    timeline: Timeline = field(default_factory=Timeline)
    leaves: tuple[int, ...] = ()  # state numbers of each leaf
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    tolerance: float | None = None

    # -- text ------------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        table = self._table()
        for title, lines in self.sections:
            table.add_row(title, "\n".join(lines))
        return rendered(table)

    def __rich__(self) -> Table:
        """The same with colours, and with figures in tables of their own, for a rich console."""
        table = self._table()
        for title, lines in self.sections:
            what = self._times() if title == TIME and self.timeline.parts else Text("\n".join(lines))
            table.add_row(Text(title, style="bold"), what)
        return table

    def _table(self) -> Table:
        table = Table(title=Text(self.name, style="bold"), show_header=False, show_lines=True, title_justify="left")
        table.add_column("part", no_wrap=True)
        table.add_column("what", overflow="fold")
        return table

    def _times(self) -> Group:
        parts: list[Any] = [Text(self.timeline.lines()[0])]
        for direction, seconds in self.timeline.parts.items():
            middle, least, most = self.timeline.total[direction]
            title = f"{direction}: {milliseconds(middle)} ({milliseconds(least)} to {milliseconds(most)})"
            table = Table(title=title, title_justify="left")
            for head in ("part", "ms", "share"):
                table.add_column(head, justify="left" if head == "part" else "right")
            table.add_column("", min_width=20)
            for name, t in seconds.items():
                table.add_row(name, f"{1e3 * t:.3g}", f"{100 * t / middle:.0f}%", Text("█" * round(20 * t / middle), style="blue"))
            parts.append(table)
        return Group(*parts)

    # -- notebooks ---------------------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        """A table with its style in place, no scripts, in the page's own colours."""
        rows = "".join(
            f"<tr><th style='{_CELL};background:{_SHADE}'>{html.escape(title)}</th><td style='{_CELL}'>{self._html(title, lines)}</td></tr>"
            for title, lines in self.sections
        )
        caption = f"<caption style='text-align:left;font-weight:bold;padding:4px 0'>{html.escape(self.name)}</caption>"
        return f"<table style='border-collapse:collapse;color:inherit;background:transparent'>{caption}{rows}</table>"

    def _html(self, title: str, lines: tuple[str, ...]) -> str:
        def pre(shown: tuple[str, ...]) -> str:
            style = "margin:0;white-space:pre-wrap;color:inherit;background:transparent"
            return f"<pre style='{style}'>{html.escape(chr(10).join(shown))}</pre>"

        if title != TIME or not self.timeline.parts:
            return pre(lines)
        rows = []
        for direction, seconds in self.timeline.parts.items():
            middle = self.timeline.total[direction][0]
            for name, t in ((direction, middle), *seconds.items()):
                share = 100 * t / middle
                bar = f"background:linear-gradient(to right,{_BAR} {share:.0f}%,transparent {share:.0f}%)"
                head = "font-weight:bold" if name == direction else "padding-left:20px"
                rows.append(
                    f"<tr><td style='{_CELL};{head}'>{html.escape(name)}</td><td style='{_CELL};text-align:right'>{milliseconds(t)}</td>"
                    f"<td style='{_CELL};width:160px;{bar if name != direction else ''}'>{share:.0f}%</td></tr>"
                )
        return pre(lines[:1]) + f"<table style='border-collapse:collapse;color:inherit;background:transparent'>{''.join(rows)}</table>"

    def page(self) -> str:
        """A whole document of it, for a browser; the picture too, if there is matplotlib."""
        import base64
        import importlib.util
        import tempfile

        picture = ""
        if importlib.util.find_spec("matplotlib") is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.plot(Path(folder) / "told.svg")
                coded = base64.b64encode((Path(folder) / "told.svg").read_bytes()).decode()
            alt = "the Jacobian's pattern, chunks over time, gap by pass, time by part"
            picture = f"<p><img alt=\"{alt}\" style='max-width:100%;background:white' src='data:image/svg+xml;base64,{coded}'></p>"
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='color-scheme' content='light dark'>"
            f"<title>{html.escape(self.name)}</title></head>\n<body style='font-family:sans-serif'>\n{self._repr_html_()}\n{picture}"
            "</body></html>\n"
        )

    # -- data ----------------------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Everything in it, of plain types."""
        return {
            "cell": self.name,
            **{title: list(lines) for title, lines in self.sections},
            "pattern": self.pattern.astype(int).tolist(),
            "entries": {name: str(e) for name, e in self.entries},
            "bytes": {what: asdict(m) for what, m in self.memory.items()},
            "seconds": asdict(self.timeline),
            "latex": self.to_latex(),
        }

    def to_latex(self) -> str:
        """The state Jacobian as aligned equations: the first entry of an elementwise cell, and the matrix form with what its names mean.

        Vectors multiply elementwise, [a:b] are rows. Where there is no matrix form: the entries of one lane, if there are any.
        """
        equations = [(r"\frac{\partial s'_{0}}{\partial s_{0}}", _entry(self.entries[0][1]))] if len(self.entries) == 1 else []
        if self.formula.latex:
            equations += [(rf"{a} = {_SIGNS[a]}" if a in _SIGNS else a, b) for a, b in self.formula.latex]
        elif len(self.entries) > 1:
            equations += [(f"J_{{{name[2:-1]}}}", _entry(e)) for name, e in self.entries]
        if not equations:
            return f"% {self.formula.reason or 'there is no compiled cell'}"
        return "\n".join(["\\begin{align*}", *(f"{a} &= {b} \\\\" for a, b in equations), "\\end{align*}"])

    def plot(self, path: str | Path) -> None:
        """Write a picture, .png or .svg by its name: the Jacobian's pattern, which chunks ran where, the gap by pass, the time by part.

        Raises SeqparcError where matplotlib is missing (pip install 'seqparc[demo]') or the name ends otherwise.
        """
        gaps = {d: s.gaps for d, s in (("forward", self.stats), ("backward", self.stats.backward)) if s is not None and s.gaps}
        draw(Path(path), self.name, self.pattern, self.leaves, self.rows, gaps, self.tolerance, self.timeline)


def _entry(e: sympy.Expr) -> str:
    """An entry of one lane: w0_7 is the number 7 of weight 0."""
    names = {s: "{}_{{{}}}".format(s.name[0], s.name[1:].replace("_", ",")) for s in e.free_symbols if s.name[1:2].isdigit()}
    return str(sympy.latex(e, symbol_names=names)).replace("σ", r"\sigma")
