"""Compiled cells in graphs of torch.compile and torch.export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.runtime.engine import Engine
from seqparc.runtime.operator import number, solve
from seqparc.tree import flatten


class Named(nn.Module):
    """A dict for a state and a constant for a mask; the output is not the state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(7, 4)
        self.register_buffer("keep", torch.tensor([1.0, 0.5, 0.0, 1.0]))

    def init_state(self, batch: int) -> dict[str, Tensor]:
        return {"slow": self.mix.weight.new_zeros(batch, 4), "fast": self.mix.weight.new_ones(batch, 4)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        fast = torch.tanh(self.mix(torch.cat((x, state["slow"]), -1))) * self.keep
        slow = 0.9 * state["slow"] + 0.1 * fast
        return fast * torch.exp(-x.square().mean(-1, keepdim=True)), {"slow": slow, "fast": fast}


CELLS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "GRU": (lambda: nn.GRUCell(3, 8), ("tensor",)),
    "LSTM": (lambda: nn.LSTMCell(3, 6), ("pair",)),
    "named": (Named, ("dict",)),
}


def _state(kind: str, batch: int) -> Any:
    if kind == "tensor":
        return torch.randn(batch, 8)
    a, b = (torch.randn(batch, 6 if kind == "pair" else 4) for _ in range(2))
    return (a, b) if kind == "pair" else {"slow": a, "fast": b}


def _gradients(call: Callable[..., Any], rnn: nn.Module, x: Tensor, state: Any) -> list[Tensor]:
    results = [t for part in call(x, state) for t in flatten(part)[0]]
    loss = sum(((k + 1) * r.sin()).sum() for k, r in enumerate(results))
    assert isinstance(loss, Tensor)
    wanted = [x, *(flatten(state)[0] if state is not None else ()), *rnn.parameters()]
    return [*results, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", CELLS)
def test_a_graph_holds_a_compiled_cell_without_a_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, (kind,) = CELLS[name]
    rnn, head = seqparc.compile(make()), nn.Linear(3, 3)

    def whole(x: Tensor, state: Any) -> Any:
        y, last = rnn(head(x).tanh(), state)
        return 2 * y, last

    compiled = torch.compile(whole, backend=backend, fullgraph=True)
    for batch, steps in ((2, 40), (2, 57), (3, 200)):  # the later ones with sizes that are not known when traced
        x = torch.randn(batch, steps, 3, requires_grad=True)
        states = [_state(kind, batch)] if name == "named" else [None, _state(kind, batch)]
        for state in states:
            if state is not None:
                for t in flatten(state)[0]:
                    t.requires_grad_()
            for mine, right in zip(_gradients(compiled, rnn, x, state), _gradients(whole, rnn, x, state), strict=True):
                torch.testing.assert_close(mine, right)
    assert rnn.stats.chunk_length > 1 and rnn.stats.backward is not None


def test_new_weights_are_seen_by_an_old_graph() -> None:
    torch._dynamo.reset()
    rnn, x = seqparc.compile(nn.RNNCell(3, 4)), torch.randn(1, 9, 3)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    compiled(x)
    with torch.no_grad():
        for p in rnn.parameters():
            p.mul_(-0.5)
    torch.testing.assert_close(compiled(x)[0], rnn.sequential(x)[0])


def test_an_exported_model_holds_a_compiled_cell() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = seqparc.compile(nn.GRUCell(3, 5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]

    model = Model()
    given = (torch.randn(2, 30, 3),)
    with pytest.raises(Exception, match="with strict=False"):
        torch.export.export(model, given, strict=True)
    time = torch.export.Dim("time", min=2, max=10_000)
    exported = torch.export.export(model, given, dynamic_shapes=({1: time},), strict=False)
    assert any("seqparc.solve" in str(n.target) for n in exported.graph.nodes)
    for steps in (30, 77):
        x = torch.randn(2, steps, 3)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_where_a_graph_cannot_hold_a_cell_it_goes_on_after_it() -> None:
    torch._dynamo.reset()
    w = torch.randn(4, requires_grad=True)
    rnn = seqparc.compile(lambda x, h: torch.tanh(x + w * h), state=torch.zeros(4))
    compiled = torch.compile(lambda x: rnn(x + 1)[0] * 2, backend="eager")
    x = torch.randn(2, 12, 4, requires_grad=True)
    found, right = compiled(x), rnn.sequential(x + 1)[0] * 2
    torch.testing.assert_close(found, right)
    for mine, correct in zip(torch.autograd.grad(found.sum(), [x, w]), torch.autograd.grad(right.sum(), [x, w]), strict=True):
        torch.testing.assert_close(mine, correct)


def test_what_a_graph_cannot_hold_is_said() -> None:
    class Unknown(nn.Module):
        hidden_size = 4

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.linalg.qr(x[:, :, None] * h[:, None] + torch.eye(4))[1].sum(-1).tanh()

    torch._dynamo.reset()
    rnn, x = seqparc.compile(Unknown()), torch.randn(2, 5, 4)
    with pytest.warns(seqparc.SeqparcWarning, match="runs on the torch backend"), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(rnn, backend="eager", fullgraph=True)(x)
    with pytest.raises(seqparc.SeqparcError, match=r"cannot hold calls of Unknown: .*qr"):
        torch.export.export(rnn, (x,), strict=False)
    torch.testing.assert_close(torch.compile(lambda x: rnn(x)[0], backend="eager")(x), rnn.sequential(x)[0])


@pytest.mark.parametrize("bad", [lambda: (torch.randn(2, 9, 3), torch.randn(3, 8)), lambda: (torch.randn(9, 0, 3), None)])
def test_shapes_are_checked_while_tracing(bad: Callable[[], tuple[Tensor, Any]]) -> None:
    torch._dynamo.reset()
    rnn = seqparc.compile(nn.GRUCell(3, 8))
    with pytest.raises(Exception, match=r"x has batch 2|x has shape \[9, 0, 3\]: an empty sequence"):
        torch.compile(rnn, backend="eager")(*bad())


LOADED = """
import sys, torch, seqparc
from torch import nn
exported, x = torch.export.load(sys.argv[1]).module(), torch.ones(2, 30, 3)
try:
    exported(x)
except seqparc.SeqparcError as error:
    print("refused" if "not there" in str(error) else error)
torch.manual_seed(1)
rnn, other = seqparc.compile(nn.GRUCell(3, 5)), seqparc.compile(nn.GRUCell(3, 5, bias=False))
with torch.no_grad():
    other(x)
    try:
        exported(x)
    except seqparc.SeqparcError as error:
        print("refused again" if "not there" in str(error) else error)
    rnn(x)
    rnn.load_state_dict(exported.state_dict())
    torch.testing.assert_close(exported(x)[0], rnn.sequential(x)[0])
print("loaded")
"""


def test_a_loaded_graph_finds_the_same_cell_or_none(tmp_path: Path) -> None:
    rnn = seqparc.compile(nn.GRUCell(3, 5))
    rnn(torch.randn(2, 30, 3))
    torch.export.save(torch.export.export(rnn, (torch.randn(2, 30, 3),), strict=False), tmp_path / "cell.pt2")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "cell.pt2")], cwd=root, capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["refused", "refused again", "loaded"], done.stdout + done.stderr[-3000:]


def test_batches_that_differ_later_are_not_run() -> None:
    torch._dynamo.reset()
    rnn = seqparc.compile(nn.GRUCell(3, 8))
    compiled = torch.compile(rnn, backend="eager", dynamic=True, fullgraph=True)
    for batch in (3, 4):
        compiled(torch.randn(batch, 20, 3), torch.randn(batch, 8))
    with pytest.raises(torch._dynamo.exc.Unsupported):  # the guard on their equality fails, and so does tracing anew
        compiled(torch.randn(6, 20, 3), torch.randn(5, 8))
    engine = number(next(e for e in rnn._engines.values() if isinstance(e, Engine)))
    weights = [rnn.cell.weight_hh, rnn.cell.bias_hh]
    for batch, steps in ((5, 20), (6, 21)):  # whoever calls the operator
        with pytest.raises(seqparc.ShapeError, match="do not belong together"):
            solve([torch.zeros(batch, 8)], [torch.randn(6, 20, 24)], weights, engine, steps)


def test_second_derivatives_in_a_graph_are_refused() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 9, 3, requires_grad=True)
    y, _ = torch.compile(seqparc.compile(nn.GRUCell(3, 8)), backend="eager", fullgraph=True)(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(seqparc.SeqparcError, match="second derivative"):
        torch.autograd.grad(g.square().sum(), x)


def test_autocast_around_a_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    rnn, x = seqparc.compile(nn.GRUCell(3, 8)), torch.randn(2, 40, 3)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, right = compiled(x)[0], rnn(x)[0]
    assert found.dtype == right.dtype
    torch.testing.assert_close(found, right)


def test_a_graph_holds_calls_with_lengths_and_resets() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    rnn = seqparc.compile(nn.GRUCell(3, 8), backend="torch")
    compiled = torch.compile(lambda x, lengths, reset: rnn(x, None, lengths, reset), backend="aot_eager", fullgraph=True)
    for batch, steps in ((2, 12), (2, 17), (3, 20)):
        x = torch.randn(batch, steps, 3, requires_grad=True)
        lengths, reset = torch.randint(0, steps + 1, (batch,)), torch.rand(batch, steps) < 0.1
        mine = _gradients(lambda x, _, given=(lengths, reset): compiled(x, *given), rnn, x, None)
        torch.testing.assert_close(mine, _gradients(lambda x, _, given=(lengths, reset): rnn(x, None, *given), rnn, x, None))
    with pytest.raises(RuntimeError, match="lengths must be from 0 to the number of steps"):
        compiled(x, torch.full((3,), 51), reset)


def test_a_graph_holds_a_layer_where_dynamo_lets_it() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, bidirectional=True)
    compiled = seqparc.compile(layer, backend="torch")
    with pytest.raises(torch._dynamo.exc.Unsupported):  # its rule for every nn.RNNBase
        torch.compile(compiled, backend="eager", fullgraph=True)(torch.randn(9, 2, 3))
    torch._dynamo.reset()
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        for steps, batch in ((9, 2), (13, 2), (15, 3)):
            x = torch.randn(steps, batch, 3, requires_grad=True)
            found = [_gradients(lambda x, _, f=f: f(x), layer, x, None) for f in (graph, layer)]
            torch.testing.assert_close(*found)


@torch._dynamo.config.patch(allow_rnn=True)
def test_a_graph_of_a_layer_knows_whether_it_trains() -> None:
    torch._dynamo.reset()
    layer, x = seqparc.compile(nn.GRU(3, 4, num_layers=2, dropout=0.5), backend="torch"), torch.randn(9, 2, 3)
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert not torch.equal(graph(x)[0], graph(x)[0])
    layer.eval()
    torch.testing.assert_close(graph(x), layer(x))
    layer.train()
    assert not torch.equal(graph(x)[0], graph(x)[0])


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.rate = 3, 0.5

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.rate * h + x)


def test_a_graph_of_a_cell_that_was_changed_since_says_so() -> None:
    torch._dynamo.reset()
    rnn, x = seqparc.compile(Leaky(), backend="torch"), torch.randn(2, 9, 3)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(rnn, (x,)).module()
    before = compiled(x)[0]
    torch.testing.assert_close(before, rnn(x)[0])
    rnn.cell.rate = 0.9
    with pytest.raises(seqparc.SeqparcError, match="has changed since a graph was made of it"):
        compiled(x)
    assert not torch.allclose(rnn(x)[0], before)
    torch.testing.assert_close(exported(x)[0], before)  # what was exported stays as it was


def test_an_exported_model_holds_lengths_and_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = seqparc.compile(nn.GRUCell(3, 8), backend="torch")
            self.layer = seqparc.compile(nn.LSTM(8, 4, batch_first=True, bidirectional=True), backend="torch")

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(self.rnn(x, lengths=lengths)[0])[0]  # type: ignore[no-any-return]

    model, dim = Model(), torch.export.Dim
    batch = dim("batch", min=2, max=50)
    given = torch.randn(2, 12, 3), torch.tensor([3, 12])
    shapes = ({0: batch, 1: dim("time", min=2, max=5000)}, {0: batch})
    exported = torch.export.export(model, given, dynamic_shapes=shapes).module()
    for size, steps in ((2, 12), (4, 21)):
        x, lengths = torch.randn(size, steps, 3), torch.randint(0, steps + 1, (size,))
        torch.testing.assert_close(exported(x, lengths), model(x, lengths))
