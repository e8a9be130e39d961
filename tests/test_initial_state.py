"""The state before the first step: the four ways to it, in their order, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqparc.errors import StateError
from seqparc.signature import Convention, Structure, broadcast_state, discover, flatten, initial_state

B, D, H = 3, 5, 8


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, S = rand(B, D), rand(B, H)
W, U = rand(D, H), rand(H, H) / H


def new(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x @ W + h @ U)


def pair(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return new(x, h), new(x, c) * 0.5


def x_first(x, h):
    return new(x, h)


def test_broadcast_state_expands_and_keeps_the_gradient() -> None:
    h0 = nn.Parameter(torch.ones(H))
    state = broadcast_state({"h": h0, "n": torch.zeros(())}, 4)
    assert state["h"].shape == (4, H) and state["n"].shape == (4,)
    state["h"].sum().backward()
    assert torch.equal(h0.grad, torch.full((H,), 4.0))


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("cell, count", [(nn.RNNCell(D, H), 1), (nn.GRUCell(D, H).double(), 1), (nn.LSTMCell(D, H), 2)])
def test_torch_cells(cell: nn.Module, count: int, batch: int) -> None:
    dtype = next(cell.parameters()).dtype
    x = rand(batch, D).to(dtype)
    leaves, structure = flatten(initial_state(cell, x, batch))
    assert structure == (Structure("leaf") if count == 1 else flatten((S, S))[1])
    assert all(t.shape == (batch, H) and t.dtype == dtype and not t.any() for t in leaves)
    assert discover(cell, x, batch).returns == "state"


def test_given_comes_first() -> None:
    cell = nn.LSTMCell(D, H)
    h, c = initial_state(cell, X, B, None, (torch.ones(H), torch.zeros(H)))
    assert h.shape == c.shape == (B, H) and h.all() and not c.any()
    assert torch.equal(initial_state(cell, X, B, None, lambda n: torch.full((n, 2), 7.0)), torch.full((B, 2), 7.0))
    with pytest.raises(StateError, match="the state= given for LSTMCell: leaf 0 has shape"):
        initial_state(cell, X, B, None, lambda n: torch.zeros(2, n))


@pytest.mark.parametrize("method", ["init_state", "initial_state", "init_hidden"])
def test_methods(method: str) -> None:
    cell = nn.GRUCell(D, H)
    setattr(cell, method, lambda batch: torch.ones(batch, H))
    assert torch.equal(initial_state(cell, X, B), torch.ones(B, H))
    setattr(cell, method, lambda batch: torch.ones(1, batch, H))
    with pytest.raises(StateError, match=rf"{method}.*first axis must be the batch"):
        initial_state(cell, X, B)
    setattr(cell, method, lambda batch, device: None)
    with pytest.raises(StateError, match=rf"{method}.*raised TypeError"):
        initial_state(cell, X, B)


def none_pair(x, state=None):
    h, c = (torch.zeros(len(x), H), torch.zeros(len(x), H)) if state is None else (state[0], state[1])
    return pair(x, h, c)


def none_separate(x, h=None, c=None):
    h = torch.zeros(len(x), H) if h is None else h
    c = torch.zeros(len(x), H) if c is None else c
    return -h, *pair(x, h, c)


def none_separate_pair(x, h=None, c=None):
    h = torch.zeros(len(x), H) if h is None else h
    c = torch.zeros(len(x), H) if c is None else c
    return pair(x, h, c)


def none_writes(x, state=None):
    x.mul_(2)
    return new(x, torch.zeros(len(x), H) if state is None else state)


def none_out(x, state=None, mask=None):
    h = torch.zeros(len(x), H) if state is None else state
    return h[:, :2], new(x, h if mask is None else h * mask)


def none_dict(x, state=None):
    state = {"h": torch.zeros(len(x), H)} if state is None else state
    return x, {"h": new(x, state["h"])}


@pytest.mark.parametrize(
    "cell, text, order",
    [
        (none_pair, "(tensor, tensor)", ("x", "state")),
        (none_separate, "(tensor, tensor)", ("x", "state.0", "state.1")),
        (none_separate_pair, "(tensor, tensor)", ("x", "state.0", "state.1")),
        (none_writes, "tensor", ("x", "state")),
        (none_out, "tensor", ("x", "state")),
        (none_dict, "{'h': tensor}", ("x", "state")),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_what_none_means(cell: Any, text: str, order: tuple[str, ...], batch: int) -> None:
    x = rand(batch, D)
    leaves, structure = flatten(initial_state(cell, x, batch))
    assert repr(structure) == text and all(t.shape == (batch, H) and not t.any() for t in leaves)
    assert discover(cell, x, batch).order == order


class Learned(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.gru = nn.GRUCell(D, H)
        self.h0 = nn.Parameter(torch.full((H,), value))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.gru(x, self.h0.expand(len(x), H) if state is None else state)


@pytest.mark.parametrize("value", [0.5, 0.0])  # a learned state that is zero today will not stay so
def test_a_learned_initial_state_is_not_taken_for_zeros(value: float) -> None:
    cell = Learned(value)
    with pytest.raises(StateError, match=r"Learned starts from a state of its own when it is given None.*state="):
        discover(cell, X, B)
    given = initial_state(cell, X, B, None, cell.h0)
    given.sum().backward()
    assert torch.equal(cell.h0.grad, torch.full((H,), float(B)))


def test_a_random_initial_state_is_not_taken_for_zeros() -> None:
    def cell(x, state=None):
        return new(x, torch.randn(len(x), H) if state is None else state)

    with pytest.raises(StateError, match="a state of its own"):
        initial_state(cell, X, B)


class Sized(nn.Module):
    def __init__(self, leaves: int) -> None:
        super().__init__()
        self.hidden_size, self.leaves = H, leaves
        self.lin = nn.Linear(D, H, dtype=torch.float64)

    def forward(self, x: Tensor, state: Any) -> Any:
        if self.leaves == 1:
            return self.lin(x) + state
        return state[0] + self.lin(x), state[1] * self.lin(x)  # a tensor in the pair's place would do, and give (out, state)


@pytest.mark.parametrize("leaves", [1, 2])
def test_hidden_size(leaves: int) -> None:
    state, _ = flatten(initial_state(Sized(leaves), X.double(), B))
    assert [(t.shape, t.dtype) for t in state] == [((B, H), torch.float64)] * leaves


def test_hidden_size_that_does_not_fit_is_said() -> None:
    cell = Sized(1)
    cell.hidden_size = H + 1
    with pytest.raises(StateError, match=r"It has hidden_size 9, but neither"):
        initial_state(cell, X.double(), B)


def test_an_unknown_initial_state_names_the_four_ways() -> None:
    with pytest.raises(StateError) as caught:
        initial_state(x_first, X, B)
    assert all(way in str(caught.value) for way in ("state=", "init_state(batch)", "None", "hidden_size"))


def test_a_convention_or_signature_says_where_none_goes() -> None:
    def cell(a, b=None):
        return new(a, torch.zeros(len(a), H) if b is None else b)

    assert discover(cell, X, B, None, "x, state -> state").order == ("x", "state")
    convention = Convention(("x", "state"), Structure("leaf"), Structure("leaf"))
    assert initial_state(cell, X, B, convention).shape == (B, H)


def test_separate_states_by_signature() -> None:
    found = discover(none_separate, X, B, None, "x, h, c -> y, h, c")
    assert found.separate and found.state == flatten((S, S))[1]
