"""A lane program as C: one function that runs every chunk of every lane over its stretch of time.

The generated text is meant to be read: see `CKernel.source`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from seqparc import ir
from seqparc.codegen import rows, skeleton
from seqparc.codegen.c import STACK_LIMIT, Printer
from seqparc.codegen.pack import ROWS, Packed
from seqparc.codegen.schedule import TooIrregularError, schedule
from seqparc.ir import Program

#: Files that are pasted into kernels, in place of their names. (importlib.resources would take ten milliseconds to find them.)
HEADERS = {name: Path(__file__).with_name(name) for name in ("simd.h", "rows.h")}
#: Operations of a scalar program from which on the code for a second vector per tile is not worth compiling.
MUCH_CODE = 130


@dataclass(frozen=True)
class CSource:
    """What `emit` gives: the source and how its arguments are laid out."""

    text: str
    packed: tuple[Packed, ...]
    few: tuple[Packed, ...] | None  # packed for few lanes, if there is a way of running of its own for them
    scalar: bool
    parts: tuple[int, ...]  # what can be compiled apart, by -DPART=: the tiles of so many vectors


def emit(program: Program, double: bool, registers: int = 16, team: int | None = None) -> CSource:
    """The C source of a program, for a processor with so many vector registers.

    team: threads for which few lanes are grouped, if not as many as there are: compilers may round groups of other sizes otherwise.
    """
    p = Printer(program, double, schedule(program, by_element=True), registers)
    return _assemble(p, p.lines(), team)


def _assemble(p: Printer, body: list[str], team: int | None) -> CSource:
    width = _width(p)
    parts = (1,) if width == 1 else (width, 1)
    arrays = [(f"a{number}", v.size + ROWS[p.registers]) for v, number in p.plan.arrays.items()]
    arrays += [(f"l{number}", v.size) for v, number in p.loads.items()]
    arrays += [(name, count) for kept in p.kept.values() for _, count, name in kept if name.startswith("e")]
    following = [(f"n{i}", v.size) for i, v in enumerate(p.program.next)]
    states = [(f"s{i}", v.size) for i, v in enumerate(p.program.state)]
    sums = [(f"c{i}", s.value.size) for i, s in enumerate(p.program.sums)]
    stack = sum(n for _, n in (*arrays, *following, *states, *sums, *sums, *sums)) * width * 64
    if stack > STACK_LIMIT:
        raise TooIrregularError(f"a tile needs {stack} bytes of stack")
    lane, packed = None, None
    if not p.scalar:
        with contextlib.suppress(TooIrregularError):
            lane, packed = rows.emit(p)
    text = skeleton.render(p, body, arrays, following, states, sums, parts, lane, team)
    for name, path in HEADERS.items():
        text = text.replace(f"@{name}@", path.read_text("utf-8"))
    return CSource(text, tuple(p.packed), packed, p.scalar, parts)


def _width(p: Printer) -> int:
    """Vectors per tile: as many as hide the latency of a step's chain of operations; one where that would be much code."""
    if not p.scalar:
        return 2
    operations = sum(not isinstance(v, ir.Leaf) for v in ir.topological(p.program.outputs))
    return 1 if operations > MUCH_CODE else 4 if p.program.n <= 2 else 2
