"""Every rule of the IR's grammar is broken once, and each breach is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from seqparc import ir
from seqparc.errors import InternalError
from seqparc.ir import Const, Contract, Gather, Index, Leaf, Map, Program, Reduce, Store, Value
from seqparc.text import print_program
from seqparc.verify import verify
from tests.cells import CELLS
from tests.test_text import real_programs


def sound() -> Program:
    """Two lanes, two state slots, every kind of value, an emit and a sum."""
    h, c = ir.leaf("state", 0, [[0, 2], [1, 3]]), ir.leaf("state", 1, [[0], [1]])
    x, w = ir.leaf("stream", 0, [[0, 1, 2], [3, 4, 5]]), ir.leaf("param", 0, np.arange(6)[None].repeat(2, 0))
    picked = ir.gather([h, c, ir.const(2.0)], [0, 1, 2, -1], [1, 0, 0, -1])
    product = ir.contract(w, picked, [[0, 1, -1], [2, 3, 5]], [[0, 1, -1], [2, 3, 3]])
    following = ir.map_("mul", ir.map_("tanh", product), h)
    largest = ir.reduce_("max", x, [[0, 1, -1]])
    total = ir.reduce_("sum", ir.map_("add", x, ir.const(0.5, 3)), [[0, 1, 2]])
    return Program(
        name="sound", lanes=2, state=(h, c), next=(following, largest),
        emits=(Store(0, Index([[0, 2], [1, 3]]), following), Store(1, Index([[1], [0]]), total)),
        sums=(Store(0, Index([[0], [1]]), total),),
        state_sizes=(4, 2), stream_sizes=(6,), param_sizes=(6,), emit_sizes=(4, 2), sum_sizes=(2,),
    )  # fmt: skip


def broken(kind: type[Value], **changes: Any) -> Program:
    """The sound program with other facts in the first value of a kind, made past the helpers that keep values sound.

    A change may be a function of the value's own fact.
    """
    program = sound()
    order = ir.topological((*program.state, *program.outputs))
    old = next(v for v in order if type(v) is kind)
    new = replace(old, **{k: c(getattr(old, k)) if callable(c) else c for k, c in changes.items()})
    return exchanged(program, old, new)


def exchanged(program: Program, old: Value, new: Value) -> Program:
    """A program with one value in place of another, and nothing else put right."""
    done: dict[Value, Value] = {}
    for v in ir.topological((*program.state, *program.outputs)):
        match v:
            case _ if v is old:
                done[v] = new
            case Map(operands=operands):
                done[v] = replace(v, operands=tuple(done[a] for a in operands))
            case Gather(sources=sources):
                done[v] = replace(v, sources=tuple(done[a] for a in sources))
            case Contract(a=a, b=b):
                done[v] = replace(v, a=done[a], b=done[b])
            case Reduce(x=x):
                done[v] = replace(v, x=done[x])
            case _:
                done[v] = v

    def stores(items: tuple[Store, ...]) -> tuple[Store, ...]:
        return tuple(replace(s, value=done[s.value]) for s in items)

    state: Any = tuple(done[v] for v in program.state)
    following = tuple(done[v] for v in program.next)
    return replace(program, state=state, next=following, emits=stores(program.emits), sums=stores(program.sums))


def at(place: Any, number: int) -> Callable[[Index], Index]:
    """An index with another number in one place."""

    def change(index: Index) -> Index:
        array = index.array.copy()
        array[place] = number
        return Index(array)

    return change


def stored(emits: bool, i: int, **changes: Any) -> Program:
    """The sound program with other facts in one of its stores."""
    program = sound()
    stores = list(program.emits if emits else program.sums)
    stores[i] = replace(stores[i], **{k: c(getattr(stores[i], k)) if callable(c) else c for k, c in changes.items()})
    return replace(program, emits=tuple(stores)) if emits else replace(program, sums=tuple(stores))


def stream(**changes: Any) -> Program:
    """The sound program with other facts in its stream leaf."""
    program = sound()
    (old,) = ir.leaves(program.outputs, "stream")
    return exchanged(program, old, replace(old, **changes))


@dataclass(frozen=True, eq=False)
class Strange(Value):
    """A kind of value no pass knows."""


def with_strange() -> Program:
    program = sound()
    return exchanged(program, ir.topological(program.next[:1])[-1], Strange(2))


def with_another_state_leaf() -> Program:
    """An equal leaf is not the same leaf."""
    program = sound()
    return replace(program, next=(replace(program.state[0]), program.next[1]))


def with_map_as_state() -> Program:
    program = sound()
    made: Any = ir.map_("neg", program.state[0])
    return replace(program, state=(made, *program.state))


def with_state(*leaves: Leaf, **changes: Any) -> Program:
    """Nothing but states that stay."""
    sizes: Any = {"state_sizes": (4,)} | changes
    return Program("states", 2, leaves, leaves, **sizes)


A, B = ir.leaf("state", 0, [[0], [1]]), ir.leaf("state", 0, [[2], [3]])
OTHER = ir.leaf("state", 0, [[2], [1]])

#: what is broken: the program, and what is said of it
BREACHES: dict[str, tuple[Callable[[], Program], str]] = {
    "no lanes": (lambda: replace(sound(), lanes=0), "the program has no lanes"),
    "an empty value": (lambda: broken(Const, size=0), "%N (const) is of size 0"),
    "a kind of value": (with_strange, "%N (strange) is of no kind the grammar knows"),
    # leaves
    "a leaf's kind": (lambda: stream(kind="river"), "%N (leaf) reads tensors of the kind 'river'"),
    "a leaf's slot": (lambda: stream(slot=1), "%N (leaf) reads stream 1 of 1"),
    "a leaf's negative slot": (lambda: stream(slot=-1), "%N (leaf) reads stream -1 of 1"),
    "a leaf's lanes": (lambda: stream(index=Index([[0, 1, 2]])), "%N (leaf) has an index of shape (1, 3) for 2 lanes of size 3"),
    "a leaf's size": (lambda: stream(index=Index([[0], [1]])), "%N (leaf) has an index of shape (2, 1) for 2 lanes of size 3"),
    "a leaf's axes": (lambda: stream(index=Index([0, 1, 2])), "%N (leaf) has an index of shape (3,)"),
    "a leaf beyond its tensor": (
        lambda: stream(index=Index([[0, 1, 2], [3, 4, 6]])), "%N (leaf) has numbers 0 … 6 for 6 elements of stream 0"),
    "a leaf before its tensor": (
        lambda: stream(index=Index([[0, 1, 2], [3, 4, -1]])), "%N (leaf) has numbers -1 … 4 for 6 elements of stream 0"),
    "a parameter that is smaller": (lambda: replace(sound(), param_sizes=(5,)), "%N (leaf) has numbers 0 … 5 for 5 elements of param 0"),
    "a stream that is not there": (lambda: replace(sound(), stream_sizes=()), "%N (leaf) reads stream 0 of 0"),
    "a leaf that is none of the state": (with_another_state_leaf, "%N (leaf) is none of the program's state leaves"),
    # constants
    "a constant that is no float": (lambda: broken(Const, value=2), "%N (const) holds 2, which is no float"),
    "a constant's size in a gather": (lambda: broken(Const, size=3), "%N (gather) picks from a constant of size 3, not 1"),
    "a constant's size in a map": (
        lambda: exchanged(sound(), ir.const(0.5, 3), Const(2, 0.5)), "%N (add) of size 3 has operands of sizes [3, 2]"),
    # maps
    "an unknown operation": (lambda: broken(Map, op="frobnicate"), "%N (frobnicate) is not in the operation table"),
    "an operation's arity": (lambda: broken(Map, op="add"), "%N (add) has 1 operands, not 2"),
    "an operation's second operand": (lambda: broken(Map, operands=lambda o: o * 2), "%N (tanh) has 2 operands, not 1"),
    "a map's size": (lambda: broken(Map, size=3), "%N (tanh) of size 3 has operands of sizes [2]"),
    # gathers
    "a gather's size": (lambda: broken(Gather, size=5), "%N (gather) of size 5 has indices of shapes (4,) and (4,)"),
    "a gather's indices": (lambda: broken(Gather, index=Index([1, 0, 0])), "%N (gather) of size 4 has indices of shapes (4,) and (3,)"),
    "a gather's axes": (
        lambda: broken(Gather, which=Index([[0, 1, 2, -1]]), index=Index([[1, 0, 0, -1]])), "%N (gather) of size 4 has indices of shapes"),
    "a gather's sources": (lambda: broken(Gather, which=at(0, 3)), "%N (gather) has numbers -1 … 3 for 3 sources"),
    "a gather before its sources": (lambda: broken(Gather, which=at(3, -2)), "%N (gather) has numbers -2 … 2 for 3 sources"),
    "a gather beyond its source": (lambda: broken(Gather, index=at(0, 2)), "%N (gather) has numbers 2 … 2 for 2 elements of source 0"),
    "a gather's missing element": (lambda: broken(Gather, index=at(0, -1)), "%N (gather) has elements of no source, or a source without"),
    "a gather's element of no source": (lambda: broken(Gather, index=at(3, 0)), "%N (gather) has elements of no source, or"),
    "a gather's unused source": (lambda: broken(Gather, sources=lambda s: (*s, s[0])), "%N (gather) reads nothing of its source 3"),
    # contractions
    "a contraction's size": (lambda: broken(Contract, size=3), "%N (contract) of size 3 has indices of shapes (2, 3) and (2, 3)"),
    "a contraction's indices": (
        lambda: broken(Contract, ib=Index([[0, 1], [2, 3]])), "%N (contract) of size 2 has indices of shapes (2, 3) and (2, 2)"),
    "a contraction's axes": (
        lambda: broken(Contract, ia=Index([0, 1]), ib=Index([0, 1])), "%N (contract) of size 2 has indices of shapes (2,) and (2,)"),
    "a contraction beyond its first factor": (
        lambda: broken(Contract, ia=at((1, 0), 6)), "%N (contract) has numbers -1 … 6 for 6 elements of its first factor"),
    "a contraction beyond its second factor": (
        lambda: broken(Contract, ib=at((1, 0), 4)), "%N (contract) has numbers -1 … 4 for 4 elements of its second factor"),
    "a contraction before its factors": (
        lambda: broken(Contract, ia=at((0, 2), -2), ib=at((0, 2), -2)), "%N (contract) has numbers -2 … 5 for 6 elements"),
    "a contraction before its second factor": (
        lambda: broken(Contract, ib=at((0, 2), -2)), "%N (contract) has numbers -2 … 3 for 4 elements of its second factor"),
    "half a pair, the first": (lambda: broken(Contract, ia=at((0, 0), -1)), "%N (contract) leaves out one factor of a pair"),
    "half a pair, the second": (lambda: broken(Contract, ib=at((0, 0), -1)), "%N (contract) leaves out one factor of a pair"),
    # reductions
    "a fold": (lambda: broken(Reduce, fold="prod"), "%N (reduce) folds by 'prod'"),
    "a reduction's size": (lambda: broken(Reduce, size=2), "%N (reduce) of size 2 has an index of shape (1, 3)"),
    "a reduction's axes": (lambda: broken(Reduce, index=Index([0])), "%N (reduce) of size 1 has an index of shape (1,)"),
    "a reduction beyond its source": (lambda: broken(Reduce, index=at((0, 1), 3)), "%N (reduce) has numbers -1 … 3 for 3 elements"),
    "a reduction before its source": (lambda: broken(Reduce, index=at((0, 2), -2)), "%N (reduce) has numbers -2 … 1 for 3 elements"),
    "the largest of no elements": (lambda: broken(Reduce, index=Index([[-1, -1]])), "%N (reduce) takes the largest of nothing"),
    "the largest of an empty row": (lambda: broken(Reduce, index=Index(np.zeros((1, 0)))), "%N (reduce) takes the largest of nothing"),
    "the largest of one empty row": (
        lambda: broken(Reduce, size=2, index=Index([[0, 1], [-1, -1]])), "%N (reduce) takes the largest of nothing"),
    # the state
    "a state without a next value": (lambda: replace(sound(), next=sound().next[:1]), "the program has 2 states and 1 next values"),
    "a next value's size": (
        lambda: replace(sound(), next=sound().next[::-1]), "state %0 (leaf) is of size 2, but its next value %N (reduce)"),
    "a state that is no leaf": (
        lambda: replace(with_map_as_state(), next=(*sound().next[:1], *sound().next)), "state %N (neg) is no leaf of the kind 'state'"),
    "a state of another kind": (
        lambda: with_state(ir.leaf("param", 0, [[0], [1]]), param_sizes=(2,)), "state %0 (leaf) is no leaf of the kind 'state'"),
    "a state listed twice": (lambda: with_state(A, B, A), "state %0 (leaf) has elements of state 0 that are listed already"),
    "a state in two leaves": (lambda: with_state(A, OTHER), "state %1 (leaf) has elements of state 0 that are listed already"),
    "a state twice in a leaf": (
        lambda: with_state(ir.leaf("state", 0, [[0], [0]]), B), "state %0 (leaf) has elements of state 0 that are listed already"),
    "a state that is left out": (lambda: with_state(A), "state 0 has elements in no state leaf, the first of them 2"),
    "a slot that is left out": (lambda: with_state(A, B, state_sizes=(4, 1)), "state 1 has elements in no state leaf, the first of them 0"),
    # stores
    "an emit's slot": (lambda: stored(True, 0, slot=2), "emit of %N (mul) goes to slot 2 of 2"),
    "an emit's negative slot": (lambda: stored(True, 0, slot=-1), "emit of %N (mul) goes to slot -1 of 2"),
    "an emit's lanes": (
        lambda: stored(True, 0, index=Index([[0, 2]])), "emit of %N (mul) has an index of shape (1, 2) for 2 lanes of size 2"),
    "an emit's size": (
        lambda: stored(True, 0, index=Index([[0], [1]])), "emit of %N (mul) has an index of shape (2, 1) for 2 lanes of size 2"),
    "an emit beyond its tensor": (
        lambda: stored(True, 0, index=at((0, 0), 4)), "emit of %N (mul) has numbers 1 … 4 for 4 elements of emit 0"),
    "an emit before its tensor": (
        lambda: stored(True, 0, index=at((0, 0), -1)), "emit of %N (mul) has numbers -1 … 3 for 4 elements of emit 0"),
    "an emit twice in a store": (
        lambda: stored(True, 0, index=at((0, 0), 3)), "emit of %N (mul) writes elements of emit 0 that are written already"),
    "an emit in two stores": (
        lambda: replace(sound(), emits=sound().emits + sound().emits[1:]),
        "emit of %N (reduce) writes elements of emit 1 that are written"),
    "an emit partly written": (
        lambda: replace(sound(), emit_sizes=(4, 3), emits=(*sound().emits, Store(1, Index([[0], [2]]), sound().next[1]))),
        "emit of %N (reduce) writes elements of emit 1 that are written"),
    "a smaller emit": (lambda: replace(sound(), emit_sizes=(3, 2)), "emit of %N (mul) has numbers 0 … 3 for 3 elements of emit 0"),
    "a sum's slot": (lambda: replace(sound(), sum_sizes=()), "sum of %N (reduce) goes to slot 0 of 0"),
    "a sum's shape": (lambda: stored(False, 0, index=Index([[0, 1]])), "sum of %N (reduce) has an index of shape (1, 2) for 2 lanes"),
    "a sum beyond its tensor": (
        lambda: stored(False, 0, index=at((1, 0), 2)), "sum of %N (reduce) has numbers 0 … 2 for 2 elements of sum 0"),
    "a sum written twice": (lambda: stored(False, 0, index=at((1, 0), 0)), "sum of %N (reduce) writes elements of sum 0 that are written"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_found_and_named(breach: str) -> None:
    make, said = BREACHES[breach]
    with pytest.raises(InternalError, match="^" + re.escape(said).replace("%N", r"%\d+")):
        verify(make())


def test_the_program_that_is_broken_above_is_sound() -> None:
    program = sound()
    verify(program)
    kinds = {type(v) for v in ir.topological((*program.state, *program.outputs))}
    assert kinds == {Leaf, Const, Map, Gather, Contract, Reduce}


def test_exchanging_a_value_for_itself_breaks_nothing() -> None:
    program = sound()
    verify(exchanged(program, program.next[0], program.next[0]))


def test_a_value_is_named_by_its_number_in_the_text() -> None:
    program = broken(Map, operands=lambda o: o * 2)
    with pytest.raises(InternalError) as error:
        verify(program)
    number = re.match(r"(%\d+) ", str(error.value))
    assert number is not None
    assert f"\n{number[1]} = map tanh " in print_program(program)


def test_sums_of_nothing_and_of_no_pairs_are_sound() -> None:
    s = ir.leaf("state", 0, [[0, 1]])
    nothing = ir.contract(s, s, np.zeros((1, 0)), np.zeros((1, 0)))
    none = ir.reduce_("sum", s, [[-1, -1]])
    verify(Program("cell", 1, (s,), (ir.gather([nothing, none], [0, 1], [0, 0]),), state_sizes=(2,)))


def test_the_largest_of_one_element_is_sound() -> None:
    s = ir.leaf("state", 0, [[0, 1]])
    verify(Program("cell", 1, (s,), (ir.reduce_("max", s, [[0, -1], [-1, 0]]),), state_sizes=(2,)))


@pytest.mark.parametrize("name", CELLS)
def test_the_programs_of_real_cells_are_sound(name: str) -> None:
    for program in real_programs(name).values():
        verify(program)
