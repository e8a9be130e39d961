"""The state Jacobian in words and in LaTeX: the terms of `seqparc.passes.matrices` with names for what occurs in them."""

from __future__ import annotations

import ast
import linecache
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np
import sympy
from torch import nn

from seqparc import ir
from seqparc.codegen.floor import FUNCTION
from seqparc.ops import OPS
from seqparc.passes import symbolic
from seqparc.passes.matrices import Form, Matrix, NoFormError, Term, matrix, matrix_form
from seqparc.plan import Plan

#: A name of the user's that stands for a value, if it looks like this and says nothing else here.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,7}")
_TAKEN = re.compile(r"[usJWPga]\d*|I|sum|max|diag|parts")
#: Operations from which on a value that occurs more than once has a name.
LONG = 4
#: What matrices are made of beside weights.
_ONES = "ones"


@dataclass(frozen=True)
class Formula:
    """J = …, then what the names in it stand for. Each line is (left, right) as text and in LaTeX; `reason`: why there is none."""

    lines: tuple[tuple[str, str], ...] = ()
    latex: tuple[tuple[str, str], ...] = ()
    reason: str = ""

    def text(self) -> tuple[str, ...]:
        return (self.reason,) if self.reason else tuple(f"{a} = {b}" if b else a for a, b in self.lines)


def formula(plan: Plan, cell: Any = None) -> Formula:
    """The matrix form of a plan's state Jacobian, with the names that the cell's own lines give to values."""
    if plan.step is not None:
        return Formula(reason="the cell is called itself, as it has operations whose derivatives are not known here")
    try:
        form = matrix_form(plan.core)
    except NoFormError as error:
        return Formula(reason=f"no matrix form: {error}; its pattern is what is known of it")
    return _Words(plan, own_lines(cell)).formula(form)


def escaped(name: str) -> str:
    """A name of the user's in LaTeX, upright, letter by letter; what LaTeX has no sign for is a question mark."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".,:[]()+-=/* ") else "_" if c == "_" else "?" for c in name)
    return r"\mathrm{" + kept.replace("_", r"\_").replace(" ", r"\ ") + "}"


@dataclass(frozen=True)
class _Said:
    text: str
    latex: str


class _Words:
    """Names for what occurs in one Jacobian, given as they are met."""

    def __init__(self, plan: Plan, lines: Sequence[tuple[str, int, int]]) -> None:
        self.plan, self.lines = plan, lines
        self.values: dict[ir.Value, _Said] = {}
        self.symbols: dict[sympy.Symbol, str] = {}
        self.matrices: dict[Matrix, _Said] = {}
        self.gates: list[ir.Value] = []
        self.attributes = _attributes(plan)
        self.shared: set[ir.Value] = set()

    def formula(self, form: Form) -> Formula:
        n = len(form.sizes)
        self.shared = _shared([v for terms in form.blocks.values() for t in terms for v in (t.left, *(d for _, d in t.chain))])
        lines, latex = [], []
        if n > 1:
            names = [[(f"J{i}{j}", f"J_{{{i}{j}}}") if (i, j) in form.blocks else ("0", "0") for j in range(n)] for i in range(n)]
            lines.append(("J", "; ".join(", ".join(t for t, _ in row) for row in names) + "  (a row of blocks for each leaf of the state)"))
            rows = r" \\ ".join(" & ".join(t for _, t in row) for row in names)
            latex.append(("J", rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}"))
        for (i, j), terms in sorted(form.blocks.items()):
            sums = [self.term(t) for t in terms]
            lines.append((f"J{i}{j}" if n > 1 else "J", " + ".join(s.text for s in sums)))
            latex.append((f"J_{{{i}{j}}}" if n > 1 else "J", " + ".join(s.latex for s in sums)))
        if not form.blocks:
            lines, latex = [("J", "0")], [("J", "0")]
        for gate in self.gates:  # grows on the way
            said, meant = self.values[gate], self.expression(gate, open=True)
            lines.append((said.text, meant.text))
            latex.append((said.latex, meant.latex))
        for m, said in self.matrices.items():
            meant = self.meaning(m)
            lines.append((said.text, meant.text))
            latex.append((said.latex, meant.latex))
        return Formula(tuple(lines), tuple(latex))

    # -- terms -----------------------------------------------------------------------------------------------------------

    def term(self, t: Term) -> _Said:
        factors = [self.diagonal(t.left)]
        for m, d in t.chain:
            factors += [self.matrix(m), self.diagonal(d)]
        shown = [f for f in factors if f.text] or [_Said("I", "I")]
        return _Said(" ".join(f.text for f in shown), r"\,".join(f.latex for f in shown))

    def diagonal(self, value: ir.Value) -> _Said:
        """Nothing for the identity, a number for a multiple of it."""
        said = self.expression(value)
        if isinstance(value, ir.Const):
            return _Said("", "") if value.value == 1 else said
        return _Said(f"diag({said.text})", rf"\operatorname{{diag}}\left({said.latex}\right)")

    def matrix(self, m: Matrix) -> _Said:
        if m not in self.matrices:
            letter, taken = ("W", "P")[isinstance(m.value, ir.Const)], len(self.matrices) + 1
            self.matrices[m] = _Said(f"{letter}{taken}", f"{letter}_{{{taken}}}")
        return self.matrices[m]

    # -- vectors ---------------------------------------------------------------------------------------------------------

    def expression(self, value: ir.Value, open: bool = False) -> _Said:
        """A vector in terms of named ones; `open`: what a name stands for."""
        names: dict[ir.Value, str] = {}
        stack = list(reversed(value.args)) if open else [value]
        while stack:
            v = stack.pop()
            if v in names:
                continue
            said = self.named(v)
            if said is None:
                stack.extend(reversed(v.args))
            else:
                names[v] = said.text
                self.symbols[sympy.Symbol(said.text, real=True)] = said.latex
        e = sympy.factor_terms(symbolic.to_sympy(value, names, limit=10_000))
        return _Said(str(e).replace("**", "^"), sympy.latex(e, symbol_names=self.symbols).replace("σ", r"\sigma"))

    def named(self, v: ir.Value) -> _Said | None:
        """The name of a vector that has one; None for what is written out."""
        if v not in self.values:
            said = self.called(v)
            if said is None:
                return None
            alike = sum(other.text.split("#")[0] == said.text for other in self.values.values())
            if alike:  # other elements of the same, or other sums over it
                said = _Said(f"{said.text}#{alike + 1}", rf"{{{said.latex}}}^{{({alike + 1})}}")
            self.values[v] = said
            if isinstance(v, ir.Map):
                self.gates.append(v)
        return self.values[v]

    def called(self, v: ir.Value) -> _Said | None:
        match v:
            case ir.Leaf():
                return self.leaf(v)
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                rows, k = np.nonzero((ia.array >= 0) & (ib.array >= 0))
                entries = np.stack((rows, ib.array[rows, k], ia.array[rows, k]), axis=1).astype(np.int32)
                w, x = self.matrix(matrix(a, (v.size, b.size), entries, v.src)), self.expression(b)
                if not isinstance(b, ir.Leaf) and b not in self.gates:
                    x = _Said(f"({x.text})", rf"\left({x.latex}\right)")
                return _Said(f"({w.text} {x.text})", rf"\left({w.latex}\,{x.latex}\right)")
            case ir.Gather(sources=sources):
                parts = [self.expression(s) for s in sources]
                inside = ", ".join(p.latex for p in parts)
                return _Said(f"parts({', '.join(p.text for p in parts)})", rf"\operatorname{{parts}}\left({inside}\right)")
            case ir.Reduce(fold=fold, x=x):
                inner = self.expression(x)
                return _Said(f"{fold}({inner.text})", rf"\operatorname{{{fold}}}\left({inner.latex}\right)")
            case ir.Map(op=op) if OPS[op].cost >= FUNCTION or v in self.shared:
                return self.gate(v)
        return None

    def gate(self, v: ir.Map) -> _Said:
        """A function's value: under the name that the user's line gives it, if it gives it to nothing else."""
        name, taken = written(v.src, self.lines), {*self.attributes, *(said.text for said in self.values.values())}
        if name is not None and _NAME.fullmatch(name) and not _TAKEN.fullmatch(name) and name not in taken:
            return _Said(name, name if len(name) == 1 else escaped(name))
        letter = "g" if OPS[v.op].cost >= FUNCTION else "a"
        number = sum(re.fullmatch(letter + r"\d+", self.values[g].text) is not None for g in self.gates) + 1
        return _Said(f"{letter}{number}", f"{letter}_{{{number}}}")

    def leaf(self, v: ir.Leaf) -> _Said:
        sizes = {"state": self.plan.core.state_sizes, "stream": self.plan.core.stream_sizes, "param": self.plan.core.param_sizes}[v.kind]
        if v.kind == "param":
            name = self.weight(v.slot)
            said = _Said(name, escaped(name))
        else:
            letter, number = {"state": "s", "stream": "u"}[v.kind], str(v.slot) if len(sizes) > 1 else ""
            said = _Said(letter + number, f"{letter}_{{{number}}}" if number else letter)
        where = _stretch(v.index.array[0], sizes[v.slot], self.shape(v.slot) if v.kind == "param" else ())
        if where and v.kind != "param" and len(sizes) > 1:
            said = _Said(said.text, f"{{{said.latex}}}")
        return _Said(said.text + where, f"{said.latex}_{{{where}}}" if where else said.latex)

    def weight(self, slot: int) -> str:
        """What a weight is called: an attribute's name, or a number if it was made of others."""
        name = self.attributes[slot]
        if name is None:
            return f"w{slot}"
        name = re.sub(r"[\s#]+", " ", name)
        return f"cell.{name}" if _TAKEN.fullmatch(name) or re.fullmatch(r"w\d+", name) else name

    # -- what matrices are -----------------------------------------------------------------------------------------------

    def meaning(self, m: Matrix) -> _Said:
        rows, columns = m.shape
        shape, kind = _Said(f"{rows} × {columns}", rf"{rows} \times {columns}"), _kind(m)
        if isinstance(m.value, ir.Const):
            what = f"{m.value.value:g} in {len(m.entries.array)} places" if kind != _ONES else _ONES
            what = "picks elements" if m.picks else what
            return _Said(f"{what}, {shape.text}", rf"\text{{{what}, }} {shape.latex}")
        said = self.source(m)
        tail = f", {kind}" if kind else ""
        inside = rf"{said.latex} \in \mathbb{{R}}^{{{shape.latex}}}"
        return _Said(f"{said.text}, {shape.text}{tail}", inside + rf"\text{{{tail}}}" * bool(tail))

    def source(self, m: Matrix) -> _Said:
        """Of which tensor a matrix is made, and which part of it."""
        if not isinstance(m.value, ir.Leaf):
            said = self.expression(m.value)
            return _Said(f"made of {said.text}", rf"\text{{made of }} {said.latex}")
        whole, leaf = self.leaf(ir.leaf(m.value.kind, m.value.slot, m.value.index)), m.value
        if leaf.kind != "param":
            return _Said(f"made of {whole.text}", rf"\text{{made of }} {whole.latex}")
        name, shape = self.weight(leaf.slot), self.shape(leaf.slot)
        place = leaf.index.array[0][m.entries.array[:, 2]]
        part = _part(np.stack((m.entries.array[:, 0], m.entries.array[:, 1], place), axis=1), m.shape, shape)
        if part is None:
            made = "" if self.attributes[leaf.slot] else ", ".join(key[1] for key in self.plan.weights.reads[leaf.slot] if key[0] == "attr")
            return _Said(f"of {made or name}", rf"\text{{of }} {escaped(made or name)}")
        turned = part.endswith("ᵀ")
        where = part.rstrip("ᵀ")
        return _Said(name + part, escaped(name) + (f"_{{{where}}}" if where else "") + r"^{\mathsf{T}}" * turned)

    def shape(self, slot: int) -> tuple[int, ...]:
        """Of a weight that is an attribute."""
        name = self.attributes[slot]
        return () if name is None else tuple(self.plan.attributes[name]().shape)


def _attributes(plan: Plan) -> list[str | None]:
    """Of every weight slot the attribute that it is; None if it is computed."""
    graph = plan.weights.run.__self__.graph
    names = {n.name: key[1] for n, key in zip((n for n in graph.nodes if n.op == "placeholder"), plan.weights.inputs, strict=True)}
    return [names.get(n.name) for n in next(n for n in graph.nodes if n.op == "output").args[0]]


def _shared(roots: Sequence[ir.Value]) -> set[ir.Value]:
    """What occurs more than once and takes some operations."""
    order, uses, long = ir.topological(roots), dict.fromkeys(roots, 1), dict[ir.Value, int]()
    for v in order:
        for a in v.args:
            uses[a] = uses.get(a, 0) + 1
    for v in order:
        plain = isinstance(v, ir.Map) and OPS[v.op].cost < FUNCTION
        long[v] = 0 if not plain else 1 + sum(0 if uses[a] > 1 and long[a] >= LONG else long[a] for a in v.args)
    return {v for v, n in long.items() if n >= LONG and uses.get(v, 0) > 1}


def _stretch(index: np.ndarray, size: int, shape: Sequence[int] = ()) -> str:
    """Which elements of a vector, or of a tensor of some shape: nothing for all, [a:b] for a stretch, and "…" for others."""
    if len(index) == size and (index == np.arange(size)).all():
        return ""
    first, row = int(index[0]), math.prod(shape[1:])
    if len(shape) > 1 and len(index) == row and first % row == 0 and (index == np.arange(first, first + row)).all():
        return f"[{first // row}]"
    if len(shape) > 1:
        return "[…]"
    if (index == np.arange(first, first + len(index))).all():
        return f"[{first}:{first + len(index)}]"
    if (index == first).all():
        return f"[{first}]"
    return "[…]"


def _part(entries: np.ndarray, shape: tuple[int, int], whole: Sequence[int]) -> str | None:
    """Which part of a tensor of this shape has the entries (row, column, place): "", "[a:b]", with a "ᵀ" if turned; None if another."""
    if not len(entries) or not whole:
        return None
    row, column, place = (entries[:, k].astype(np.int64) for k in range(3))
    if len(entries) == shape[0] * shape[1] and len(whole) >= 2:
        offset = int(place.min())
        for turned, (a, b), (height, width) in (("", (row, column), shape), ("ᵀ", (column, row), shape[::-1])):
            # as rows of a matrix, whose leading axes may have been put together
            if (place == offset + a * whole[-1] + b).all() and offset % whole[-1] == 0 and width == whole[-1]:
                rows = math.prod(whole[:-1])
                if len(whole) == 2 or height == rows:
                    return ("" if height == rows else f"[{offset // width}:{offset // width + height}]") + turned
                if whole[-2] == height and offset % (height * width) == 0 and len(whole) == 3:
                    return f"[{offset // (height * width)}]" + turned
    block = math.prod(whole[1:])
    first = int(place.min()) // block
    if block and len(place) == block and (np.sort(place) == np.arange(first * block, (first + 1) * block)).all():
        return f"[{first}]"
    return None


def _kind(m: Matrix) -> str:
    """How a matrix is filled, where it is not dense: blocks on its diagonal, or how many entries."""
    rows, columns = m.shape
    filled = m.entries.array
    if len(filled) >= rows * columns:
        return _ONES if isinstance(m.value, ir.Const) else ""
    for count in (k for k in range(math.gcd(rows, columns), 1, -1) if len(filled) * k == rows * columns):
        if (filled[:, 0] * count // rows == filled[:, 1] * count // columns).all():
            if rows == count == columns:
                return "diagonal"
            return f"{count} blocks of {rows // count} × {columns // count} on its diagonal"
    return f"{len(filled)} entries that may be non-zero"


def own_lines(cell: Any) -> list[tuple[str, int, int]]:
    """File, first and last line of the functions that a cell is, and of the methods of its modules."""
    found = [cell, getattr(cell, "__func__", None)]
    for module in cell.modules() if isinstance(cell, nn.Module) else ():
        found += vars(type(module)).values()
    codes = [code for f in found if isinstance(code := getattr(f, "__code__", None), CodeType)]
    return [(code.co_filename, code.co_firstlineno, max((at for *_, at in code.co_lines() if at), default=0)) for code in codes]


def written(src: ir.Source | None, lines: Sequence[tuple[str, int, int]]) -> str | None:
    """The name that a line among these gives to a value: `z` of `z = …`. (A value of two cells is one, and has the line of either.)"""
    if src is None or not any(src.file == file and first <= src.line <= last for file, first, last in lines):
        return None
    try:
        parsed: Any = ast.parse(linecache.getline(src.file, src.line).strip())
    except (SyntaxError, ValueError):
        return None
    match parsed.body:
        case [ast.Assign(targets=[ast.Name(id=name)])]:
            return str(name)
    return None
