"""Two recordings of a cell, at two batch sizes, become one graph for any batch size.

Integers that differ between the recordings must be linear in the batch size; they become arithmetic on a `batch` input.
Anything else that differs means the cell has the batch size (or the values) baked in, which is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from seqparc.errors import TraceError
from seqparc.record import Trace

Key = tuple[Any, ...]  # ("x", i) ("state", j) ("attr", name) ("stream", i) ("param", i) ("next", j) ("batch",)
NodeKind = Literal["const", "param", "x", "state"]


@dataclass
class Graph:
    """A recorded cell for any batch size.

    Nodes carry in `meta`: "val" (an example at the first batch size), "src" (the user's line), "kind" (what they depend
    on: "const", "param", "x" or "state"), "static" ((args, kwargs) of either recording, with plain integers), "key", and "along", the
    axis of its value that is as long as the batch is large (-1: it is part of one, None: the shape does not depend on it).
    """

    graph: fx.Graph
    x: list[fx.Node]
    state: list[fx.Node]
    out: list[fx.Node]
    next: list[fx.Node]
    attributes: dict[str, torch.Tensor]
    batch: fx.Node
    batch_sizes: tuple[int, int]
    #: Whether it has 16 bits only where it asks for them, and whether it is to be computed in float64 (see `seqparc.exact`).
    explicit: bool = True
    wide: bool = False


def _linear(batch: int, per_sample: int, constant: int) -> int:
    return batch * per_sample + constant


def unify(first: Trace, second: Trace, sizes: tuple[int, int], counts: tuple[int, int, int]) -> Graph:
    """One graph out of recordings at two batch sizes; `counts`: x leaves, state leaves, out leaves."""
    n_x, _, n_out = counts
    nodes_a, nodes_b = list(first.graph.nodes), list(second.graph.nodes)
    if [str(n.target) for n in nodes_a] != [str(n.target) for n in nodes_b]:
        raise TraceError(
            f"the cell does different things at batch size {sizes[0]} and {sizes[1]}. It must not branch on the batch size."
        )
    graph = fx.Graph()
    batch = graph.placeholder("batch")
    batch.meta.update(kind="const", key=("batch",))
    made: dict[fx.Node, fx.Node] = {}  # from the first recording
    twin: dict[fx.Node, fx.Node] = {}  # from the second

    def merge(a: Any, b: Any, node: fx.Node) -> Any:
        if isinstance(a, fx.Node):
            return made[a]
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                raise _baked(node, a, b, sizes)
            return type(a)(merge(p, q, node) for p, q in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {k: merge(a[k], b[k], node) for k in a}
        if a is b or a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            return a
        if type(a) is int and type(b) is int:
            slope, rest = divmod(b - a, sizes[1] - sizes[0])
            if rest == 0:
                symbol = graph.call_function(_linear, (batch, slope, a - slope * sizes[0]))
                symbol.meta["kind"] = "const"
                return symbol
        raise _baked(node, a, b, sizes)

    for node_a, node_b in zip(nodes_a, nodes_b, strict=True):
        if node_a.op == "output":
            continue
        if node_a.op == "call_function":
            args, kwargs = merge(node_a.args, node_b.args, node_a), merge(node_a.kwargs, node_b.kwargs, node_a)
            node = graph.call_function(node_a.target, args, kwargs)
        elif node_a.op == "get_attr":
            node = graph.placeholder(node_a.name)
            name = node_a.meta["attribute"]
            node.meta.update(key=("attr", name), kind="param")
            if first.attributes[name] is not second.attributes[name] and not _alike(first.attributes[name], second.attributes[name]):
                raise TraceError(f"the cell makes a new constant tensor of other values on every call ({name}); pass it as an input")
        else:
            node = graph.placeholder(node_a.name)
        node.meta.update({k: v for k, v in node_a.meta.items() if k in ("val", "src")}, along=_along(node_a, node_b, sizes))
        made[node_a] = node
        twin[node_b] = node
        node.meta["static"] = tuple(
            (fx.map_arg(source.args, to.__getitem__), fx.map_arg(source.kwargs, to.__getitem__))
            for source, to in ((node_a, made), (node_b, twin))
        )
    inputs = [made[n] for n in first.inputs]
    outputs = [made[n] for n in first.outputs]
    for role, nodes in (("x", inputs[:n_x]), ("state", inputs[n_x:])):
        for i, node in enumerate(nodes):
            node.meta.update(key=(role, i), kind=role)
    classify(graph)
    whole = {made[a] for a, b in zip(nodes_a, nodes_b, strict=True) if a in made and _shape(a) == _shape(b) is not None}
    found = Graph(graph, inputs[:n_x], inputs[n_x:], outputs[:n_out], outputs[n_out:], first.attributes, batch, sizes)
    _keep_samples_apart(found, whole)
    return found


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same; what is no number is like itself here."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """Of a value that holds something."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) and value.numel() else None


def _along(first: fx.Node, second: fx.Node, sizes: tuple[int, int]) -> int | None:
    """The axis of a value along which the batch lies, by its shapes in two recordings; -1: none by itself."""
    shapes = [n.meta["val"].shape if isinstance(n.meta.get("val"), torch.Tensor) else () for n in (first, second)]
    pairs = [(axis, pair) for axis, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1]]
    return None if not pairs else pairs[0][0] if len(pairs) == 1 and pairs[0][1] == sizes else -1


def _keep_samples_apart(graph: Graph, whole: set[fx.Node]) -> None:
    """Raises TraceError where something made of x, or of the state for an output alone, is the same for all samples, being in `whole`.

    Lowering follows samples through the core. The rest is run over all steps at once, where samples that meet would meet those of other
    steps as well; such a value may matter only now and then, and need not show when results are compared.
    """
    empty = {n for n in graph.graph.nodes if _holds_nothing_of(n)}
    core, read = set(_order(graph.next, ())), _order((*graph.out, *graph.next), empty)
    for node in read:
        outside = node.meta["kind"] == "x" or (node.meta["kind"] == "state" and node not in core)
        if outside and node in whole - empty:
            raise mixes(node)


def _holds_nothing_of(node: fx.Node) -> bool:
    """Whether a node takes no more than shape and kind from what it is given."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return name.startswith("new_") or name.endswith("_like")


def mixes(node: fx.Node | None) -> TraceError:
    """The error of an operation that brings samples together."""
    where, what = (node.meta.get("src"), f" ({node.target})") if node is not None else (None, "")
    return TraceError(
        f"{where or 'the cell'}{what}: one sample of the batch reads another. Cells must treat each sample by itself; a statistic "
        "over the batch belongs outside the cell."
    )


def _baked(node: fx.Node, a: Any, b: Any, sizes: tuple[int, int]) -> TraceError:
    where = node.meta.get("src") or "the cell"
    return TraceError(
        f"{where}: {node.target} was given {a!r} at batch size {sizes[0]} and {b!r} at batch size {sizes[1]}: the batch size is baked "
        "into the cell. Write the operation so that each sample is computed from itself alone."
    )


_RANK = {"const": 0, "param": 1, "x": 2, "state": 3}


def classify(graph: fx.Graph) -> None:
    """What each node depends on, the strongest dependence first: state, x, parameters, nothing."""
    for node in graph.nodes:
        if "kind" not in node.meta:
            node.meta["kind"] = max((n.meta["kind"] for n in node.all_input_nodes), key=_RANK.__getitem__, default="const")


@dataclass
class Piece:
    """A part of the graph that torch runs: `run(*values)` with one value per entry of `inputs`, which `sources` are in the whole graph.

    reads: what each of its results is made of, of the inputs.
    """

    inputs: list[Key]
    run: Callable[..., Sequence[torch.Tensor]]
    code: str
    operations: list[fx.Node]
    sources: list[fx.Node] = field(default_factory=list)
    reads: list[frozenset[Key]] = field(default_factory=list)


def carve(outputs: Sequence[fx.Node], stops: dict[fx.Node, Key], batch: int | None = None) -> Piece:
    """The part of a graph that computes `outputs` from the nodes in `stops` and from placeholders.

    batch: the batch size, where it is not one of the inputs.
    """
    graph = fx.Graph()
    inputs: list[Key] = []
    sources: list[fx.Node] = []
    made: dict[fx.Node, Any] = {}
    operations: list[fx.Node] = []
    read: dict[fx.Node, frozenset[Key]] = {}
    for node in _order(outputs, stops):
        if batch is not None and node.meta.get("key") == ("batch",):
            made[node], read[node] = batch, frozenset()
        elif node in stops or node.op == "placeholder":
            key = stops.get(node) or node.meta["key"]
            inputs.append(key)
            read[node] = frozenset((key,))
            sources.append(node)
            made[node] = graph.placeholder("_".join(map(str, key)))
            made[node].target = made[node].name  # which is a name of Python's, and of no other: an attribute's may be neither
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
            operations.append(node)
            read[node] = frozenset().union(*(read[n] for n in node.all_input_nodes))
    # Placeholders come first in fx; a node met later may need moving there.
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    if first is not None:
        for node in list(graph.nodes):
            if node.op == "placeholder":
                first.prepend(node)
    graph.output(tuple(made[n] for n in outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Piece(inputs, module.forward, module.code, [n for n in operations if "val" in n.meta], sources, [read[n] for n in outputs])


def _order(outputs: Iterable[fx.Node], stops: Container[fx.Node]) -> list[fx.Node]:
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in stops:
                stack.extend(node.all_input_nodes)
    graph = next(iter(needed)).graph if needed else fx.Graph()
    return [n for n in graph.nodes if n in needed]


def real_part(t: torch.Tensor) -> torch.Tensor:
    return t.resolve_conj().real


def imaginary_part(t: torch.Tensor) -> torch.Tensor:
    return t.resolve_conj().imag


#: What `apart` puts into a graph.
PARTS = (real_part, imaginary_part)


def apart(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Nodes for the two parts of a complex value from outside the core."""
    if "apart" not in node.meta:
        made = []
        with node.graph.inserting_after(node):
            for take in (imaginary_part, real_part):
                part = node.graph.call_function(take, (node,))
                static: Any = ((node,), {}), ((node,), {})
                part.meta.update(val=take(node.meta["val"]), src=node.meta.get("src"), kind=node.meta["kind"], static=static)
                made.append(part)
        node.meta["apart"] = (made[1], made[0])
    return node.meta["apart"]  # type: ignore[no-any-return]
