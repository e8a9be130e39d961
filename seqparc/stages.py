"""States that depend on each other one way only are solved one after the other: earlier ones are inputs of later ones.

What a later state makes of an earlier one alone is then prelude like anything made of x, one product over all steps where the cell itself
has one a step, and each stage has the lanes of its own states. Stages are made of whole leaves of the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import fx

from seqparc.graphs import Graph, classify

Bools = NDArray[np.bool_]


def order(pattern: Bools, sizes: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Leaves of the state by stage, in the order they can be solved in; a single stage if nothing is gained by more.

    Neighbours stay together while no more than `limit` state numbers meet: a lane of so few costs least when it is run as a whole.
    """
    at = np.concatenate([[0], np.cumsum(sizes)])
    count = len(sizes)
    spans = [slice(at[i], at[i + 1]) for i in range(count)]
    needs = np.array([[pattern[a, b].any() for b in spans] for a in spans]).reshape(count, count)
    reach = needs | np.eye(count, dtype=bool)
    for _ in range(count.bit_length()):
        reach = reach @ reach
    groups = {tuple(np.flatnonzero(reach[i] & reach[:, i]).tolist()) for i in range(count)}
    stages: list[list[int]] = []
    for group in sorted(groups, key=lambda g: (int(reach[g[0]].sum()), g)):  # what needs more comes later
        members = list(group)
        recurrent = bool(needs[np.ix_(members, members)].any())
        last = stages[-1] if stages else []
        joint = [n for i in (*last, *members) for n in range(at[i], at[i + 1])]
        close = bool(last) and (largest_group(pattern[np.ix_(joint, joint)]) <= limit if recurrent else needs[np.ix_(members, last)].any())
        if close:
            last += members
        else:
            stages.append(members)
    return [tuple(sorted(s)) for s in stages]


def largest_group(pattern: Bools) -> int:
    """Size of the largest group of numbers that meet."""
    meets = pattern | pattern.T | np.eye(len(pattern), dtype=bool)
    label = np.arange(len(pattern))
    while True:
        least = np.where(meets, label[None], len(pattern)).min(1)
        if (least == label).all():
            return int(np.bincount(label).max())
        label = least


def part(graph: Graph, leaves: Sequence[int], earlier: Sequence[int]) -> Graph:
    """The recording of some of the states, as a cell of its own: inputs x, then before and after each step every earlier state."""
    made: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    x = []

    def given(node: fx.Node, name: str, **meta: object) -> fx.Node:
        placeholder = new.placeholder(name)
        placeholder.meta.update({k: v for k, v in node.meta.items() if k in ("val", "src", "static", "along")}, **meta)
        made[node] = placeholder
        return placeholder

    for i, node in enumerate(graph.x):
        x.append(given(node, node.name, key=("x", i), kind="x"))
    for j in earlier:
        for node, name in ((graph.state[j], "before"), (graph.next[j], "after")):
            x.append(given(node, f"{name}_{j}", key=("x", len(x)), kind="x"))
    state = [given(graph.state[i], f"state_{i}", key=("state", k), kind="state") for k, i in enumerate(leaves)]
    batch = given(graph.batch, "batch", key=("batch",), kind="const")
    todo, wanted = [graph.next[i] for i in leaves], set()
    while todo:
        node = todo.pop()
        if node not in made and node not in wanted:
            wanted.add(node)
            todo += node.all_input_nodes
    for node in graph.graph.nodes:
        if node in wanted:
            if node.op == "placeholder":
                given(node, node.name, key=node.meta["key"], kind=node.meta["kind"])
                continue
            made[node] = copy = new.node_copy(node, made.__getitem__)
            copy.meta = {k: v for k, v in node.meta.items() if k in ("val", "src", "along")}
            if "static" in node.meta:
                copy.meta["static"] = tuple(tuple(fx.map_arg(a, made.__getitem__) for a in both) for both in node.meta["static"])
            elif node.meta["kind"] == "const":
                copy.meta["kind"] = "const"  # arithmetic on the batch size
    classify(new)
    following = [made[graph.next[i]] for i in leaves]
    return Graph(new, x, state, [], following, graph.attributes, batch, graph.batch_sizes, graph.explicit, graph.wide)
