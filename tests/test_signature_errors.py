"""What is refused about a cell's convention, with what it says; and that trials leave no traces."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from seqparc.errors import ShapeError, SignatureError, StateError
from seqparc.signature import discover

B, D, H = 3, 5, 8


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, S = rand(B, D), rand(B, H)
W, U = rand(D, H), rand(H, H) / H


def new(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x @ W + h @ U)


def x_first(x, h):
    return new(x, h)


def out_and_state(x, state):
    h = new(x, state)
    return h[:, :2], h


def state_then_out(x, state):
    h = new(x, state)
    return h, h[:, :2]


def square(a, b):
    return torch.tanh(a @ U + b)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_unhelpful_names_and_equal_shapes_are_ambiguous() -> None:
    with pytest.raises(SignatureError, match=r"square\(a, b\) can be called as \(x, state\) and as \(state, x\).*signature="):
        discover(square, S, B, S)


def test_names_settle_equal_shapes() -> None:
    def cell(prev_h, obs):
        return torch.tanh(prev_h @ U + obs)

    assert discover(cell, S, B, S).order == ("state", "x")


def test_names_that_say_both_are_not_overruled() -> None:
    def cell(x, h):  # takes only x of the state's width: swapped, it would run
        return torch.tanh(x @ U + h.mean(-1, keepdim=True))

    with pytest.raises(SignatureError, match="could not be called"):
        discover(cell, X, B, S)


def test_a_state_that_changes_shape() -> None:
    def grows(x, h):
        return torch.cat((new(x, h), h[:, :1]), -1)

    with pytest.raises(StateError, match=r"cell grows: the state's leaf 0 goes in as float32\[3, 8\] and comes out as float32\[3, 9\]"):
        discover(grows, X, B, S)


def test_a_state_that_changes_dtype() -> None:
    def widens(x, state):
        return new(x, state[0]), state[1].double()

    with pytest.raises(StateError, match=r"leaf 1 goes in as float32.* comes out as float64"):
        discover(widens, X, B, (S, S))


def test_a_state_that_changes_structure() -> None:
    def forgets(x, state):
        return state[0]

    with pytest.raises(StateError, match=r"goes in as \(tensor, tensor\) = .* and comes out as tensor"):
        discover(forgets, X, B, (S, S))


def test_state_before_output_needs_a_signature() -> None:
    with pytest.raises(StateError, match="signature="):
        discover(state_then_out, X, B, S)


def test_call_checks_every_step() -> None:
    found = discover(x_first, X, B, S)
    with pytest.raises(StateError, match=r"goes in as float32\[3, 8\] and comes out as float32\[1, 8\]"):
        found.call(lambda x, h: new(x, h)[:1], [X], [S])
    found = discover(out_and_state, X, B, S)
    with pytest.raises(SignatureError, match="its output was tensor and is now"):
        found.call(lambda x, h: ((h, h), h), [X], [S])


class OnSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mem = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.mem = self.mem + x
        return (self.mem > 1).float()


@pytest.mark.parametrize("state", [None, S])
def test_a_state_kept_on_the_module(state: Tensor | None) -> None:
    cell = OnSelf()
    with pytest.raises(SignatureError, match=r"OnSelf\(x\) takes no state.*keeps its state on itself"):
        discover(cell, X, B, state)
    assert torch.equal(cell.mem, torch.zeros(1))


def test_a_cell_that_needs_more() -> None:
    with pytest.raises(SignatureError, match="no place for x tensor and state tensor, or needs more"):
        discover(lambda x, h, a, b: h, X, B, S)


def test_a_cell_that_fails_says_why() -> None:
    def broken(x, h):
        raise RuntimeError("no such luck")

    with pytest.raises(SignatureError, match="raised RuntimeError: no such luck") as caught:
        discover(broken, X, B, S)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_outputs_have_the_batch_axis() -> None:
    with pytest.raises(SignatureError, match="every output starts with the batch axis"):
        discover(lambda x, h: (h.sum(), h), X, B, S)


def test_batches_agree() -> None:
    with pytest.raises(ShapeError, match="x: leaf 0 has shape"):
        discover(x_first, rand(4, D), B, S)
    with pytest.raises(StateError, match="the state of x_first: leaf 0 has shape"):
        discover(x_first, X, B, rand(4, H))


# -- trials leave no traces ------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Changes everything a cell can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(H)
        self.drop = nn.Dropout(0.5)
        self.gru = nn.GRUCell(D, H)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.steps += 1
        self.last = x
        self.calls += random.randint(1, 9)
        self.cache = x
        return self.drop(self.norm(self.gru(x, h)))


def test_trials_leave_no_traces() -> None:
    cell = Busy().train()
    kept = {k: v.clone() for k, v in cell.state_dict().items()}
    objects = {k: id(v) for k, v in cell.named_buffers()}
    torch.manual_seed(1)
    random.seed(1)
    torch_state, python_state, x, h = torch.get_rng_state(), random.getstate(), X.clone(), S.clone()
    assert discover(cell, X, B, S).order == ("x", "state")
    assert all(torch.equal(v, kept[k]) for k, v in cell.state_dict().items())
    assert {k: id(v) for k, v in cell.named_buffers()} == objects
    assert (cell.calls, hasattr(cell, "cache"), cell.training) == (0, False, True)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert torch.equal(X, x) and torch.equal(S, h)


def test_a_cell_that_writes_into_its_arguments_leaves_them() -> None:
    def writes(x, h):
        x.mul_(0)
        return h.add_(1)

    x, h = X.clone(), S.clone()
    assert discover(writes, x, B, h).returns == "state"
    assert torch.equal(x, X) and torch.equal(h, S)
