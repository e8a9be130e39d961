"""Whatever users call their cells, attributes, files and folders, it reaches no shell and no generated code as more than a name."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
import seqparc.passes
from seqparc import ir
from seqparc.codegen import elements, parts, source, sweep
from seqparc.runtime.engine import Engine
from seqparc.text import parse_program, print_program
from tests.living import same

pytestmark = pytest.mark.usefixtures("quick")

NAMES = {
    "ends a comment": "*/ int evil(void) { return 1; } /*",
    "begins a line": "a\nint evil; import evil\n#",
    "returns": "a\rimport evil\u2028import evil\x85import evil",
    "goes on": "a\\",
    "trigraph": "a??/",
    "quotes": "\"\"\"\'\'\' + __import__('evil') + \"",
    "formats": "%s%n{0}{name}{{}}$HOME`evil`",
    "a place of our own": "@simd.h@",
    "markup": "[/b][red]:smile: [link=evil]",
    "other letters": "größe_状態",
    "no text": "a\udcff",
}
odd = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def same_but_for_comments(text: str, like: str, mark: str) -> None:
    """Code that differs in nothing but its comments."""
    bare = [re.sub(f"{mark}.*", "", t) for t in (text, like)]
    assert bare[0] == bare[1]
    assert text.count("\n") == like.count("\n") and all(ord(ch) >= 32 or ch == "\n" for ch in text)
    text.encode()  # it can be written to a file


def program_of(cell: Any) -> ir.Program:
    engine = seqparc.compile(cell, state=torch.zeros(20), backend="torch").engine(torch.zeros(1, 2, 20))
    assert isinstance(engine, Engine)
    return engine.plan.program


def source_file(path: Path, monkeypatch: pytest.MonkeyPatch, module: str = "odd") -> types.ModuleType:
    """A module of a user's, in a file of any name."""
    path.write_text("import torch\n\n\ndef cell(x, h):\n    return torch.tanh(0.5 * h.flip(-1) + x)\n")
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(made)
    return made


def generated(program: ir.Program) -> list[str]:
    """C, the two kinds of Triton, and the program's own notation."""
    split = parts.split(program)
    apart = elements.emit(program, split.plan, split.places, False).text
    return [source.emit(program, False).text, sweep.emit(program, False, "ieee").text, apart, print_program(program)]


@odd
def test_names_of_source_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in comments beside each line of code that is generated, with the user's line."""
    program = program_of(source_file(tmp_path / f"{name.replace('/', chr(0x2044))}.py", monkeypatch).cell)
    sources = {v.src for v in ir.topological(program.outputs) if getattr(v, "src", None)}
    assert sources and all(s.file.startswith(str(tmp_path)) for s in sources)
    made, like = generated(program), generated(program_of(source_file(tmp_path / "plain.py", monkeypatch).cell))
    assert all(re.search(r"(//|#) .*:5$", text, re.M) for text in made)
    for text, other, mark in zip(made, like, ("//", "#", "#", "#"), strict=True):
        same_but_for_comments(text, other, mark)
    assert parse_program(made[-1]) == program


@odd
def test_names_of_programs(name: str) -> None:
    program = program_of(lambda x, h: torch.tanh(0.5 * h.flip(-1) + x))
    for text, like in zip(generated(dataclasses.replace(program, name=name))[:3], generated(program), strict=False):
        text.encode()
        differing = [pair for pair in zip(text.split("\n"), like.split("\n"), strict=True) if pair[0] != pair[1]]
        assert len(differing) == 1 and differing[0][1].startswith(('"""cell', "// cell")), differing
        if text.startswith('"""'):
            assert len(ast.parse(text).body) == len(ast.parse(like).body)


class Keyed:
    """A cell whose tensors lie under names that are none of Python's."""

    def __init__(self, *names: str) -> None:
        self.weights = {name: torch.full((3,), 0.2 + 0.01 * i) for i, name in enumerate(names)}

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        for w in self.weights.values():
            h = torch.tanh(w * h + x) * torch.cos(w)  # of which one part is made before the run
        return h


def test_names_of_attributes() -> None:
    names = (*NAMES.values(), "w=__import__('builtins').exit(3), v", "a.b", "a_b", "a-b", "if", "")
    rnn = seqparc.compile(Keyed(*names), state=torch.zeros(3))
    same(rnn, torch.randn(2, 7, 3), [])
    assert rnn.stats.backend == "c" and {f"weights.{name}" for name in names} == set(rnn.captured())


def test_names_in_dictionaries_of_parameters() -> None:
    class Cell(nn.Module):
        hidden_size = 3

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.ParameterDict({"layer-1": torch.full((3,), 0.3), "layer 1": torch.full((3,), 0.6), "def": torch.ones(3)})

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.table["layer-1"] * h + self.table["layer 1"] * x) * self.table["def"]

    same(seqparc.compile(Cell()), torch.randn(2, 7, 3))


@pytest.mark.parametrize("kind", ["begins a line", "quotes", "markup"])
def test_names_of_cells(kind: str) -> None:
    """In messages and tables, word for word."""
    name = NAMES[kind]
    rnn = seqparc.compile(lambda x, h: torch.tanh(0.5 * h + x), state=torch.zeros(3), name=name)
    x = torch.randn(2, 7, 3)
    same(rnn, x, [])
    shown = str(rnn.explain(x)), str(rnn.validate(x)), rnn.explain()._repr_html_(), rnn.explain().to_latex()
    for text in shown[:2]:
        assert all(word in text for word in re.split(r"\s+", name)), text.split("\n")[:3]
    assert "<" not in re.sub(r"</?(table|caption|tr|th|td|pre)[^<>]*>", "", shown[2])
    with pytest.raises(seqparc.ShapeError) as raised:
        seqparc.compile(nn.LazyLinear(3), name=name)(torch.zeros(2, 3, 4))
    assert name in str(raised.value)
    assert name not in "".join(rnn.kernels().values()) or name == ""


def test_nothing_of_ours_evaluates_what_it_reads() -> None:
    """No pickle, no shell, and what is evaluated is what was just generated."""
    files = {f for package in (seqparc, seqparc.codegen, seqparc.passes) for f in Path(package.__path__[0]).resolve().rglob("*.py")}
    assert len(files) > 70
    calls: dict[str, list[str]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                named = ast.unparse(node.func)
                if any(k.arg == "shell" for k in node.keywords):
                    calls.setdefault("shell", []).append(file.name)
                if named in ("eval", "exec", "os.system", "os.popen") or named.split(".")[0] in ("pickle", "marshal", "shelve"):
                    calls.setdefault(named, []).append(file.name)
                if named == "torch.load":
                    calls.setdefault(named, []).append(file.name)
    assert calls == {"exec": ["device.py"]}
