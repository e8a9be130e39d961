"""nn.RNN, nn.GRU and nn.LSTM compiled: the same as the modules they were, in every way they can be called."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqparc

pytestmark = pytest.mark.usefixtures("quick")

KINDS: dict[str, Any] = {
    "RNN": lambda **k: nn.RNN(3, 4, **k),
    "RNN relu": lambda **k: nn.RNN(3, 4, nonlinearity="relu", **k),
    "GRU": lambda **k: nn.GRU(3, 4, **k),
    "LSTM": lambda **k: nn.LSTM(3, 4, **k),
    "LSTM with a projection": lambda **k: nn.LSTM(3, 4, proj_size=2, **k),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2, "batch_first": True},
    "no bias": {"bias": False},
}


def flat(result: Any) -> list[Tensor]:
    """The tensors of what a layer returns."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def same(layer: nn.Module, compiled: nn.Module, *given: Any, tolerance: float = 1e-10) -> None:
    """Results and gradients of both, of everything that has one."""
    leaves = [t for g in given for t in ([g] if isinstance(g, Tensor) else g if isinstance(g, tuple) else []) if isinstance(t, Tensor)]
    found = []
    for module in (layer, compiled):
        results = flat(module(*given))
        total = sum(((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in results), torch.zeros(()))
        wanted = [t for t in leaves if t.requires_grad]
        found.append([*results, *torch.autograd.grad(total, [*wanted, *module.parameters()])])
    for right, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_what_it_was(kind: str, way: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](**WAYS[way]).double()
    compiled = seqparc.compile(layer)
    assert isinstance(compiled, type(layer)) and compiled is not layer and type(layer).__module__.startswith("torch.")
    assert list(compiled.state_dict()) == list(layer.state_dict()) and compiled.weight_hh_l0 is layer.weight_hh_l0
    same(layer, compiled, torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True))
    assert {s.backend for s in compiled.stats.values()} == {"c"}
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(count, 2, n, dtype=torch.float64) for n in ([layer.proj_size or 4, 4] if layer.mode == "LSTM" else [4])]
    x = torch.randn(*((2, 9) if layer.batch_first else (9, 2)), 3, dtype=torch.float64, requires_grad=True)
    for s in states:
        s.requires_grad_()
    same(layer, compiled, x, tuple(states) if layer.mode == "LSTM" else states[0])


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("way", ["both directions", "plain"])
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences(kind: str, way: str, ordered: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](**WAYS[way]).double()
    compiled = seqparc.compile(layer)
    lengths = [7, 4, 4, 1] if ordered else [4, 7, 1, 4]
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths], enforce_sorted=ordered)
    same(layer, compiled, packed)
    mine, right = compiled(packed)[0], layer(packed)[0]
    assert all(a is b or torch.equal(a, b) for a, b in zip(mine[1:], right[1:], strict=True))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, 4, 4, dtype=torch.float64)
    same(layer, compiled, packed, (h, h * 2) if layer.mode == "LSTM" else h)


def test_without_a_batch() -> None:
    for kind in KINDS:
        layer = KINDS[kind](bidirectional=True).double()
        same(layer, seqparc.compile(layer), torch.randn(6, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_seeded_run_drops_out_the_same(batch_first: bool) -> None:
    layer = nn.GRU(3, 4, num_layers=3, dropout=0.4, batch_first=batch_first).double()
    compiled, x = seqparc.compile(layer), torch.randn(5, 5, 3, dtype=torch.float64)
    results = []
    for module in (layer, compiled):
        torch.manual_seed(7)
        results.append(module(x)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compiled.eval()(x)[0], layer.eval()(x)[0], rtol=1e-10, atol=1e-10)


def test_a_seeded_run_drops_out_of_what_is_packed_the_same() -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5).double()
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (2, 6, 4)], enforce_sorted=False)
    results = []
    for module in (layer, seqparc.compile(layer)):
        torch.manual_seed(7)
        results.append(module(packed)[0].data)
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_a_layer_is_traced_before_it_was_ever_called() -> None:
    model = Model()
    right = model(x := torch.randn(2, 9, 3))
    seqparc.convert(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), right)


def test_a_compiled_layer_is_not_compiled_again() -> None:
    compiled = seqparc.compile(nn.GRU(3, 4))
    assert seqparc.compile(compiled) is compiled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(3, 4, batch_first=True)
        self.rest = nn.ModuleList([nn.LSTM(4, 4, batch_first=True, bidirectional=True), nn.Linear(8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[1](self.rest[0](self.first(x)[0])[0])  # type: ignore[no-any-return]


def test_a_model_is_converted_in_place() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 30, 3)
    right, keys, parameters = model(x), list(model.state_dict()), list(model.parameters())
    assert seqparc.convert(model) == ["first: GRU, 3 to 4, 1 layer", "rest.0: LSTM, 4 to 4, 1 layer, bidirectional"]
    torch.testing.assert_close(model(x), right)
    assert list(model.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert seqparc.convert(model) == []
    model.load_state_dict(Model().state_dict())


def test_what_is_done_with_modules_can_be_done_with_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3)
    model = Model()
    seqparc.convert(model, options={"strategy": "sequential"})
    right = model(x)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (copy.deepcopy(model), torch.load(held, weights_only=False)):
        torch.testing.assert_close(other(x), right)
        assert other.first.stats[0, 0].strategy == "sequential" and other.first.weight_ih_l0 is not model.first.weight_ih_l0
    doubled = copy.deepcopy(model).double()
    torch.testing.assert_close(doubled(x.double()).float(), right)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    assert float((model(x) - right).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((torch.zeros(3, 2, 5),), "must be equal to input_size. Expected 3, got 5"),
        ((torch.zeros(3),), "Expected input to be 2D or 3D, got 1D"),
        ((torch.zeros(3, 2, 3), torch.zeros(1, 3, 4)), r"Expected hidden size \(1, 2, 4\), got \[1, 3, 4\]"),
    ],
)
def test_bad_input_is_refused_as_torch_does(given: tuple[Tensor, ...], told: str) -> None:
    layer = nn.GRU(3, 4)
    for module in (layer, seqparc.compile(layer)):
        with pytest.raises((RuntimeError, ValueError), match=told):
            module(*given)


def test_a_state_for_a_layer_is_refused() -> None:
    with pytest.raises(seqparc.SignatureError, match="GRU is called as torch calls it"):
        seqparc.compile(nn.GRU(3, 4), state=torch.zeros(4))
