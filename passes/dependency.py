"""Which state numbers a next state number depends on, and what follows: independent lanes, and an order of blocks.

The pattern is computed element by element through the program, so it is exact up to cancellation: a False is a proof that
the Jacobian entry is zero, whatever the values of inputs and parameters (constants that are zero count as zero).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqparc import ir, store
from seqparc.ir import Program, Value
from seqparc.ops import OPS

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """The dependence of next state numbers (rows) on state numbers (columns), flat over all slots of one sample.

    components  groups of state numbers that never meet, each sorted
    order       strongly connected groups of the whole, in the order they can be solved in
    """

    pattern: Bools
    components: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> str:
        """ "diagonal", "block", "block-triangular" or "dense"; "none" if the next state ignores the state."""
        if not self.pattern.any():
            return "none"
        largest = max(map(len, self.components))
        if largest == 1:
            return "diagonal"
        if any(len(g) < largest for g in self.order):
            return "block-triangular"
        return "block" if len(self.components) > 1 else "dense"


def pattern(program: Program) -> Bools:
    """[next numbers, state numbers] of a program with one lane: where the Jacobian may be non-zero."""
    offsets = np.concatenate([[0], np.cumsum(program.state_sizes)])
    total = int(offsets[-1])
    empty = np.zeros((0, total), bool)
    done: dict[Value, Bools] = {}
    for v in ir.topological(program.next):
        match v:
            case ir.Leaf(kind="state", slot=slot, index=index):
                rows = np.zeros((v.size, total), bool)
                rows[np.arange(v.size), offsets[slot] + index.array[0]] = True
            case ir.Leaf() | ir.Const():
                rows = np.zeros((v.size, total), bool)
            case ir.Map(op=op, operands=operands):
                parts = [done[a] for i, a in enumerate(operands) if not _steps(op)]
                rows = np.logical_or.reduce(parts) if parts else np.zeros((v.size, total), bool)
                if _steps(op):
                    # piecewise constant: the derivative is zero, but the value still depends on the state
                    rows = np.logical_or.reduce([done[a] for a in operands])
            case ir.Gather(sources=sources, which=which, index=index):
                rows = np.zeros((v.size, total), bool)
                for j, s in enumerate(sources):
                    at = which.array == j
                    rows[at] = done[s][index.array[at]]
            case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                rows = _any(ia.array, done.get(a, empty)) | _any(ib.array, done.get(b, empty))
            case ir.Reduce(x=x, index=index):
                rows = _any(index.array, done[x])
            case _:
                raise TypeError(type(v).__name__)
        done[v] = rows
    return np.concatenate([done[v] for v in program.next])


def _steps(op: str) -> bool:
    """Operations whose value jumps while their derivative is zero everywhere."""
    row = OPS[op]
    return row.partials is not None and all(p == "0" for p in row.partials)


def _any(index: NDArray[np.int32], rows: Bools) -> Bools:
    """out[e] = any over k of rows[index[e, k]]; -1 is nothing."""
    if not rows.any():
        return np.zeros((index.shape[0], rows.shape[1]), bool)
    used = np.zeros((index.shape[0], rows.shape[0] + 1), np.float32)
    used[np.arange(index.shape[0])[:, None], index] = 1.0  # -1 lands in the last column, which is cut off
    return (used[:, :-1] @ rows.astype(np.float32)) > 0


def analyse(program: Program) -> Structure:
    """The structure of a program with one lane."""
    p = pattern(program)
    # What a graph library finds in a pattern depends on the pattern alone, so it is found once and kept.
    components, order = store.remembered("groups", f"{p.shape} {np.packbits(p).tobytes().hex()}", lambda: _groups(p))
    return Structure(p, tuple(map(tuple, components)), tuple(map(tuple, order)))


def _groups(p: Bools) -> tuple[list[list[int]], list[list[int]]]:
    """Components and, in an order they can be solved in, strongly connected groups."""
    import networkx as nx

    # Numbers with the same row and the same column are interchangeable, so the graph is drawn over such classes: one node
    # for a dense cell of any size.
    keys: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for i in range(len(p)):
        keys[(np.packbits(p[i]).tobytes(), np.packbits(p[:, i]).tobytes())].append(i)
    classes = []
    for members in keys.values():
        alone = not p[members[0]].any() and not p[:, members[0]].any()
        classes += [[m] for m in members] if alone else [members]
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(classes)))
    heads = np.array([c[0] for c in classes])
    for to, source in np.argwhere(p[np.ix_(heads, heads)]):
        graph.add_edge(int(source), int(to))
    for i, members in enumerate(classes):
        if len(members) > 1 and p[members[0], members[1]]:
            graph.add_edge(i, i)

    def numbers(nodes: set[int]) -> list[int]:
        return sorted(m for n in nodes for m in classes[n])

    components = sorted(numbers(c) for c in nx.weakly_connected_components(graph))
    condensed = nx.condensation(graph)
    order = [numbers(condensed.nodes[n]["members"]) for n in nx.lexicographical_topological_sort(condensed)]
    return components, order
