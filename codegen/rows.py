"""A vector program for few lanes: one lane at a time, with its numbers side by side in vectors.

Where the lanes of a run do not fill a vector, a tile (see `seqparc.codegen.c`) leaves most of it empty. Here an elementwise loop goes from
vector to vector of elements, a product adds weights of W rows at once to its sums, and threads share out the lanes. What a step reads and
writes is copied from and to arrays that have room behind their numbers, so nothing else has to mind that those may not fill a vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqparc import ir
from seqparc.codegen.c import MOST_BLOCKS, STACK_LIMIT, Printer, side_by_side_in_memory
from seqparc.codegen.pack import WIDEST, Packed, pack, side_by_side
from seqparc.codegen.schedule import Loop, Target, TooIrregularError
from seqparc.codegen.skeleton import arguments, places_of, used

Ints = NDArray[np.integer[Any]]

#: How lines begin that are for all lanes at once; what is between goes from lane to lane.
PRODUCT = "product(U, "
#: Arrays by what they are for.
KINDS = {"array": "a", "next": "n", "sum": "c", "emit": "e"}


class RowPrinter(Printer):
    """Prints the step of a tile's printer, whose schedule and tables it shares."""

    def __init__(self, tile: Printer) -> None:
        super().__init__(tile.program, tile.double, tile.plan, tile.registers, tile.tables, tile.declared)
        self.held: dict[ir.Leaf, str] = {}  # parameters that loops read, as arrays

    # -- expressions ---------------------------------------------------------------------------------------------------

    def spread(self, rows: Ints) -> str:
        """A table of a position, or of one for each lane, filled up to whole vectors."""
        return self.table(np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % WIDEST)]))

    def array_name(self, value: ir.Value) -> str:
        if isinstance(value, ir.Leaf) and value.kind == "param" and value not in self.plan.arrays:
            return self.held.setdefault(value, f"q{len(self.held)}")
        return f"{super().array_name(value)}[u]"

    def read(self, array: str, position: Ints) -> str:
        match ir.affine(position):
            case first, (0,):
                return f"sp_set1({array}[{first}])"
            case first, (1,):
                return f"sp_load({array} + {first} + i)"
        return f"pick({array}, {self.spread(position)} + i)"

    def param(self, leaf: ir.Leaf, position: Ints) -> str:
        return self.read(self.array_name(leaf), position)

    def local(self, name: str, text: str) -> str:
        return f"const vf {name} = {text};"

    def use(self, name: str) -> str:
        return name

    # -- statements ----------------------------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> list[str]:
        body = self.body(loop)
        if not body:
            return []
        return _block(f"EVERY({loop.size})", body)

    def store(self, t: Target, name: str) -> list[str]:
        position, n = np.array(t.position, np.int32), len(t.position)
        if t.role == "emit" and t.number not in self.kept:
            s = self.program.emits[t.number]
            lanes = self.spread(s.index.array[:, position])
            at = f"{lanes} + g * {-(-n // WIDEST) * WIDEST}" if self.program.lanes > 1 else lanes
            return [f"if (out && y{s.slot}) put_apart(y{s.slot}_at[u] + k * y{s.slot}_t, {at}, {n}, i, {name});"]
        array = f"{KINDS[t.role]}{t.number}[u]"
        if t.role == "sum":
            name = f"{self.read(array, position)} + {name}"
        found, when = ir.affine(position), "if (out) " if t.role == "sum" else ""
        if found is None or (n > 1 and found[1] != (1,)):
            return [f"{when}put_apart({array}, {self.spread(position)}, {n}, i, {name});"]
        return [f"{when}place({array} + {found[0]}, {n}, i, {name});"]

    def load_lines(self) -> list[str]:
        """Everything the step reads of its streams."""
        lines = []
        for leaf, number in self.loads.items():
            lines += self.copied(leaf, f"x{leaf.slot}_at[u]", f" + k * x{leaf.slot}_t", f"l{number}[u]")
        return lines

    def copied(self, leaf: ir.Leaf, source: str, then: str, to: str) -> list[str]:
        """A leaf's elements from memory into an array."""
        if side_by_side_in_memory(leaf.index.array):
            return [f"copy_row({to}, {source} + ({self.address(leaf.index.array[:, :1])}){then}, {leaf.size});"]
        return [f"for (int64_t i = 0; i < {leaf.size}; i++) {to}[i] = {source}[{self.address(leaf.index.array)}{then}];"]

    def store_lines(self) -> list[str]:
        """Everything the step writes that lies side by side."""
        lines = []
        for i, lying in self.kept.items():
            s = self.program.emits[i]
            for first, count, name in lying:
                at = f"y{s.slot}_at[u] + ({self.address(s.index.array[:, first : first + 1])}) + k * y{s.slot}_t"
                array, _, offset = name.partition(" + ")
                lines.append(f"if (out && y{s.slot}) copy_row({at}, {array}[u] + {offset or 0}, {count});")
        return lines

    def contract(self, v: ir.Contract) -> list[str]:
        out, comment = self.array_name(v), f"  // {v.src.label}" if v.src else ""
        if not (isinstance(v.a, ir.Leaf) and v.a.kind == "param"):
            return self.fold(v, [(v.a, v.ia.array), (v.b, v.ib.array)])
        b, none = self.array_name(v.b), v.b.size  # behind the last number there is a zero
        blocks, order = pack(v, lambda rows: WIDEST)
        if len(blocks) > MOST_BLOCKS:
            w = self.weight(v.a, side_by_side(v.ia.array, WIDEST))
            at = self.table(side_by_side(np.where(v.ib.array < 0, none, v.ib.array), WIDEST, none))
            return [f"product_apart({w}, {b}, {at}, {v.ib.shape[1]}, {v.size}, {out});{comment}"]
        w, lines, to = self.weight(v.a, order), [], out.removesuffix("[u]")
        for block in blocks:
            found, k = ir.affine(block.columns), len(block.columns)
            first, at, step = (0, self.table(block.columns), 0) if found is None else (found[0], "0", found[1][0])
            given = f"{w} + {block.offset}, OF({b.removesuffix('[u]')}, {first}), {at}, {step}"
            lines.append(f"{PRODUCT}{given}, {k}, {block.rows}, OF({to}, {block.first}));{comment}")
        return lines

    def reduce(self, v: ir.Reduce) -> list[str]:
        return self.fold(v, [(v.x, v.index.array)], v.fold)

    def fold(self, v: ir.Value, factors: list[tuple[ir.Value, Ints]], fold: ir.Fold = "sum") -> list[str]:
        """out[e] = sum or largest over k of the product of factors at index[e, k]."""
        out, (size, k), largest = self.array_name(v), factors[0][1].shape, fold == "max"
        names = [self.array_name(x) for x, _ in factors]
        found = [None if (index < 0).any() else ir.affine(index) for _, index in factors]
        strides = [(None, None) if f is None else f[1] for f in found]
        if all(s in (0, 1) for s, _ in strides) and size > 1:
            read = [f"{name} + {self.address(index, 'e', 'q')}" for name, (_, index) in zip(names, factors, strict=True)]
            read = [f"sp_load({r})" if s else f"sp_set1(*({r}))" for r, (s, _) in zip(read, strides, strict=True)]
        elif all(s == 1 for _, s in strides):
            read = [f"{name} + {self.address(index[:, :1], 'e')}" for name, (_, index) in zip(names, factors, strict=True)]
            one = f"fold_row({read[0]}, {k}, {int(largest)})" if len(read) == 1 else f"dot_rows({read[0]}, {read[1]}, {k})"
            return [f"for (int64_t e = 0; e < {size}; e++) {out}[e] = {one};"]
        else:
            read = [f"pick({name}, {self.apart(x, index, largest)} + o)" for name, (x, index) in zip(names, factors, strict=True)]
        step = f"acc = sp_max(acc, {read[0]})" if largest else f"acc += {' * '.join(read)}"
        return _block(f"for (int64_t e = 0; e < {size}; e += W)", [
            f"vf acc = sp_set1({'-INFINITY' if largest else '0'});",
            f"for (int64_t q = 0, o = e / WIDEST * WIDEST * {k} + e % WIDEST; q < {k}; q++, o += WIDEST) {step};",
            f"place({out}, {size}, e, acc);",
        ])  # fmt: skip

    def apart(self, x: ir.Value, index: Ints, largest: bool) -> str:
        """A table of what every row reads, in the order of `product_apart`; for nothing a zero, or what the row has already read."""
        if largest and (index[:, 0] < 0).any():
            raise TooIrregularError("the largest of nothing")
        return self.table(side_by_side(np.where(index < 0, index[:, :1] if largest else x.size, index), WIDEST, 0))


def emit(tile: Printer) -> tuple[list[str], tuple[Packed, ...]]:
    """The function that runs a few lanes, and the weights in the order in which it reads them, which are its arguments in the place of the
    tile's. Raises TooIrregularError where there is no such function.
    """
    p, program = RowPrinter(tile), tile.program
    body = p.lines()
    states = [(f"s{i}", v.size) for i, v in enumerate(program.state)]
    sums = [(f"c{i}", s.value.size) for i, s in enumerate(program.sums)]
    arrays = [*states, *((f"m_{name}", n) for name, n in states), *((f"n{i}", v.size) for i, v in enumerate(program.next)), *sums]
    arrays += [*((f"a{number}", v.size) for v, number in p.plan.arrays.items()), *((f"l{i}", v.size) for v, i in p.loads.items())]
    arrays += [(name, count) for kept in p.kept.values() for _, count, name in kept if name.startswith("e")]
    stack = 32 * sum(n + WIDEST for _, n in (*arrays, *sums, *sums)) + 8 * sum(leaf.size for leaf in p.held)
    if stack > STACK_LIMIT:
        raise TooIrregularError(f"a few lanes need {stack} bytes of stack")
    step = [*p.load_lines(), *body, *p.store_lines()]
    for i, (s, n) in enumerate(states):
        step.append(f"EVERY({n}) sp_store({s}[u] + i, sp_load(n{i}[u] + i));")
        step.append(f"if (sizes) EVERY({n}) sp_store(m_{s}[u] + i, lately(sp_load(m_{s}[u] + i), sp_load({s}[u] + i), fade));")
    loop: list[str] = []
    for together, group in itertools.groupby(step, lambda line: line.startswith(PRODUCT)):
        lines = list(group)
        loop += lines if together else _block("EACH_LANE if (k < length[u])", lines)
    if sums:
        fold = [f"for (int64_t i = 0; i < {n}; i++) t_{c}[u][i] += {c}[u][i], {c}[u][i] = 0;" for c, n in sums]
        loop += _block("if (k % BRIEFLY == BRIEFLY - 1 || k == longest - 1) EACH_LANE", fold)
    tensors = [f"{kind}{slot}" for kind in "xy" for slot in used(program)[kind]]
    places = [(s, f"for (int64_t i = 0; i < {n}; i++)", p.address(index)) for (s, n), index in zip(states, places_of(program), strict=True)]
    main = [
        *arguments(p),
        *(f"HELD({name}, {leaf.size});" for leaf, name in p.held.items()),
        *(line for leaf, name in p.held.items() for line in p.copied(leaf, f"p{leaf.slot}", "", name)),
        *(f"ARRAY({name}, {n});" for name, n in arrays),
        *(f"double t_{c}[LANES][{n}]; __builtin_memset(t_{c}, 0, sizeof t_{c});" for c, n in sums),
        "int64_t c[LANES], b[LANES], begin[LANES], length[LANES];",
        *(f"real* {name}_at[LANES];" for name in tensors),
        "EACH_LANE c[u] = (first + u) / batch, b[u] = (first + u) % batch;",
        *(f"EACH_LANE {each} {s}[u][i] = start[c[u] * start_c + b[u] * row + {at}];" for s, each, at in places),
        *(f"EACH_LANE EVERY({n}) sp_store(m_{s}[u] + i, sp_abs(sp_load({s}[u] + i)));" for s, n in states),
        *_block("for (int out = leads == 0; out < 2; out++)", [
            "int64_t longest = 0;",
            *_block("EACH_LANE", [
                "const int64_t lead = out ? 0 : leads[c[u]]; begin[u] = t0[c[u]] - lead, length[u] = out ? len[c[u]] : lead;",
                "if (length[u] > longest) longest = length[u];",
                *(f"{name}_at[u] = {name} + b[u] * {name}_b + begin[u] * {name}_t;" for name in tensors),
            ]),
            *_block("for (int64_t k = 0; k < longest; k++)", loop),
            "real* const to = out ? end : reached;",
            *(f"EACH_LANE {each} to[(first + u) * row + {at}] = {s}[u][i];" for s, each, at in places),
        ]),
        *(f"if (sizes) EACH_LANE {each} sizes[(first + u) * row + {at}] = m_{s}[u][i];" for s, each, at in places),
    ]  # fmt: skip
    for (name, n), total in zip(sums, program.sums, strict=True):
        at = f"(first + u) * {program.sum_sizes[total.slot]} + {p.address(total.index.array)}"
        main.append(f"if (z{total.slot}) EACH_LANE for (int64_t i = 0; i < {n}; i++) z{total.slot}[{at}] = t_{name}[u][i];")
    head = "INLINE void few(const int64_t* args, const int64_t g, const int64_t first, const int U)"
    return ["// U lanes, each with its numbers side by side.", *_block(head, main)], tuple(p.packed)


def _block(head: str, lines: Iterable[str]) -> list[str]:
    return [f"{head} {{", *("  " + line for line in lines), "}"]
