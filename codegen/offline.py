"""What the GPU kernels of a plan use and what limits them, found out with no GPU: generated, compiled for a named card, and read back."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from seqparc import ir
from seqparc.codegen.device import load
from seqparc.codegen.elements import WARPS
from seqparc.codegen.elements import emit as emit_parts
from seqparc.codegen.gpulaunch import must_fit, tile_of
from seqparc.codegen.launcher import OPTIONS
from seqparc.codegen.parts import split
from seqparc.codegen.resources import Loop, Resources, Target, bound, check, compile_for, find_target, measure, occupancy
from seqparc.codegen.schedule import TooIrregularError
from seqparc.codegen.sweep import TritonSource, emit
from seqparc.codegen.tiles import padded
from seqparc.errors import ToolchainError
from seqparc.ir import Program
from seqparc.plan import Plan

#: The pass that does most: every chunk, with a stretch before it, telling how large the state was, and writing all it can.
WHOLE = {"LEAD": True, "SIZES": True, "FINISH": False}
#: Pointers that the first pass is not given.
LATER = ("active", "first", "marks")

#: Bytes of a thread's store to memory, by the instruction; first match wins.
_STORES = (
    (r"STG\.(.*\.)?128(\..*)?|(global|buffer|flat)_store_(dwordx4|b128)", 16),
    (r"(global|buffer|flat)_store_(dwordx3|b96)", 12),
    (r"STG\.(.*\.)?64(\..*)?|(global|buffer|flat)_store_(dwordx2|b64)", 8),
    (r"STG(\..*)?|(global|buffer|flat)_store_(dword|b32)", 4),
)


@dataclass(frozen=True)
class KernelReport:
    """What one kernel uses on a card. "Per step" is of one thread in the time loop; an element is one state number of one sample."""

    name: str
    kernel: str  # its function's name
    target: str
    card: str
    dtype: str
    source: str
    block: int  # lanes of a program
    warps: int  # of a program
    registers: int  # per thread
    spills: int  # bytes per thread
    shared: int  # bytes per program
    resident_warps: int  # on a multiprocessor at once
    most_warps: int
    steps_per_pass: float  # of the time loop as it stands in machine code
    instructions_per_step: dict[str, float]  # by kind
    bytes_per_element: float  # that a step moves from and to memory
    limit: str  # the unit that takes longest
    seconds_per_element: float  # that it takes for a step, with the whole card at work
    problems: tuple[str, ...]  # what stands against launching it
    why: str = ""  # it is only part of a step

    def lines(self) -> list[str]:
        """The report in words."""
        whole = "once a step" if self.why else f"time loop: {self.steps_per_pass:g} step{'s' * (self.steps_per_pass != 1)} a pass"
        what = "elements" if self.why else "lanes"
        counts = ", ".join(f"{kind} {n:.4g}" for kind, n in self.instructions_per_step.items() if n)
        return [
            *([self.why] if self.why else []),
            f"{self.registers} registers a thread, {self.spills} bytes spilled; {self.shared} bytes of shared memory a program",
            f"programs of {self.block} {what} on {self.warps} warps; {self.resident_warps} of {self.most_warps} warps resident",
            f"{whole}; instructions of a thread per step: {counts}",
            f"{self.bytes_per_element:.4g} bytes moved per state element and step",
            f"bound: {self.limit}, at least {self.seconds_per_element * 1e12:.3g} ps per state element and step on {self.card}",
            *(f"it {problem}" for problem in self.problems),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything in it, of plain types."""
        return {**asdict(self), "problems": list(self.problems)}


def programs(plan: Plan) -> dict[str, Program]:
    """The programs of a plan that become kernels, by direction; a cell with a gradient of its own has that compiled apart."""
    inner = [stage.plan for stage in plan.stages if stage.plan is not None] if plan.stages else [plan]
    found = {}
    for k, part in enumerate(inner, 1):
        suffix = f" {k}" if k > 1 else ""
        found["forward" + suffix] = part.program
        if not plan.own_gradient:
            found["backward" + suffix] = part.adjoint().program
    return found


def inspect(program: Program, dtype: torch.dtype, target: str | Target, precision: str = "ieee") -> list[KernelReport]:
    """Generate a program's kernels, compile them for a card and read what they use: one for the whole time loop, or where that is not
    to be had those between the products of a step.

    Raises ToolchainError if there is no Triton, if it cannot compile a kernel, or if the program has none.
    """
    card, double = find_target(target), dtype is torch.float64
    try:
        try:
            source = emit(program, double, precision)
            must_fit(source, double, card.shared_per_block)
        except TooIrregularError as error:
            return _inspect_parts(program, card, double, str(error))
    except ValueError as error:  # TooIrregularError among them
        raise ToolchainError(f"{program.name} has no Triton kernel, and runs on the torch backend: {error}") from error
    block, warps = tile_of(source)
    constants = {name: value for name, value in (WHOLE | {"BLOCK": block} | dict.fromkeys(LATER)).items() if name in source.signature}
    used = _compiled(load(source.text).sweep, source.signature, constants, card, warps)
    loop, steps = time_loop(used, source, block, warps * card.warp, 8 if double else 4)
    moved = traffic(program, 8 if double else 4)
    elements = steps * block * program.n / (warps * card.warp)
    return [_report(program.name, "sweep", source.text, card, double, block, warps, used, loop.instructions, steps, elements, moved)]


def _inspect_parts(program: Program, card: Target, double: bool, why: str) -> list[KernelReport]:
    """The kernels of a step that the host walks through."""
    parts = split(program)
    source = emit_parts(program, parts.plan, parts.places, double)
    module = load(source.text)
    reports = []
    for part in source.parts:
        rows, columns = part.tile
        constants = {"OUT": True, "SIZES": True, "ROWS": rows, "COLUMNS": columns}
        used = _compiled(getattr(module, part.name), part.signature, constants, card, WARPS)
        share = program.n * program.lanes * rows / (part.across * WARPS * card.warp)
        moved = part.moved * (8 if double else 4) / (program.n * program.lanes)
        counts = used.instructions
        made = _report(program.name, part.name, source.text, card, double, rows * columns, WARPS, used, counts, 1.0, share, moved)
        reports.append(replace(made, why=f"step by step from the host, with library products between kernels: {why}"))
    return reports


def _compiled(function: Any, signature: dict[str, str], constants: dict[str, Any], card: Target, warps: int) -> Resources:
    kinds = {name: kind for name, kind in signature.items() if name not in constants}
    return measure(compile_for(function, kinds, constants, card, warps, OPTIONS), card)


def _report(
    name: str, kernel: str, source: str, card: Target, double: bool, block: int, warps: int, used: Resources, counts: dict[str, int],
    steps: float, elements: float, moved: float,
) -> KernelReport:  # fmt: skip
    """`counts`: instructions of a thread that advance so many of its elements by so many steps."""
    limit, seconds = bound(counts, elements, moved, card, double)
    return KernelReport(
        name=name, kernel=kernel, target=card.name, card=card.card, dtype="float64" if double else "float32", source=source,
        block=block, warps=warps, registers=used.registers, spills=used.spills, shared=used.shared,
        resident_warps=occupancy(used, card, warps), most_warps=card.warps_per_multiprocessor, steps_per_pass=steps,
        instructions_per_step={kind: n / steps for kind, n in counts.items()},
        bytes_per_element=moved, limit=limit, seconds_per_element=seconds, problems=tuple(check(used, card, warps)),
    )  # fmt: skip


def time_loop(used: Resources, source: TritonSource, block: int, threads: int, item: int) -> tuple[Loop, float]:
    """The loop over a chunk's steps, and how many steps a pass of it makes.

    It is the one that writes; and as compilers unroll, steps are told by how many bytes a thread writes there. A thread writes
    its share of a tile, and of a tile with fewer elements than there are threads one element all the same.
    """
    if not used.loops:
        raise ToolchainError(f"{source.step.program.name}: no loop is to be found in the machine code")
    each = [block * (1 if source.scalar else padded(w.hi - w.lo)) for w in source.step.results if w.role == "emit"]
    share = item * sum(max(1, elements // threads) for elements in each)
    loop = max(used.loops, key=_stored)  # the hottest of those that write as much
    written = _stored(loop)
    return (loop, written / share) if share and written else (used.loops[0], float(source.ahead))


def _stored(loop: Loop) -> int:
    """Bytes that a thread writes to memory in one pass."""

    def size(opcode: str) -> int:
        return next((n for pattern, n in _STORES if re.fullmatch(pattern, opcode)), 0)

    return sum(n * size(opcode) for opcode, n in loop.opcodes.items())


def traffic(program: Program, item: int) -> float:
    """Bytes per state element that a step has to move: every stream element that is read, once, and every emit."""
    read: dict[int, list[np.ndarray]] = {}
    for leaf in ir.leaves(program.outputs):
        if leaf.kind == "stream":
            read.setdefault(leaf.slot, []).append(leaf.index.array.reshape(-1))
    streams = sum(len(np.unique(np.concatenate(parts))) for parts in read.values())
    emits = sum(store.index.array.size for store in program.emits)
    return item * (streams + emits) / (program.lanes * program.n)
