"""The first stages by themselves: recording, unifying two recordings, carving pieces out, and lowering to the IR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import seqparc
from seqparc.compiler import lower
from seqparc.errors import SeqparcError, TraceError
from seqparc.graphs import Graph, carve, unify
from seqparc.passes.dependency import analyse
from seqparc.record import Trace, record

WEIGHT = torch.arange(12.0).reshape(3, 4) / 10


def replay(trace: Trace, *values: Tensor) -> list[Tensor]:
    """A recording run on other values."""
    known: dict[Any, Any] = dict(zip(trace.inputs, values, strict=True))
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            known[node] = trace.attributes[node.meta["attribute"]]
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg(node.args, known.__getitem__), torch.fx.map_arg(node.kwargs, known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return [known[n] for n in trace.outputs]


def in_place_in_a_view(x: Tensor, h: Tensor) -> Tensor:
    both = torch.zeros(x.shape[0], 2, x.shape[1])
    both[:, 0] = x
    row = both[:, 1]
    row.copy_(h)
    row.mul_(2).add_(x)
    both[:, 0, 1:] += h[:, 1:]
    return both.flatten(1)


def views_of_views(x: Tensor, h: Tensor) -> Tensor:
    a, b = torch.cat((x, h), -1).view(-1, 2, x.shape[1]).transpose(0, 1).unbind(0)
    return (a[:, ::2].repeat_interleave(2, -1)[:, : x.shape[1]] * b.flip(-1)).squeeze(-1)


def read_between_writes(x: Tensor, h: Tensor) -> Tensor:
    y = h.clone()
    before = y[:, :2] + 0
    y[:, 1:3] = x[:, 1:3]
    return torch.cat((before, y[:, :2], y), -1)


def out_of_place_then_out(x: Tensor, h: Tensor) -> Tensor:
    y = torch.empty_like(h)
    torch.add(x, h, out=y)
    return y.clamp_(min=0.1).sigmoid_()


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weights": lambda x, h: torch.tanh(torch.nn.functional.linear(x + h, WEIGHT)),
    "in place in a view": in_place_in_a_view,
    "views of views": views_of_views,
    "read between writes": read_between_writes,
    "out=": out_of_place_then_out,
    "split": lambda x, h: torch.cat([c * h[:, :2] for c in x.chunk(2, -1)], -1),
    "where": lambda x, h: torch.where(x > h, x, h.masked_fill(h < 0, 0.5)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_recording_computes_the_same_on_other_values(name: str) -> None:
    step = STEPS[name]
    trace = record(lambda x, h: [step(x, h)], [torch.randn(3, 4), torch.randn(3, 4)], {id(WEIGHT): "weight"})
    x, h = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(replay(trace, x, h)[0], step(x.clone(), h.clone()), rtol=0, atol=0)
    assert all(n.op != "call_function" or "_." not in str(n.target) for n in trace.graph.nodes), "an in-place operation is left"


def test_lines_and_attributes_are_the_users() -> None:
    trace = record(lambda x, h: [STEPS["weights"](x, h)], [torch.randn(3, 4), torch.randn(3, 4)], {id(WEIGHT): "weight"})
    assert list(trace.attributes) == ["weight"] and trace.attributes["weight"] is WEIGHT
    sources = [n.meta["src"] for n in trace.graph.nodes if n.op == "call_function"]
    assert sources and all(s.file == __file__ for s in sources)


def graph_of(step: Callable[[Tensor, Tensor], Any], sizes: tuple[int, int] = (3, 5), n: int = 4) -> Graph:
    """Of a step that gives its next state, or [outputs ..., next state]."""

    def results(x: Tensor, h: Tensor) -> list[Tensor]:
        found = step(x, h)
        return found if isinstance(found, list) else [found]

    traces = [record(results, [torch.randn(b, n), torch.randn(b, n)], {id(WEIGHT): "weight"}) for b in sizes]
    return unify(traces[0], traces[1], sizes, (1, 1, len(traces[0].outputs) - 1))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", [n for n in STEPS if n != "out="])
def test_a_graph_of_two_recordings_holds_for_every_batch(name: str, batch: int) -> None:
    graph = graph_of(STEPS[name])
    piece = carve(graph.next, {})
    x, h = torch.randn(batch, 4), torch.randn(batch, 4)
    given = {("x", 0): x, ("state", 0): h, ("batch",): batch, ("attr", "weight"): WEIGHT}
    known = [given[k] if k in given else graph.attributes[k[1]] for k in piece.inputs]
    torch.testing.assert_close(piece.run(*known)[0], STEPS[name](x, h))


def test_what_a_node_depends_on() -> None:
    graph = graph_of(lambda x, h: torch.tanh(x @ (WEIGHT * 2).t().mm(torch.ones(3, 4)) + h) + torch.ones(4))
    kinds = {str(n.target).split(".")[1]: n.meta["kind"] for n in graph.graph.nodes if n.op == "call_function" and "aten" in str(n.target)}
    assert kinds["tanh"] == "state" and kinds["t"] == "param" and kinds["ones"] == "const"
    assert {n.meta["kind"] for n in graph.graph.nodes if "mm" in str(n.target)} == {"param", "x"}


@pytest.mark.parametrize(
    "step",
    [
        lambda x, h: h[torch.arange(3) % h.shape[0]] if h.shape[0] == 3 else h,  # another path
        lambda x, h: h * (1.0 if h.shape[0] == 3 else 2.0),  # another number
        lambda x, h: h * h.shape[0] ** 2,  # not linear in it: 9 and 25 are, so the trial run must tell
    ],
    ids=["path", "number", "square"],
)
def test_a_batch_size_that_is_baked_in_is_refused(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(SeqparcError):
        seqparc.compile(step, state=torch.zeros(4))(torch.randn(2, 6, 4))


# -- lowering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "reads"),
    [
        (lambda x, h: torch.roll(h, 1, -1) + x, np.roll(np.eye(4), 1, 0)),
        (lambda x, h: h.flip(-1) * x, np.eye(4)[::-1]),
        (lambda x, h: torch.cat((h[:, 2:], x[:, :2]), -1), [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (lambda x, h: h.view(-1, 2, 2).transpose(1, 2).flatten(1) + x, np.eye(4)[[0, 2, 1, 3]]),
        (lambda x, h: h.view(-1, 2, 2).sum(-1, keepdim=True).expand(-1, 2, 2).reshape(-1, 4) + x, np.kron(np.eye(2), np.ones((2, 2)))),
        (lambda x, h: torch.tril(torch.ones(4, 4)).mul(0.3).matmul(h.unsqueeze(-1)).squeeze(-1) + x, np.tril(np.ones((4, 4)))),
        (lambda x, h: x + 0 * x, np.zeros((4, 4))),
    ],
    ids=["roll", "flip", "slice and cat", "transpose", "sum and expand", "constant zeros", "forgets"],
)
def test_what_a_lowered_cell_reads(step: Callable[[Tensor, Tensor], Tensor], reads: Any) -> None:
    assert np.array_equal(analyse(lower(graph_of(step)).program).pattern, np.asarray(reads) != 0)


def test_streams_are_cut_as_late_as_the_state_allows() -> None:
    lowered = lower(graph_of(lambda x, h: torch.tanh(torch.relu(x @ WEIGHT.t().mm(torch.ones(3, 4))) + h)))
    assert [str(n.target) for n in lowered.streams] == ["aten.relu.default"] and not lowered.params
    assert lowered.program.state_sizes == (4,) and lowered.program.stream_sizes == (4,)


def test_a_sample_that_reads_another_is_refused() -> None:
    with pytest.raises(TraceError, match="one sample of the batch reads another"):
        lower(graph_of(lambda x, h: h + h.mean(0, keepdim=True) + x))
    with pytest.raises(TraceError, match="one sample of the batch reads another"):
        lower(graph_of(lambda x, h: torch.roll(h, 1, 0) + x))


def test_samples_stay_apart_outside_the_core_too() -> None:
    where = r"test_trace.py.*\(aten.all.default\): one sample of the batch reads another"
    with pytest.raises(TraceError, match=where):  # which no comparison of ordinary numbers shows
        graph_of(lambda x, h: h + torch.where(torch.all(x == 0), 1.0, x))
    with pytest.raises(TraceError, match=where):
        graph_of(lambda x, h: [torch.where(torch.all(h > 0), 1.0, h), torch.tanh(h + x)])


def test_what_only_has_the_shape_of_something_reads_no_sample() -> None:
    graph_of(lambda x, h: torch.tanh(x + h) + torch.zeros_like(x[0]) + x.mean(0).new_ones(4))


@pytest.mark.parametrize(
    "step",
    [
        lambda x, h: torch.tanh(h + torch.ones(h.shape[0], 1) + x),
        lambda x, h: torch.tanh(h + (torch.zeros(h.shape[0], 4) + 2) * x),
        lambda x, h: torch.tanh(h * torch.full((h.shape[0], 2), 0.5).repeat(1, 2) + x),
        lambda x, h: torch.where(torch.ones(h.shape[0], 4, dtype=torch.bool), h, x),
    ],
)
def test_constants_made_for_the_batch(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert lower(graph_of(step)).program.state_sizes == (4,)
