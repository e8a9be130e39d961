"""Cells that keep their state on themselves: found, put in, taken out, and left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc

pytestmark = pytest.mark.usefixtures("quick")

B, T, D, N = 3, 37, 5, 8


class Leaky(nn.Module):
    """Fires where its potential passes one, with a gradient of its own; the potential is None until the first call."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(decay))
        self.potential: Tensor | None = None
        self.fired: Tensor | None = None  # written at each step, read by nobody

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.potential is None else self.potential
        now = self.decay * before + x
        soft = torch.sigmoid(4 * (now - 1))
        spike = (now > 1).to(x.dtype).detach() + soft - soft.detach()
        self.potential, self.fired = now * (1 - spike.detach()), spike
        return spike


class Memory(nn.Module):
    """What several libraries of spiking networks do: a dict of their own behind attributes, and a number before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: dict[str, Any] = {"v": 0.5}

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_memories", {}):
            self._memories[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, *args: Tensor) -> Tensor:
        (x,) = args
        if isinstance(self.v, float):
            self.v = torch.full_like(x, self.v)
        self.v = torch.tanh(0.8 * self.v + x)
        return 2 * self.v


class Buffered(nn.Module):
    """A buffer, written in place, that takes the batch's size when it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D + N, N)
        self.register_buffer("h", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.h.shape != (len(x), N):
            self.h = x.new_zeros(len(x), N)
        self.h = torch.tanh(self.linear(torch.cat([x, self.h], 1)))
        return self.h.sum(1, keepdim=True)


class Nested(nn.Module):
    """A pair in an attribute, made by a cell that is no cell of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.LSTMCell(D, N), None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, self.state)
        return self.state[0] - self.state[1]


class Boxed(nn.Module):
    """A dict that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.box: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.box["h"] = torch.sin(0.5 * self.box.get("h", torch.zeros_like(x)) + x)
        return self.box["h"]


CELLS = {
    "surrogate": (Leaky, {"potential"}),
    "dict of its own": (Memory, {"v"}),
    "buffer": (Buffered, {"h"}),
    "pair": (Nested, {"state"}),
    "two layers": (lambda: nn.Sequential(nn.Linear(D, N), Leaky(), nn.Linear(N, 4), Memory()), {"1.potential", "3.v"}),
}


def relative(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())


def plain(cell: nn.Module, x: Tensor) -> Tensor:
    """The loop that the user would write."""
    return torch.stack([cell(x[:, t]) for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("name", CELLS)
def test_the_loop_s_answers(name: str) -> None:
    make, names = CELLS[name]
    cell = make()
    x = torch.randn(B, T, D, requires_grad=True)
    rnn = seqparc.compile(cell)
    y, last = rnn(x)
    assert rnn.stats.backend == "c" and set(last) == names
    weight = torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)
    mine = torch.autograd.grad((y * weight).sum(), [x, *cell.parameters()])
    expected = plain(cell, x)
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *cell.parameters()])
    assert relative(y, expected) < 1e-6
    assert max(relative(a, b) for a, b in zip(mine, theirs, strict=True)) < 2e-5
    now = seqparc.held.attributes(cell)  # the plain loop left its last state there
    for key, value in last.items():
        for a, b in zip(seqparc.tree.flatten(value)[0], seqparc.tree.flatten(now[key])[0], strict=True):
            assert relative(a, b) < 1e-6
    assert relative(rnn(x)[0], plain(cell, x)) < 1e-6  # both go on from there


@pytest.mark.parametrize("name", CELLS)
def test_the_cell_is_left_as_it_was(name: str) -> None:
    cell = CELLS[name][0]()
    before = {k: v for k, v in seqparc.held.attributes(cell).items() if not isinstance(v, nn.Module)}
    x = torch.randn(B, T, D, requires_grad=True)
    rnn = seqparc.compile(cell)
    rnn(x)[0].sum().backward()
    rnn.validate(x.detach())
    after = {k: v for k, v in seqparc.held.attributes(cell).items() if not isinstance(v, nn.Module)}
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)


def test_a_state_that_is_given() -> None:
    cell = Buffered()
    rnn = seqparc.compile(cell)
    x, h = torch.randn(B, T, D), torch.randn(B, N, requires_grad=True)
    y, last = rnn(x, {"h": h})
    again, _ = rnn(torch.randn(B, T, D), last)  # carried on
    cell.h = h
    expected = plain(cell, x)
    assert relative(y, expected) < 1e-6 and again.shape == y.shape
    mine, theirs = (torch.autograd.grad(v.sum(), h)[0] for v in (y, expected))
    assert relative(mine, theirs) < 1e-5
    assert relative(seqparc.compile(Buffered(), state={"h": torch.ones(N)})(x)[0], y) > 1e-3


def test_one_step_at_a_time_and_lengths() -> None:
    cell = Nested()
    rnn = seqparc.compile(cell)
    x = torch.randn(B, T, D)
    y, _ = rnn(x)
    state, rows = None, []
    for t in range(4):
        row, state = rnn.step(x[:, t], state)
        rows.append(row)
    assert relative(torch.stack(rows, 1), y[:, :4]) < 1e-6
    short, last = rnn(x, lengths=torch.tensor([4, T, 1]))
    assert relative(short[0, :4], y[0, :4]) < 1e-6 and not short[0, 4:].any()
    assert relative(last["state"][0][0], state["state"][0][0]) < 1e-6


def test_state_that_is_held_and_state_that_is_passed_do_not_mix() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.count += 1
            return torch.tanh(x + h / self.count)

    with pytest.raises(seqparc.StateError, match=r"Both changes count at each step.*results depend on it"):
        seqparc.compile(Both())(torch.randn(B, T, N), torch.zeros(B, N))


def test_notes_that_nobody_reads_are_no_state() -> None:
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.gate = 0, None

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.seen += 1
            self.gate = torch.sigmoid(x)
            return self.gate * h + x

    y, last = (rnn := seqparc.compile(Notes()))(torch.randn(B, T, N), torch.zeros(B, N))
    assert isinstance(last, Tensor) and y.shape == (B, T, N) and rnn.cell.seen == 0


def test_what_is_no_tensor_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.h = 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.h = x if self.h is None else 0.5 * self.h + x * self.steps
            return self.h

    with pytest.raises(seqparc.StateError, match=r"Counter (changes steps at each step|keeps its state on itself)"):
        seqparc.compile(Counter())(torch.randn(B, T, N))


def test_a_start_of_its_own_is_asked_for() -> None:
    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.h = torch.tanh(x + (torch.ones_like(x) if self.h is None else self.h))
            return self.h

    x = torch.randn(B, T, N)
    with pytest.raises(seqparc.StateError, match=r"Warm keeps its state on itself \(h\) and starts from something else than zeros"):
        seqparc.compile(Warm())(x)
    assert relative(seqparc.compile(Warm(), state={"h": torch.ones(N)})(x)[0], plain(Warm(), x)) < 1e-6


def test_a_signature_without_a_state() -> None:
    x = torch.randn(B, T, D)
    y, last = seqparc.compile(Boxed(), signature="x -> out", state={"box": {"h": torch.zeros(D)}})(x)
    assert relative(y, plain(Boxed(), x)) < 1e-6 and relative(last["box"]["h"], y[:, -1]) < 1e-7
    with pytest.raises(seqparc.StateError, match="names no state, and Linear changes none of its attributes"):
        seqparc.compile(nn.Linear(D, D), signature="x -> out")(x)
    with pytest.raises(seqparc.StateError, match=r"keeps its state on itself: it is a dict .*h"):
        seqparc.compile(Buffered(), signature="x -> out")(x, torch.zeros(B, N))
