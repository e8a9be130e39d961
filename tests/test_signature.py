"""How cells are called: every convention in a table, and every signature string."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqparc.errors import SignatureError, StateError
from seqparc.signature import discover, flatten

B, D, H = 3, 5, 8


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, DT, S = rand(B, D), rand(B, 1), rand(B, H)
W, U = rand(D, H), rand(H, H) / H


def new(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x @ W + h @ U)


def pair(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return new(x, h), new(x, c) * 0.5


HC = namedtuple("HC", "h c")


@dataclass
class Carry:
    h: Tensor
    c: Tensor


# -- conventions: one row each ---------------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D + H, H)

    def forward(self, hidden: Tensor, inp: Tensor) -> Tensor:
        return torch.tanh(self.lin(torch.cat((inp, hidden), -1)))


def x_first(x, h):
    return new(x, h)


def state_first(carry, x):
    h = new(x, carry)
    return h, h


def unnamed_second(a, b):
    return new(b, a)


def out_and_state(x, state):
    h = new(x, state)
    return h[:, :2], h


def same_shaped_out(x, state):
    h = new(x, state)
    return -h, h


def tuple_state(x, state):
    h, c = state
    return pair(x, h, c)


def out_and_tuple(x, state):
    new_state = pair(x, *state)
    return new_state[0], new_state


def out_and_flat(x, state):
    return (-state[0], *pair(x, *state))


def list_state(x, state):
    return list(pair(x, *state))


def list_to_tuple(x, state):
    return pair(x, *state)


def dict_state(x, state):
    h, c = pair(x, state["h"], state["c"])
    return {"c": c, "h": h}  # another order of keys


def named_state(x, state):
    return HC(*pair(x, state.h, state.c))


def class_state(x, state):
    return {"y": state.h}, Carry(*pair(x, state.h, state.c))


def separate(x, h, c):
    return pair(x, h, c)


def separate_with_out(x, h, c):
    return (-h, *pair(x, h, c))


def separate_out_pair(x, h, c):
    return -h, pair(x, h, c)


def separate_first(h, c, x):
    return pair(x, h, c)


def optional_flag(x, state, verbose=False):
    assert verbose is False
    return pair(x, *state)


def with_dt(x, dt, state):
    return new(x * dt, state)


def dt_last(x, hx, dt=None):
    return new(x * dt, hx)


def tree_x(x, state):
    a, dt = x
    return new(a * dt, state)


def dict_x(x, state):
    return new(x["a"] * x["dt"], state)


def by_name(inp, h, gate):
    return new(inp * gate, h)


def keyword_only(h, *, inp, gate):
    return new(inp * gate, h)


def variadic(*args):
    x, h = args
    return new(x, h)


XDT = (X, DT)
NAMED = {"gate": DT, "inp": X}
CASES: list[tuple[Any, Any, Any, tuple[str, ...], str]] = [
    # cell, x, state, order, returns
    (x_first, X, S, ("x", "state"), "state"),
    (Module(), X, S, ("state", "x"), "state"),
    (Module().forward, X, S, ("state", "x"), "state"),
    (state_first, X, S, ("state", "x"), "out, state"),
    (unnamed_second, X, S, ("state", "x"), "state"),
    (variadic, X, S, ("x", "state"), "state"),
    (out_and_state, X, S, ("x", "state"), "out, state"),
    (same_shaped_out, X, S, ("x", "state"), "out, state"),
    (tuple_state, X, (S, S), ("x", "state"), "state"),
    (out_and_tuple, X, (S, S), ("x", "state"), "out, state"),
    (out_and_flat, X, (S, S), ("x", "state"), "out, state.0, state.1"),
    (list_state, X, [S, S], ("x", "state"), "state"),
    (list_to_tuple, X, [S, S], ("x", "state"), "state"),
    (dict_state, X, {"h": S, "c": -S}, ("x", "state"), "state"),
    (named_state, X, HC(S, S), ("x", "state"), "state"),
    (class_state, X, Carry(S, S), ("x", "state"), "out, state"),
    (separate, X, (S, -S), ("x", "state.0", "state.1"), "state"),
    (separate, X, HC(S, -S), ("x", "state.0", "state.1"), "state"),
    (separate_with_out, X, (S, -S), ("x", "state.0", "state.1"), "out, state.0, state.1"),
    (separate_out_pair, X, (S, -S), ("x", "state.0", "state.1"), "out, state"),
    (separate_first, X, (S, -S), ("state.0", "state.1", "x"), "state"),
    (optional_flag, X, (S, S), ("x", "state"), "state"),
    (with_dt, XDT, S, ("x.0", "x.1", "state"), "state"),
    (dt_last, XDT, S, ("x.0", "state", "x.1"), "state"),
    (tree_x, XDT, S, ("x", "state"), "state"),
    (dict_x, {"a": X, "dt": DT}, S, ("x", "state"), "state"),
    (by_name, NAMED, S, ("x.1", "state", "x.0"), "state"),
    (keyword_only, NAMED, S, ("state", "x.1", "x.0"), "state"),
    (nn.GRUCell(D, H), X, S, ("x", "state"), "state"),
    (nn.LSTMCell(D, H), X, (S, -S), ("x", "state"), "state"),
]


@pytest.mark.parametrize("cell, x, state, order, returns", CASES, ids=lambda v: getattr(v, "__name__", None))
def test_found_out(cell: Any, x: Any, state: Any, order: tuple[str, ...], returns: str) -> None:
    found = discover(cell, x, B, state)
    assert (found.order, found.returns) == (order, returns)
    assert found.separate == ("state.0" in order) and found.spread_x == ("x.0" in order)
    assert (found.out is not None) == returns.startswith("out") and hash(found) == hash(discover(cell, x, B, state))


def _eager(cell: Any, x: Any, state: Any) -> Any:
    """The same step written by hand, for the rows whose arguments are not simply (x, state)."""
    calls = {
        separate: lambda: separate(x, *state), separate_with_out: lambda: separate_with_out(x, *state),
        separate_out_pair: lambda: separate_out_pair(x, *state), separate_first: lambda: separate_first(*state, x),
        with_dt: lambda: with_dt(*x, state), dt_last: lambda: dt_last(x[0], state, x[1]),
        by_name: lambda: by_name(**x, h=state), keyword_only: lambda: keyword_only(state, **x),
        state_first: lambda: state_first(state, x), unnamed_second: lambda: unnamed_second(state, x),
    }  # fmt: skip
    if isinstance(getattr(cell, "__self__", cell), Module):
        return cell(state, x)
    return calls.get(cell, lambda: cell(x, state))()


@pytest.mark.parametrize("cell, x, state, order, returns", CASES, ids=lambda v: getattr(v, "__name__", None))
def test_call_gives_what_the_cell_gives(cell: Any, x: Any, state: Any, order: tuple[str, ...], returns: str) -> None:
    found = discover(cell, x, B, state)
    before = flatten(state)[0]
    out, after = found.call(cell, flatten(x)[0], before)
    result = _eager(cell, x, state)
    wanted = result if returns == "state" else (result[1] if returns == "out, state" else tuple(result[1:]))
    if isinstance(wanted, dict):
        wanted = {k: wanted[k] for k in state}
    assert all(torch.equal(a, b) for a, b in zip(after, flatten(wanted)[0], strict=True))
    assert out is None if returns == "state" else all(map(torch.equal, out, flatten(result[0])[0]))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_a_batch_as_long_as_a_tuple_is_not_unpacked_in_its_place(batch: int) -> None:
    x, h = rand(batch, D), rand(batch, H)
    with pytest.raises((StateError, SignatureError)):
        discover(tuple_state, x, batch, h)
    assert discover(tuple_state, x, batch, (h, h)).returns == "state"


# -- signatures ------------------------------------------------------------------------------------------------------


def square(a, b):
    return torch.tanh(a @ U + b)


def state_then_out(x, state):
    h = new(x, state)
    return h, h[:, :2]


def swapped(x, c, h):
    h, c = pair(x, h, c)
    return h, c


def three(x, state):
    h = new(x, state)
    return -h, h, h[:, :1]


SIGNATURES: list[tuple[Any, Any, Any, str, tuple[str, ...], str]] = [
    (square, S, S, "x, state -> state", ("x", "state"), "state"),
    (square, S, S, "state, x -> state", ("state", "x"), "state"),
    (square, S, S, "u,h->h", ("x", "state"), "state"),
    (out_and_state, X, S, "x, state -> out, state", ("x", "state"), "out, state"),
    (state_then_out, X, S, "x, state -> state, out", ("x", "state"), "state, out"),
    (separate, X, (S, -S), "x, h, c -> h, c", ("x", "state.0", "state.1"), "state.0, state.1"),
    (separate_with_out, X, (S, -S), "x, h, c -> y, h, c", ("x", "state.0", "state.1"), "out, state.0, state.1"),
    (separate_out_pair, X, (S, -S), "x, h, c -> y, h, c", ("x", "state.0", "state.1"), "out, state"),
    (swapped, X, (S, -S), "x, c, h -> h, c", ("x", "state.0", "state.1"), "state.1, state.0"),
    (with_dt, XDT, S, "x, dt, state -> state", ("x.0", "x.1", "state"), "state"),
    (dt_last, XDT, S, "x, state, dt -> state", ("x.0", "state", "x.1"), "state"),
    (three, X, S, "x, state -> y, state, gate", ("x", "state"), "out.0, state, out.1"),
]


@pytest.mark.parametrize("cell, x, state, signature, order, returns", SIGNATURES)
def test_a_signature_settles_it(cell: Any, x: Any, state: Any, signature: str, order: tuple[str, ...], returns: str) -> None:
    found = discover(cell, x, B, state, signature)
    assert (found.order, found.returns) == (order, returns)


def test_states_named_in_another_order_come_back_in_their_places() -> None:
    c, h = S, -S
    _, after = discover(swapped, X, B, (c, h), "x, c, h -> h, c").call(swapped, [X], [c, h])
    wanted_h, wanted_c = swapped(X, c, h)
    assert torch.equal(after[0], wanted_c) and torch.equal(after[1], wanted_h)


def test_further_outputs_form_a_tuple() -> None:
    found = discover(three, X, B, S, "x, state -> y, state, gate")
    out, after = found.call(three, [X], [S])
    assert repr(found.out) == "(tensor, tensor)" and torch.equal(out[0], -after[0]) and torch.equal(out[1], after[0][:, :1])


@pytest.mark.parametrize(
    "signature, says",
    [
        ("x, state", "not of the form"),
        ("x state -> state", "not of the form"),
        ("x, -> x", "not of the form"),
        ("x, x -> x", "not of the form"),
        ("x, h -> h -> h", "not of the form"),
        ("", "not of the form"),
        ("x, state -> out", "names no state"),
        ("x, h -> state", "names no state"),
        ("state -> state", "0 inputs"),
        ("x, dt, z, state -> state", "3 inputs"),
        ("x, a, b, c -> a, b, c", "3 state arguments"),
    ],
)
def test_a_malformed_signature_is_named(signature: str, says: str) -> None:
    with pytest.raises(SignatureError, match=says):
        discover(tuple_state, X, B, (S, S), signature)


def test_a_signature_the_cell_does_not_keep() -> None:
    with pytest.raises(StateError, match=r"was to return \(out, state\)"):
        discover(x_first, X, B, S, "x, state -> out, state")
