"""A lane program's step as C statements, over tiles of lanes.

The lanes of a kernel are chunks × batch × lanes of the program. W of them share a hardware vector, U vectors a tile, and
tiles are shared out over threads. Scalar programs have the program's lanes innermost, where their numbers lie side by
side in memory; vector programs keep all lanes of a tile on one lane of the program, so that weights are broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.pack import ROWS, Packed, height, pack
from seqparc.codegen.schedule import Loop, Schedule, Target, TooIrregularError, runs
from seqparc.codegen.window import windows
from seqparc.ir import Program, Value
from seqparc.ops import OPS

Ints = NDArray[np.integer[Any]]

#: Row blocks of one contraction that are written out; more become a loop over rows.
MOST_BLOCKS = 8
#: Bytes of stack one thread may use.
STACK_LIMIT = 2_000_000


@dataclass
class Printer:
    """Prints one program, for a processor with so many vector registers."""

    program: Program
    double: bool
    plan: Schedule
    registers: int
    tables: dict[bytes, str] = field(default_factory=dict)
    declared: list[str] = field(default_factory=list)
    packed: list[Packed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scalar = all(v.size == 1 for v in ir.topological(self.program.outputs))
        self.groups: dict[tuple[str, int, object], int] = {}  # offset arrays: (kind, slot, how the lane enters)
        self.param_regs: dict[ir.Leaf, int] = {}
        self.windows = windows(self.program, self.scalar)
        # Vector programs: stream elements as arrays of the step, and emits kept until its end where they are written in rows.
        self.loads = {} if self.scalar else {v: i for i, v in enumerate(ir.leaves(self.program.outputs, "stream"))}
        self.kept: dict[int, list[tuple[int, int, str]]] = {}  # from which element on, how many, and where they lie
        if not self.scalar:
            lie = {v: f"n{i}" for i, v in enumerate(self.program.next)} | {v: f"a{n}" for v, n in self.plan.arrays.items()}
            for i, s in enumerate(self.program.emits):
                if side_by_side_in_memory(s.index.array):
                    self.kept[i] = runs(s.value, lie) or [(0, s.value.size, f"e{i}")]

    # -- addresses -----------------------------------------------------------------------------------------------------

    def table(self, array: Ints) -> str:
        key = array.astype(np.int32).tobytes()
        if key not in self.tables:
            name = f"T{len(self.tables)}"
            self.tables[key] = name
            numbers = ", ".join(map(str, array.reshape(-1).tolist()))
            self.declared.append(f"static const int32_t {name}[{array.size}] = {{{numbers}}};")
        return self.tables[key]

    def address(self, index: Ints, g: str = "g", i: str = "i") -> str:
        """Element index[g, i] as a C expression: affine where it is, a table where it is not."""
        found = ir.affine(index)
        if found is None:
            return f"{self.table(index)}[{g} * {index.shape[1]} + {i}]" if index.shape[1] > 1 else f"{self.table(index)}[{g}]"
        offset, (by_lane, by_element) = found
        terms = [str(offset)] if offset else []
        if by_lane:
            terms.append(f"{g}" if by_lane == 1 else f"{g} * {by_lane}")
        if by_element and index.shape[1] > 1:
            terms.append(i if by_element == 1 else f"{i} * {by_element}")
        return " + ".join(terms) or "0"

    def lane_group(self, kind: str, slot: int, index: Ints) -> tuple[int, int, str]:
        """Scalar programs: the offset array of a tensor access, the constant added to it, and its access mode."""
        found = ir.affine(index)
        how: object
        if found is None:
            how, offset, mode = self.table(index[:, 0]), 0, "ANY"
        else:
            offset, (stride, _) = found
            how, mode = stride, {0: "SAME", 1: "SIDE"}.get(stride, "ANY")
            if self.program.lanes == 1:
                how, mode = 0, "SAME"
        number = self.groups.setdefault((kind, slot, how), len(self.groups))
        return number, offset, mode

    # -- expressions ---------------------------------------------------------------------------------------------------

    def expression(self, value: Value, position: Ints, memo: dict[tuple[Value, bytes], str], out: list[str]) -> str:
        """The name of a local that holds elements `position[i]` of a value; statements that make it go to `out`."""
        key = (value, position.tobytes())
        if key in memo:
            return memo[key]
        name = f"v{len(memo)}"
        src = getattr(value, "src", None)
        comment = f"  // {src.label}" if src else ""
        if value in self.plan.arrays:
            text = self.read(self.array_name(value), position)
        else:
            match value:
                case ir.Const(value=number):
                    memo[key] = f"sp_set1({_number(number, self.double)})"
                    return memo[key]
                case ir.Leaf(kind="state"):
                    text = self.read(self.array_name(value), position)
                    if self.scalar:
                        memo[key] = text
                        return text
                case ir.Leaf(kind="stream", slot=slot, index=index):
                    if self.scalar:
                        group, offset, mode = self.lane_group("x", slot, index.array)
                        text = f"LOAD_{mode}(x{slot} + {offset} + k * x{slot}_t, o{group} + u * W, x{slot}_t)"
                        if f"x{slot}" in self.windows:
                            memo[key] = f"x{slot}_w[x{slot}_k + {offset}][u]"
                            return memo[key]
                    else:
                        memo[key] = self.read(self.array_name(value), position)
                        return memo[key]
                case ir.Leaf(kind="param"):
                    if self.scalar and self.program.lanes > 1:
                        number = self.param_regs.setdefault(value, len(self.param_regs))
                        memo[key] = f"p[{number}][u]"
                        return memo[key]
                    text = self.param(value, position)
                case ir.Map(op=op, operands=operands):
                    names = [self.expression(a, position, memo, out) for a in operands]
                    name = f"v{len(memo)}"
                    text = OPS[op].c.format(*map(self.use, names))
                case ir.Gather(sources=sources, which=which, index=index):
                    w = which.array[position]
                    if not (w == w[0]).all():
                        raise TooIrregularError("a gather that mixes sources element by element")
                    inner = (
                        self.expression(ir.const(0.0), np.zeros(1, np.int32), memo, out)
                        if w[0] < 0
                        else self.expression(sources[w[0]], index.array[position], memo, out)
                    )
                    memo[key] = inner
                    return inner
                case _:
                    raise TypeError(type(value).__name__)
        out.append(self.local(name, text) + comment)
        memo[key] = name
        return name

    def read(self, array: str, position: Ints) -> str:
        return f"{array}[{self.position(position)}][u]"

    def param(self, leaf: ir.Leaf, position: Ints) -> str:
        return f"sp_set1(p{leaf.slot}[{self.address(leaf.index.array[:, position])}])"

    def local(self, name: str, text: str) -> str:
        return f"vf {name}[U]; EACH({name}[u] = {text});"

    def use(self, name: str) -> str:
        return name if name.endswith((")", "]")) else f"{name}[u]"

    def position(self, position: Ints) -> str:
        return self.address(position[None], g="0")

    # -- statements ----------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The step."""
        lines: list[str] = []
        for part in self.plan.parts:
            match part:
                case Loop():
                    lines += self.loop(part)
                case ir.Contract():
                    lines += self.contract(part)
                case ir.Reduce():
                    lines += self.reduce(part)
        return lines

    def body(self, loop: Loop) -> list[str]:
        """What is done for one element of every target."""
        memo: dict[tuple[Value, bytes], str] = {}
        body: list[str] = []
        for t in loop.targets:
            if t.role == "emit" and t.number in self.kept and self.kept[t.number][0][2] != f"e{t.number}":
                continue  # written from where it lies
            name = self.use(self.expression_of(t, memo, body))
            body += self.store(t, name)
        return body

    def loop(self, loop: Loop) -> list[str]:
        body = self.body(loop)
        if not body:
            return []
        if loop.size == 1:
            lines = [line.replace("[i]", "[0]") for line in body]
            return lines if self.scalar else ["{", *("  " + line for line in lines), "}"]
        return [f"for (int64_t i = 0; i < {loop.size}; i++) {{", *("  " + line for line in body), "}"]

    def expression_of(self, t: Target, memo: dict[tuple[Value, bytes], str], body: list[str]) -> str:
        position = np.array(t.position, np.int32)
        number = self.plan.arrays.get(t.value) if t.role == "array" else None
        if number is not None and number == t.number:
            del self.plan.arrays[t.value]  # computed here, not read back
            name = self.expression(t.value, position, memo, body)
            self.plan.arrays[t.value] = number
            return name
        return self.expression(t.value, position, memo, body)

    def store(self, t: Target, name: str) -> list[str]:
        position = np.array(t.position, np.int32)
        at = self.position(position)
        match t.role:
            case "array":
                return [f"EACH(a{t.number}[{at}][u] = {name});"]
            case "next":
                return [f"EACH(n{t.number}[{at}][u] = {name});"]
            case "sum":
                return [f"if (out) EACH(c{t.number}[{at}][u] += KEEP({name}));"]
            case "emit":
                s = self.program.emits[t.number]
                index = s.index.array[:, position]
                if t.number in self.kept:
                    return [f"EACH(e{t.number}[{at}][u] = {name});"]
                if self.scalar:
                    group, offset, mode = self.lane_group("y", s.slot, index)
                    if f"y{s.slot}" in self.windows:
                        return [f"EACH(y{s.slot}_w[y{s.slot}_k + {offset}][u] = {name});"]
                    return [f"if (out && y{s.slot}) EACH(STORE_{mode}(y{s.slot} + {offset} + k * y{s.slot}_t, o{group} + u * W, {name}));"]
                at = f"y{s.slot} + ({self.address(index)}) + k * y{s.slot}_t"
                return [f"if (out && y{s.slot}) EACH(STORE_ANY({at}, y{s.slot}_o + u * W, {name}));"]

    def load_lines(self) -> list[str]:
        """Vector programs: everything the step reads of its streams."""
        lines = []
        for leaf, number in self.loads.items():
            at = f"x{leaf.slot} + ({self.address(leaf.index.array[:, :1])}) + k * x{leaf.slot}_t"
            if side_by_side_in_memory(leaf.index.array):
                lines.append(f"load_rows({at}, x{leaf.slot}_o, {leaf.size}, l{number});")
            else:
                one = f"x{leaf.slot} + ({self.address(leaf.index.array)}) + k * x{leaf.slot}_t"
                lines.append(f"for (int64_t i = 0; i < {leaf.size}; i++) EACH(l{number}[i][u] = sp_gather({one}, x{leaf.slot}_o + u * W));")
        return lines

    def store_lines(self) -> list[str]:
        """Vector programs: everything the step writes that lies side by side."""
        lines = []
        for i, lying in self.kept.items():
            s = self.program.emits[i]
            for first, count, name in lying:
                row = f"y{s.slot} + ({self.address(s.index.array[:, first : first + 1])}) + k * y{s.slot}_t"
                lines += [
                    f"if (out && y{s.slot} && full) store_rows({row}, y{s.slot}_o, {count}, {name});",
                    f"else if (out && y{s.slot}) for (int64_t i = 0; i < {count}; i++)",
                    f"  EACH(put_live({row} + i, y{s.slot}_o + u * W, ({name})[i][u], length + u * W, k));",
                ]
        return lines

    def array_name(self, value: Value) -> str:
        if value in self.plan.arrays:
            return f"a{self.plan.arrays[value]}"
        if value in self.loads:
            return f"l{self.loads[value]}"  # type: ignore[index]
        assert isinstance(value, ir.Leaf) and value.kind == "state"
        return f"s{self.program.state.index(value)}"

    def contract(self, v: ir.Contract) -> list[str]:
        out = self.plan.arrays[v]
        comment = f"  // {v.src.label}" if v.src else ""
        if not (isinstance(v.a, ir.Leaf) and v.a.kind == "param"):
            return self.contract_values(v, comment)
        blocks, weight = pack(v, lambda rows: height(rows, ROWS[self.registers]))
        if len(blocks) > MOST_BLOCKS:  # rows that all read something else: one loop over rows, addresses from a table
            blocks, weight = [], v.ia.array.reshape(-1)
        w = self.weight(v.a, weight)
        b = self.array_name(v.b)
        if not blocks:
            k = v.ia.shape[1]
            column = self.address(np.maximum(v.ib.array, 0), g="e", i="q")
            return [
                f"for (int64_t e = 0; e < {v.size}; e++) {{{comment}",
                "  vf acc[U]; EACH(acc[u] = sp_set1(0));",
                f"  const real* restrict row = {w} + e * {k};",
                f"  for (int64_t q = 0; q < {self.counts(v.ia.array)}; q++) EACH(acc[u] += row[q] * {b}[{column}][u]);",
                f"  EACH(a{out}[e][u] = acc[u]);",
                "}",
            ]
        lines = []
        for block in blocks:
            k, h = len(block.columns), block.height
            column = self.address(block.columns[None], g="0", i="q")
            lines += [
                f"for (int64_t r = 0; r < {block.rows}; r += {h}) {{{comment}",
                f"  const real* restrict row = {w} + {block.offset} + r * {k};",
                f"  vf acc[{h}][U]; UNROLL for (int j = 0; j < {h}; j++) EACH(acc[j][u] = sp_set1(0));",
                f"  for (int64_t q = 0; q < {k}; q++)",
                f"    UNROLL for (int j = 0; j < {h}; j++) EACH(acc[j][u] += row[q * {h} + j] * {b}[{column}][u]);",
                f"  UNROLL for (int j = 0; j < {h}; j++) EACH(a{out}[{block.first} + r + j][u] = acc[j][u]);",
                "}",
            ]
        return lines

    def weight(self, leaf: ir.Leaf, order: Ints) -> str:
        """Where the elements of a weight lie that are packed in some order, -1 for zero."""
        lanes = leaf.index.array[:1] if (leaf.index.array == leaf.index.array[:1]).all() else leaf.index.array
        packed = np.where(order[None] < 0, -1, lanes[:, np.maximum(order, 0)])
        self.packed.append(Packed(leaf.slot, ir.Index(packed)))
        name = f"w{len(self.packed) - 1}"
        return name if len(lanes) == 1 else f"{name} + g * {packed.shape[1]}"

    def contract_values(self, v: ir.Contract, comment: str) -> list[str]:
        """A product of two lane values."""
        out = self.plan.arrays[v]

        def operand(value: Value, index: Ints) -> str:
            at = self.address(np.maximum(index, 0), g="e", i="q")
            if isinstance(value, ir.Leaf) and value.kind == "param":
                lanes = value.index.array
                if self.program.lanes > 1:
                    raise TooIrregularError("a parameter as the second factor of a product in several lanes")
                return f"sp_set1(p{value.slot}[{self.address(lanes[:, np.maximum(index, 0).reshape(-1)].reshape(index.shape), 'e', 'q')}])"
            return f"{self.array_name(value)}[{at}][u]"

        counts = self.counts(v.ia.array)
        a, b = operand(v.a, v.ia.array), operand(v.b, v.ib.array)
        return [
            f"for (int64_t e = 0; e < {v.size}; e++) {{{comment}",
            "  vf acc[U]; EACH(acc[u] = sp_set1(0));",
            f"  for (int64_t q = 0; q < {counts}; q++) EACH(acc[u] += {a} * {b});",
            f"  EACH(a{out}[e][u] = acc[u]);",
            "}",
        ]

    def counts(self, index: Ints) -> str:
        """How many leading entries of row e are real; the rest must be -1."""
        live = index >= 0
        if live.all():
            return str(index.shape[1])
        if not (np.sort(~live, axis=1) == ~live).all():
            raise TooIrregularError("a sum with holes in it")
        return f"{self.table(live.sum(1).astype(np.int32))}[e]"

    def reduce(self, v: ir.Reduce) -> list[str]:
        out = self.plan.arrays[v]
        index = v.index.array
        counts = self.counts(index)
        x = f"{self.array_name(v.x)}[{self.address(np.maximum(index, 0), g='e', i='q')}][u]"
        step = f"acc[u] += {x}" if v.fold == "sum" else f"acc[u] = sp_max(acc[u], {x})"
        start = "0" if v.fold == "sum" else "-INFINITY"
        return [
            f"for (int64_t e = 0; e < {v.size}; e++) {{",
            f"  vf acc[U]; EACH(acc[u] = sp_set1({start}));",
            f"  for (int64_t q = 0; q < {counts}; q++) EACH({step});",
            f"  EACH(a{out}[e][u] = acc[u]);",
            "}",
        ]


def side_by_side_in_memory(index: Ints) -> bool:
    """Whether the elements of every lane lie one after the other in memory."""
    return index.shape[1] > 1 and bool((np.diff(index, axis=1) == 1).all())


def _number(value: float, double: bool) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return repr(value) if double else f"{float(np.float32(value))!r}f" if abs(value) < 3e38 else repr(value)
