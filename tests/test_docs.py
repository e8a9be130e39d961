"""The documentation: its blocks run and print what it says, its links lead somewhere, its reference is whole."""

from __future__ import annotations

import argparse
import doctest
import re
from pathlib import Path

import pytest
import torch

import seqparc
from seqparc import explain
from seqparc.__main__ import parser
from seqparc.codegen import floor
from seqparc.runtime.engine import Engine
from seqparc.timeline import Timeline

from .pages import DOCS, ROOT, pages, run

PAGES = sorted(DOCS.rglob("*.md"))
_FENCE = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
#: What differs from machine to machine: numbers with what they are counted in, frames of tables, line ends, what is said of speed, and
#: where operations were written (one that two cells have counts as that of the first).
_VARIES = re.compile(
    r"[^\n]*times the least that this processor needs[^\n]*|core written at[^\n]*|time of a call.*?(?=[├└])"
    r"|[\u2500-\u257f\s]+|[-+]?\d+(\.\d+)?(e[-+]?\d+)?( [KMG]iB| bytes)?",
    re.S,
)


def _told(text: str) -> str:
    """What a text says, but for what differs."""
    return " ".join(_VARIES.sub(" ", text).split())


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.stem)
def test_what_a_page_shows_is_what_its_blocks_do(page: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is measured, and no backward kernel is made before one is wanted: seconds for each page.
    monkeypatch.setattr(floor, "rates", lambda dtype, threads: floor.Rates(1e10, 1e9, 1e10, 1e-6))
    monkeypatch.setattr(explain, "_timed", lambda engine, x, start: (Timeline(), None))
    monkeypatch.setattr(Engine, "begin_backward", lambda self, device: None)
    for block, printed in run(page):
        if block.shown is not None:
            again = f"{page.name}, line {block.line}: `python -m tests.pages {page.relative_to(ROOT)}` writes what it prints now"
            assert _told(printed) == _told(block.shown), again


def _anchors(page: Path) -> set[str]:
    """The names by which headings of a page are reached."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower())).strip("-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in _anchors(target), f"{page.name} links to {link}, {target.name} has {sorted(_anchors(target))}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == {p.relative_to(DOCS).as_posix() for p in PAGES}


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(p.read_text("utf-8") for p in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^::: seqparc\.([\w.]+)", text, re.M))
    for name in set(seqparc.__all__) - {"__version__"}:
        module = getattr(getattr(seqparc, name), "__module__", "").removeprefix("seqparc.")
        assert name in described or module in described or any(d.startswith(f"{name}.") for d in described), name


def test_every_command_and_its_options_are_in_the_reference() -> None:
    told = (DOCS / "reference" / "shell.md").read_text("utf-8")
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert f"| `{name}` |" in told
        assert [o for a in command._actions for o in a.option_strings[-1:] if o not in told and o != "--help"] == [], name


def test_examples_in_docstrings_run(quick: None) -> None:
    found = [seqparc.compile, seqparc.Options, seqparc.CompiledRNN.validate]
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for thing in found:
        torch.manual_seed(0)
        for test in finder.find(thing, name=thing.__qualname__, globs={"torch": torch, "seqparc": seqparc}):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0 and runner.tries >= len(found)
