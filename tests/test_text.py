"""Programs print, and parse back to the same."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqparc
from seqparc import ir, text
from seqparc.compiler import compile_plan
from seqparc.ir import Index, Program, Source, Store, Value
from seqparc.ops import OPS
from seqparc.passes import derivative, lanes
from seqparc.text import digest, parse_program, print_program
from seqparc.verify import verify
from tests.cells import CELLS

REAL = ("elementwise GRU", "GRU", "LSTM", "block GRU")


@functools.cache
def real_programs(name: str) -> dict[str, Program]:
    """The programs that are made of a cell on the way to its kernels, by name."""
    torch.manual_seed(0)
    cell, x = CELLS[name].make(), torch.randn(2, 3, CELLS[name].inputs)
    leaves, convention, start = seqparc.compile(cell).understand(x)
    plan = compile_plan(cell, convention, [v[:, 0] for v in leaves], start)
    lane = lanes.split_lanes(plan.core, plan.structure)
    made = {"core": plan.core, "lane": lane, "adjoint": derivative.adjoint(lane).program, "jacobian": derivative.jacobian(lane)}
    chosen = {"program": plan.program, "adjoint that runs": plan.adjoint().program, "jacobian that runs": plan.jacobian("forward", "exact")}
    return made | chosen | {f"{d} {u} that runs": plan.jacobian(d, u) for d in ("forward", "backward") for u in ("exact", "diagonal")}


@st.composite
def random_programs(draw: st.DrawFn) -> Program:
    """Sound programs over every kind of value; what is drawn is their form, their indices are random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 3))

    def spread(size: int, room: int) -> np.ndarray:
        """[lanes, size] numbers below `room`, none of them twice."""
        return rng.permutation(room)[: n * size].reshape(n, size)

    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    state = tuple(ir.leaf("state", slot, spread(size, n * size)) for slot, size in enumerate(widths))
    values: list[Value] = list(state)
    for kind in draw(st.lists(st.sampled_from(["leaf", "const", "map", "gather", "contract", "reduce"]), max_size=12)):
        x, y = (values[i] for i in rng.integers(len(values), size=2))
        size, depth = draw(st.integers(1, 5)), draw(st.integers(0, 3))
        match kind:
            case "leaf":
                values.append(ir.leaf(draw(st.sampled_from(["stream", "param"])), int(rng.integers(2)), rng.integers(6, size=(n, size))))
            case "const":
                values.append(ir.const(draw(st.floats()), size))
            case "map":
                op = OPS[draw(st.sampled_from(sorted(OPS)))]
                alike = [v for v in values if v.size == x.size]
                values.append(ir.map_(op.name, *(alike[i] for i in rng.integers(len(alike), size=op.arity))))
            case "gather":
                which = rng.integers(-1, 2, size)
                values.append(ir.gather([x, y], which, rng.integers(np.where(which == 1, y.size, x.size))))
            case "contract":
                values.append(ir.contract(x, y, rng.integers(-1, x.size, (size, depth)), rng.integers(-1, y.size, (size, depth))))
            case _:
                index = rng.integers(-1, x.size, (size, depth + 1))
                index[:, 0] = np.maximum(index[:, 0], 0)
                values.append(ir.reduce_(draw(st.sampled_from(["sum", "max"])), x, index))

    def stores() -> tuple[tuple[Store, ...], tuple[int, ...]]:
        chosen = [values[i] for i in rng.integers(len(values), size=draw(st.integers(0, 2)))]
        sizes = tuple(n * v.size + int(rng.integers(3)) for v in chosen)
        return tuple(Store(i, Index(spread(v.size, sizes[i])), v) for i, v in enumerate(chosen)), sizes

    (emits, emit_sizes), (sums, sum_sizes) = stores(), stores()
    return Program(
        name=draw(st.text(max_size=5)), lanes=n, state=state, emits=emits, sums=sums,
        next=tuple(ir.take(values[-1], rng.integers(-1, values[-1].size, v.size)) for v in state),
        state_sizes=tuple(n * v.size for v in state), stream_sizes=(6, 6), param_sizes=(6, 7), emit_sizes=emit_sizes, sum_sizes=sum_sizes,
    )  # fmt: skip


def reduced(x: Value, *index: list[int]) -> Program:
    """The sum over rows of x as a program."""
    value = ir.reduce_("sum", x, np.array(index))
    s = ir.leaf("state", 0, [range(value.size)])
    return Program("reduced", 1, (s,), (value,), state_sizes=(s.size,), stream_sizes=(9,))


def example() -> Program:
    """The program the notation is explained by, which has each kind of value."""
    s, w = ir.leaf("state", 0, [range(4)]), ir.leaf("param", 0, [range(16)])
    rest = ir.map_("sub", ir.const(1.0, 4), s, src=Source("/somewhere/cell.py", 7))
    picked = ir.gather([s, rest], [0, 0, 1, 1], range(4))
    product = ir.contract(w, picked, np.arange(16).reshape(4, 4), np.tile(np.arange(4), (4, 1)))
    following = ir.reduce_("max", product, [[0, 1], [2, 3], [2, -1], [3, -1]])
    store = Store(0, s.index, following)
    return Program("cell", 1, (s,), (following,), (store,), (), (4,), (12,), (16,), (4,), ())


def explained() -> str:
    """The example in the module's own words."""
    return "".join(line[4:] + "\n" for line in str(text.__doc__).splitlines() if line.startswith("    "))


@pytest.mark.parametrize("name", REAL)
def test_the_programs_of_real_cells_come_back(name: str) -> None:
    for found, program in real_programs(name).items():
        assert parse_program(print_program(program)) == program, found


def test_real_programs_are_told_apart() -> None:
    programs = [p for name in REAL for p in real_programs(name).values()]
    assert len({digest(p) for p in programs}) == len({print_program(p, comments=False) for p in programs}) > 12


@settings(max_examples=200, deadline=None)
@given(random_programs())
def test_random_programs_come_back(program: Program) -> None:
    verify(program)
    printed = print_program(program)
    again = parse_program(printed)
    assert again == program
    assert print_program(again) == printed


def test_the_notation_is_as_explained() -> None:
    program = example()
    assert print_program(program) == explained()
    assert parse_program(explained()) == program
    verify(program)


def test_values_come_back_as_the_same_objects() -> None:
    program = example()
    again = parse_program(print_program(program))
    assert all(a is b for a, b in zip(again.outputs, program.outputs, strict=True))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan])
def test_numbers_come_back_to_the_last_bit(value: float) -> None:
    program = reduced(ir.const(value, 1), [0])
    (again,) = ir.topological(parse_program(print_program(program)).next)[:1]
    assert isinstance(again, ir.Const)
    assert np.float64(again.value).tobytes() == np.float64(value).tobytes()


@pytest.mark.parametrize(
    ("index", "printed"),
    [
        ([[0, 1, 2], [3, 4, 5]], "[2 3 | 0 +3 +1]"),
        ([[8, 6], [5, 3]], "[2 2 | 8 -3 -2]"),
        ([[7]], "[1 1 | 7 +0 +0]"),
        ([[5, -1, -1]], "[1 3 : 5 -1 -1]"),  # as many numbers as an offset and strides, and as negative
        ([[5], [-1], [-1]], "[3 1 : 5 -1 -1]"),
        ([[-1, 0, 1, 2, 4, 4], [0, 1, 0, 1, 2, -1]], "[2 6 : -1..2 4 4 0 1 0..2 -1]"),
        ([[], []], "[2 0 :]"),
    ],
)
def test_indices(index: list[list[int]], printed: str) -> None:
    program = reduced(ir.leaf("stream", 0, [range(9)]), *index)
    assert f" {printed}\n" in print_program(program)
    assert parse_program(print_program(program)) == program


def test_an_affine_index_is_short_however_long() -> None:
    n = 300
    program = reduced(ir.leaf("stream", 0, [range(n)]), *np.tile(np.arange(n), (n, 1)).tolist())
    assert len(print_program(program)) < 400


def test_where_a_value_was_written_is_a_comment() -> None:
    program, printed = example(), print_program(example())
    assert "# cell.py:7\n" in printed and "somewhere" not in printed
    assert parse_program(re.sub("#.*", "", printed)) == parse_program(f"# a remark\n\n{printed}\n  # another") == program


@pytest.mark.parametrize("file", ["elsewhere.py", "with\na line.py", "", "#"])
def test_the_digest_leaves_out_where_a_value_was_written(file: str) -> None:
    program = reduced(ir.map_("neg", ir.leaf("stream", 0, [[1]])), [0])
    (old,) = (v for v in ir.topological(program.next) if isinstance(v, ir.Map))
    new = dataclasses.replace(old, src=Source(file, 3))
    following: Any = program.next[0]
    moved = dataclasses.replace(program, next=(dataclasses.replace(following, x=new),))
    assert digest(moved) == digest(program)
    assert print_program(moved) != print_program(program)
    assert parse_program(print_program(moved)) == program


def test_the_digest() -> None:
    program = example()
    assert re.fullmatch("[0-9a-f]{16}", digest(program))
    assert digest(program) == digest(parse_program(print_program(program)))
    assert digest(dataclasses.replace(program, notes=("said",))) == digest(program)
    assert digest(dataclasses.replace(program, sum_sizes=(1,))) != digest(program)


@pytest.mark.parametrize("name", ["", "a cell", 'of "quotes" \\', "# not a comment", "with\na line", "ß\u2028\x85"])
def test_any_name_comes_back(name: str) -> None:
    program = dataclasses.replace(example(), name=name)
    assert parse_program(print_program(program)) == program


#: what is changed in the example, the line that is then wrong, and what was expected there
MALFORMED = [
    ("program ", "", 1, "program"),
    ('"cell"', "cell", 1, "a name in quotes"),
    ('"cell"', r'"\cell"', 1, "a name in quotes"),
    ("1 lanes", "one lanes", 1, "a number"),
    ("1 lanes", "1_0 lanes", 1, "a number"),
    ("1 lanes", "1 lanes 2", 1, "the end of the line"),
    ("1 lanes", "1", 1, "lanes"),
    ("sizes", "size", 2, "sizes"),
    ("sum -", "sum", 2, "sizes"),
    ("emit 4 sum", "emit 4,x sum", 2, "sizes"),
    ("emit 4 sum", "sum", 2, "emit"),
    ("leaf state", "leaf states", 3, "state, stream or param"),
    ("leaf state 0", "leaf state", 3, "a number"),
    ("leaf state", "loaf state", 3, "one of leaf, const"),
    ("[1 4 | 0 +0 +1]\n%1", "[4 | 0 +1]\n%1", 3, "an index of two axes"),
    ("[1 4 | 0 +0 +1]\n%1", "[1 4 | 0 +0]\n%1", 3, "an index of two axes"),
    ("[1 4 | 0 +0 +1]\n%1", "[1 4 | 0 +0 +9999999999]\n%1", 3, "an index of two axes"),
    ("[1 4 | 0 +0 +1]\n%1", "[99999 99999 | 0 +0 +1]\n%1", 3, "an index of two axes"),
    ("[1 4 | 0 +0 +1]\n%1", "[1 4 | 0 +0 +1\n%1", 3, "an index of two axes"),
    ("[1 4 | 0 +0 +1]\n%1", "[1 4 | 0 +0 +1]]\n%1", 3, "the end of the line"),
    ("%2 = const", "%1 = const", 5, "%2"),
    ("%2 = const", "%2 const", 5, "="),
    ("0x1.0000000000000p+0", "10", 5, "a hexadecimal number"),
    ("0x1.0000000000000p+0", "0x1.0p+9999", 5, "a hexadecimal number"),
    ("0x1.0000000000000p+0", "__import__('os')", 5, "a hexadecimal number"),
    ("sub %2 %0", "subtract %2 %0", 6, "an operation"),
    ("sub %2 %0", "sub %2", 6, "2 operands of one size"),
    ("sub %2 %0", "sub %2 %0 %0", 6, "2 operands of one size"),
    ("p+0 4", "p+0 3", 6, "2 operands of one size"),
    ("sub %2 %0", "sub %2 %9", 6, "a value of a line above"),
    ("sub %2 %0", "sub %2 %3", 6, "a value of a line above"),
    ("[4 : 0 0 1 1]", "[4 : 0 0 1]", 7, "an index of one axis"),
    ("[4 : 0 0 1 1]", "[4 : 3..1 0 0 1 1]", 7, "an index of one axis"),
    ("[4 : 0 0 1 1]", "[4 : 0 0 2 1]", 7, "sources and indices in their simplest form"),
    ("[4 : 0 0 1 1]", "[4 | 0 +0]", 7, "sources and indices in their simplest form"),
    ("[4 : 0 0 1 1]", "[3 : 0 0 1]", 7, "sources and indices in their simplest form"),
    ("gather %0 %3", "gather", 7, "sources and indices in their simplest form"),
    ("contract %1 %4", "contract %1", 8, "a value of a line above"),
    ("[4 4 | 0 +4 +1] [4 4 | 0 +0 +1]", "[4 4 | 0 +4 +1]", 8, "an index of two axes"),
    ("[4 4 | 0 +4 +1] [4 4 | 0 +0 +1]", "[4 4 | 0 +4 +1] [4 3 | 0 +0 +1]", 8, "sources and indices in their simplest form"),
    ("[4 4 | 0 +4 +1] [4 4 | 0 +0 +1]", "[4 4 | -1 +4 +1] [4 4 | 0 +0 +1]", 8, "sources and indices in their simplest form"),
    ("reduce max", "reduce min", 9, "sum or max"),
    ("state %0\n", "", 10, "state"),
    ("state %0\n", "state 0\n", 10, "the end of the line"),
    ("next %6", "next %7", 11, "a value of a line above"),
    ("emit 0 ", "emit ", 12, "a number"),
    ("emit 0 ", "omit 0 ", 12, "sum"),
    ("+1] %6\n", "+1]\n", 12, "a value of a line above"),
    ("next %6\nemit 0 [1 4 | 0 +0 +1] %6\n", "", 11, "next"),
]


@pytest.mark.parametrize(("old", "new", "line", "expected"), MALFORMED)
def test_a_malformed_text_is_told_where_and_what(old: str, new: str, line: int, expected: str) -> None:
    assert explained().count(old) >= 1
    with pytest.raises(ValueError, match=rf"^line {line}: expected {re.escape(expected)}"):
        parse_program(explained().replace(old, new, 1))


@pytest.mark.parametrize("words", ["", "\n\n", "# nothing\n"])
def test_no_text_is_no_program(words: str) -> None:
    with pytest.raises(ValueError, match=r"line \d: expected program"):
        parse_program(words)


@settings(max_examples=300, deadline=None)
@given(random_programs(), st.data())
def test_a_spoilt_text_is_refused_in_words(program: Program, data: Any) -> None:
    """One token lost, doubled or moved gives another program or a message, never another error."""
    tokens = re.findall(r"\w+|\s|[^\w\s]", print_program(program))
    i, j = (data.draw(st.integers(0, len(tokens) - 1)) for _ in range(2))
    match data.draw(st.sampled_from(["lost", "doubled", "swapped"])):
        case "lost":
            del tokens[i]
        case "doubled":
            tokens.insert(i, tokens[i])
        case _:
            tokens[i], tokens[j] = tokens[j], tokens[i]
    try:
        again = parse_program("".join(tokens))
    except ValueError as error:
        assert re.match(r"line \d+: expected .", str(error))
    else:
        assert parse_program(print_program(again)) == again


def test_a_value_of_no_known_kind_has_no_text() -> None:
    program = reduced(ir.const(1.0), [0])
    with pytest.raises(TypeError, match="Value has no text"):
        print_program(dataclasses.replace(program, next=(Value(1),)))
