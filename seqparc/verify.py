"""The grammar of the IR, as code: what every pass may rely on and must leave true."""

from __future__ import annotations

import numpy as np

from seqparc import ir
from seqparc.errors import InternalError
from seqparc.ir import Index, Leaf, Program, Store, Value
from seqparc.ops import OPS


def verify(program: Program) -> None:
    """Raise InternalError, naming the value by its number in the program's text, where a program breaks the grammar."""
    order = ir.topological((*program.state, *program.outputs))
    name = {v: f"%{i} ({v.op if isinstance(v, ir.Map) else type(v).__name__.lower()})" for i, v in enumerate(order)}
    _require(program.lanes >= 1, "the program", "has no lanes")
    for v in order:
        _value(program, v, name[v])
    _states(program, name)
    _stores(program, "emit", program.emits, program.emit_sizes, name)
    _stores(program, "sum", program.sums, program.sum_sizes, name)


def _require(holds: object, where: str, what: str) -> None:
    if not holds:
        raise InternalError(f"{where} {what}")


def _shape(program: Program, index: Index, size: int, where: str) -> None:
    _require(index.shape == (program.lanes, size), where, f"has an index of shape {index.shape} for {program.lanes} lanes of size {size}")


def _range(index: Index, least: int, size: int, where: str, what: str) -> None:
    """Every number of the index lies from `least` to below `size`."""
    if index.array.size:
        low, high = int(index.array.min()), int(index.array.max())
        _require(low >= least and high < size, where, f"has numbers {low} … {high} for {size} {what}")


def _value(program: Program, v: Value, where: str) -> None:
    """One value by itself."""
    _require(v.size >= 1, where, f"is of size {v.size}")
    match v:
        case Leaf(kind=kind, slot=slot, index=index):
            _require(kind in ("state", "stream", "param"), where, f"reads tensors of the kind {kind!r}")
            sizes = {"state": program.state_sizes, "stream": program.stream_sizes, "param": program.param_sizes}[kind]
            _require(0 <= slot < len(sizes), where, f"reads {kind} {slot} of {len(sizes)}")
            _shape(program, index, v.size, where)
            _range(index, 0, sizes[slot], where, f"elements of {kind} {slot}")
            _require(kind != "state" or v in program.state, where, "is none of the program's state leaves")
        case ir.Const(value=number):
            _require(isinstance(number, float), where, f"holds {number!r}, which is no float")
        case ir.Map(op=op, operands=operands):
            _require(op in OPS, where, "is not in the operation table")
            _require(len(operands) == OPS[op].arity, where, f"has {len(operands)} operands, not {OPS[op].arity}")
            _require(all(a.size == v.size for a in operands), where, f"of size {v.size} has operands of sizes {[a.size for a in operands]}")
        case ir.Gather(sources=sources, which=which, index=index):
            same = which.shape == index.shape == (v.size,)
            _require(same, where, f"of size {v.size} has indices of shapes {which.shape} and {index.shape}")
            _range(which, -1, len(sources), where, "sources")
            _require(((which.array < 0) == (index.array < 0)).all(), where, "has elements of no source, or a source without an element")
            for j, source in enumerate(sources):
                mine = Index(index.array[which.array == j])
                _require(mine.array.size > 0, where, f"reads nothing of its source {j}")
                _range(mine, 0, source.size, where, f"elements of source {j}")
                _require(not isinstance(source, ir.Const) or source.size == 1, where, f"picks from a constant of size {source.size}, not 1")
        case ir.Contract(a=a, b=b, ia=ia, ib=ib):
            same = ia.shape == ib.shape and len(ia.shape) == 2 and ia.shape[0] == v.size
            _require(same, where, f"of size {v.size} has indices of shapes {ia.shape} and {ib.shape}")
            _range(ia, -1, a.size, where, "elements of its first factor")
            _range(ib, -1, b.size, where, "elements of its second factor")
            _require(((ia.array < 0) == (ib.array < 0)).all(), where, "leaves out one factor of a pair and not the other")
        case ir.Reduce(fold=fold, x=x, index=index):
            _require(fold in ("sum", "max"), where, f"folds by {fold!r}")
            _require(len(index.shape) == 2 and index.shape[0] == v.size, where, f"of size {v.size} has an index of shape {index.shape}")
            _range(index, -1, x.size, where, "elements")
            _require(fold == "sum" or (index.array >= 0).any(1).all(), where, "takes the largest of nothing")
        case _:
            raise InternalError(f"{where} is of no kind the grammar knows")


def _states(program: Program, name: dict[Value, str]) -> None:
    """State leaves cover every state number once; each has a next value of its size."""
    _require(len(program.state) == len(program.next), "the program", f"has {len(program.state)} states and {len(program.next)} next values")
    times = [np.zeros(size, int) for size in program.state_sizes]
    for before, after in zip(program.state, program.next, strict=True):
        where = f"state {name[before]}"
        _require(isinstance(before, Leaf) and before.kind == "state", where, "is no leaf of the kind 'state'")
        _require(before.size == after.size, where, f"is of size {before.size}, but its next value {name[after]} of size {after.size}")
        np.add.at(times[before.slot], before.index.array, 1)
        _require((times[before.slot] <= 1).all(), where, f"has elements of state {before.slot} that are listed already")
    for slot, found in enumerate(times):
        _require((found == 1).all(), f"state {slot}", f"has elements in no state leaf, the first of them {int(found.argmin())}")


def _stores(program: Program, word: str, stores: tuple[Store, ...], sizes: tuple[int, ...], name: dict[Value, str]) -> None:
    """Stores lie within their tensors, and no element is written twice."""
    written = [np.zeros(size, bool) for size in sizes]
    for s in stores:
        where = f"{word} of {name[s.value]}"
        _require(0 <= s.slot < len(sizes), where, f"goes to slot {s.slot} of {len(sizes)}")
        _shape(program, s.index, s.value.size, where)
        _range(s.index, 0, sizes[s.slot], where, f"elements of {word} {s.slot}")
        flat = s.index.array.reshape(-1)
        once = ir.distinct(flat) and not written[s.slot][flat].any()
        _require(once, where, f"writes elements of {word} {s.slot} that are written already")
        written[s.slot][flat] = True
