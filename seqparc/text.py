"""Programs as text that parses back.

    program "cell" 1 lanes
    sizes state 4 stream 12 param 16 emit 4 sum -
    %0 = leaf state 0 [1 4 | 0 +0 +1]
    %1 = leaf param 0 [1 16 | 0 +0 +1]
    %2 = const 0x1.0000000000000p+0 4
    %3 = map sub %2 %0  # cell.py:7
    %4 = gather %0 %3 [4 : 0 0 1 1] [4 | 0 +1]
    %5 = contract %1 %4 [4 4 | 0 +4 +1] [4 4 | 0 +0 +1]
    %6 = reduce max %5 [4 2 : 0..3 2 -1 3 -1]
    state %0
    next %6
    emit 0 [1 4 | 0 +0 +1] %6

An index is its shape, then `|`, an offset and one signed stride per axis; or `:` and all its numbers, a..b being a, a + 1, ..., b.
What follows # is a comment. Whether a program that parses is a sound one is for `seqparc.verify` to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from seqparc import ir
from seqparc.ir import Index, Program, Store, Value
from seqparc.ops import OPS

_SLOTS = ("state", "stream", "param", "emit", "sum")


def digest(program: Program) -> str:
    """A short name that tells unequal programs apart; where in the user's code their values were written is left out."""
    return hashlib.sha256(print_program(program, comments=False).encode()).hexdigest()[:16]


def print_program(program: Program, comments: bool = True) -> str:
    """A program in the notation above, one statement per value, arguments first."""
    number: dict[Value, int] = {}

    def names(values: Iterable[Value]) -> str:
        return "".join(f" %{number[v]}" for v in values)

    sizes = "".join(f" {name} {','.join(map(str, getattr(program, f'{name}_sizes'))) or '-'}" for name in _SLOTS)
    lines = [f"program {json.dumps(program.name)} {program.lanes} lanes", f"sizes{sizes}"]
    for v in ir.topological((*program.state, *program.outputs)):
        number[v], src = len(number), getattr(v, "src", None)
        match v:
            case ir.Leaf(kind=kind, slot=slot, index=index):
                text = f"leaf {kind} {slot} {_index_text(index)}"
            case ir.Const(value=value, size=size):
                text = f"const {value.hex()} {size}"
            case ir.Map(op=op):
                text = f"map {op}{names(v.args)}"
            case ir.Gather(which=one, index=two) | ir.Contract(ia=one, ib=two):
                text = f"{type(v).__name__.lower()}{names(v.args)} {_index_text(one)} {_index_text(two)}"
            case ir.Reduce(fold=fold, index=index):
                text = f"reduce {fold}{names(v.args)} {_index_text(index)}"
            case _:
                raise TypeError(f"{type(v).__name__} has no text")
        comment = f"  # {src.label}" if src and comments else ""
        lines.append(f"%{number[v]} = {text}{comment}")
    lines += ["state" + names(program.state), "next" + names(program.next)]
    for word, stores in (("emit", program.emits), ("sum", program.sums)):
        lines += [f"{word} {s.slot} {_index_text(s.index)}{names([s.value])}" for s in stores]
    return "\n".join(lines) + "\n"


def _index_text(index: Index) -> str:
    shape, affine = " ".join(map(str, index.shape)), index.affine()
    if affine is not None:
        return f"[{shape} | {affine[0]}{''.join(f' {s:+d}' for s in affine[1])}]"
    numbers = enumerate(index.array.reshape(-1).tolist())
    runs = [[v for _, v in run] for _, run in itertools.groupby(numbers, lambda at: at[1] - at[0])]
    shown = (f" {r[0]}..{r[-1]}" if r[2:] else "".join(f" {v}" for v in r) for r in runs)
    return f"[{shape} :{''.join(shown)}]"


_INT = r"-?[0-9]{1,10}"
_INDEX = re.compile(rf"\[((?:[0-9]{{1,10}} )+)(?:\| ({_INT})((?: [+-][0-9]{{1,10}})+)|:((?: {_INT}(?:\.\.{_INT})?)*))\]")
#: a name in quotes, an index, a comment, or anything else up to a blank
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\[\]]*\]|#.*|[^\s#]+')
_FORMS = {
    "leaf": "KIND SIZE TABLE", "const": "FLOAT SIZE", "map": "OP VALUES", "gather": "VALUES LIST LIST",
    "contract": "VALUE VALUE TABLE TABLE", "reduce": "FOLD VALUE TABLE",
}  # fmt: skip


def _index(text: str, axes: int) -> Index:
    """The index a text stands for; no array is made before it is known to be one's size."""
    found = _INDEX.fullmatch(text)
    shape = tuple(map(int, found[1].split())) if found else ()
    if not found or len(shape) != axes or math.prod(shape) >= 2**31:
        raise ValueError
    if found[2]:
        array = sum((int(s) * g for s, g in zip(found[3].split(), np.indices(shape, sparse=True), strict=True)), int(found[2]))
    else:
        runs = [range(int(a), int(b or a) + 1) for a, b in re.findall(r"(-?\d+)(?:\.\.(-?\d+))?", found[4])]
        if not all(runs) or sum(map(len, runs)) != math.prod(shape):
            raise ValueError
        array = np.fromiter(itertools.chain(*runs), int).reshape(shape)
    if np.abs(array).max(initial=0) >= 2**31:
        raise ValueError
    return Index(array)


class _Reader:
    """A text, read line by line, and the values its lines have made so far."""

    def __init__(self, text: str) -> None:
        lines = enumerate(([w for w in _TOKEN.findall(t) if w[0] != "#"] for t in text.split("\n")), 1)
        self.ahead = [(text.count("\n") + 1, list[str]()), *reversed([line for line in lines if line[1]])]
        self.values: dict[str, Value] = {}
        #: the capitals in the form of a line: what they are, of what pattern, and how they are read
        self.parts: dict[str, tuple[str, str, Callable[[str], Any]]] = {
            "NAME": ("a name in quotes", r'".*"', json.loads),
            "SIZE": ("a number", _INT, int),
            "SIZES": ("sizes", rf"-|{_INT}(,{_INT})*", lambda t: tuple(int(n) for n in t.split(",") if n != "-")),
            "FLOAT": ("a hexadecimal number", "-?(0x.*|inf|nan)", float.fromhex),
            "WORD": (f"one of {', '.join(_FORMS)}", "|".join(_FORMS), str),
            "KIND": ("state, stream or param", "state|stream|param", str),
            "FOLD": ("sum or max", "sum|max", str),
            "OP": ("an operation", ".*", OPS.__getitem__),
            "LIST": ("an index of one axis", ".*", lambda t: _index(t, 1)),
            "TABLE": ("an index of two axes", ".*", lambda t: _index(t, 2)),
            "VALUE": ("a value of a line above", ".*", self.values.__getitem__),
        }

    def next(self, place: int = 0) -> str:
        """A word of the next line, "" where there is none."""
        return "".join(self.ahead[-1][1][place : place + 1])

    def fail(self, wanted: str) -> ValueError:
        return ValueError(f"line {self.number}: expected {wanted}" + f", found {' '.join(self.words)}" * bool(self.words))

    def take(self, part: str) -> Any:
        if part == "VALUES":
            return tuple([self.take("VALUE") for word in self.words[:] if word[0] == "%"])
        wanted, pattern, read = self.parts.get(part, (part, re.escape(part), str))
        if self.words and re.fullmatch(pattern, self.words[0]):
            with contextlib.suppress(LookupError, ValueError, OverflowError):
                value = read(self.words[0])
                del self.words[0]
                return value
        raise self.fail(wanted)

    def line(self, form: str) -> list[Any]:
        """What the next line has in place of the capitals in its form."""
        self.number, self.words = self.ahead.pop()
        taken = [(part, self.take(part)) for part in form.split()]
        if self.words:
            raise self.fail("the end of the line")
        return [value for part, value in taken if part.isupper()]

    def value(self) -> Value:
        match self.line(f"%{len(self.values)} = WORD {_FORMS.get(self.next(2), '')}"):
            case ["leaf", kind, slot, index]:
                return ir.leaf(kind, slot, index)
            case ["const", number, size]:
                return ir.const(number, size)
            case ["reduce", fold, x, index]:
                return ir.reduce_(fold, x, index)
            case ["map", op, operands]:
                if len(operands) != op.arity or len({v.size for v in operands}) != 1:
                    raise self.fail(f"{op.arity} operands of one size")
                return ir.map_(op.name, *operands)
            case [word, *args, one, two]:
                with contextlib.suppress(IndexError, ValueError):
                    make: Callable[..., Value] = ir.gather if word == "gather" else ir.contract
                    made = make(*args, one.array, two.array)
                    if list(vars(made).values())[1 : len(args) + 3] == [*args, one, two]:  # the fields after the size
                        return made
        raise self.fail("sources and indices in their simplest form")


def parse_program(text: str) -> Program:
    """The program a text stands for. Raises ValueError that names the line and what was expected there."""
    r = _Reader(text)
    name, lanes = r.line("program NAME SIZE lanes")
    sizes = r.line("sizes " + " ".join(f"{slot} SIZES" for slot in _SLOTS))
    while r.next().startswith("%"):
        r.values[f"%{len(r.values)}"] = r.value()
    (state,) = r.line("state VALUES")
    (following,) = r.line("next VALUES")
    emits, sums = [], []
    while r.next() == "emit":
        emits.append(Store(*r.line("emit SIZE TABLE VALUE")))
    while r.next():
        sums.append(Store(*r.line("sum SIZE TABLE VALUE")))
    return Program(name, lanes, state, following, tuple(emits), tuple(sums), *sizes)
