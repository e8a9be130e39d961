"""States that depend on each other one way only, solved one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.stages import largest_group, order

pytestmark = pytest.mark.usefixtures("quick")

B, T, D, N = 3, 61, 4, 12


def lower(*blocks: str) -> np.ndarray:
    """A pattern of leaves of three numbers: 0 nothing, 1 each its own, # all."""
    tile = {"0": np.zeros((3, 3), bool), "1": np.eye(3, dtype=bool), "#": np.ones((3, 3), bool)}
    return np.block([[tile[c] for c in row] for row in blocks])


@pytest.mark.parametrize("rows, limit, found", [
    (("#0", "##"), 2, [(0,), (1,)]),
    (("##", "0#"), 2, [(1,), (0,)]),
    (("##", "##"), 2, [(0, 1)]),
    (("#0", "##"), 6, [(0, 1)]),  # six numbers are run as a whole
    (("10", "11"), 2, [(0, 1)]),  # a pair of numbers is one lane
    (("1000", "1100", "0#10", "0011"), 2, [(0, 1), (2, 3)]),  # two layers of pairs
    (("#0", "10"), 2, [(0, 1)]),  # what is no recurrence stays with what it is made of
    (("#1", "00"), 2, [(1,), (0,)]),  # an input of the step before
    (("#0#", "0#0", "00#"), 2, [(1,), (2,), (0,)]),
])  # fmt: skip
def test_order(rows: tuple[str, ...], limit: int, found: list[tuple[int, ...]]) -> None:
    assert order(lower(*rows), [3] * len(rows), limit) == found


def test_groups_that_meet() -> None:
    assert [largest_group(lower(*rows)) for rows in (("10", "01"), ("10", "11"), ("#0", "0#"), ("#0", "1#"))] == [1, 2, 3, 6]


class Stack(nn.Module):
    """Two layers of torch's own, with dropout between them in training."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.GRUCell(D, N), nn.LSTMCell(N, N), nn.Dropout(p)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, (k, c) = state
        h = self.one(x, h)
        k, c = self.two(self.drop(h), (k, c))
        return k + x.sum(1, keepdim=True), (h, (k, c))


class Skip(nn.Module):
    """A later state that reads an earlier one before and after the step, and the input of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D + N, N), nn.Linear(3 * N + D, N)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = state["a"], state["b"]
        after = torch.tanh(self.a(torch.cat([x, a], 1)))
        b = torch.sigmoid(self.b(torch.cat([a, after * a, b, state["x"]], 1))) - 0.5
        return {"a": after, "b": b, "x": x}


class Spikes(nn.Module):
    """A layer of neurons on each number, a mixing layer, and another: the spikes have a gradient of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(N, N)
        self.into = nn.Linear(D, N)

    @staticmethod
    def fire(v: Tensor) -> Tensor:
        soft = torch.sigmoid(3 * (v - 0.5))
        return (v > 0.5).to(v.dtype).detach() + soft - soft.detach()

    def forward(self, x: Tensor, i: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i = 0.5 * i + self.into(x)
        v = 0.8 * v + i
        one = self.fire(v)
        v = v - 0.5 * one
        w = 0.7 * w + self.mix(one)
        two = self.fire(w)
        return two, i, v, w - 0.5 * two


class Turned(nn.Module):
    """A complex state that drives a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.pole, self.u = nn.Parameter(0.9 * torch.exp(1j * torch.rand(N))), nn.Linear(2 * N, N)

    def forward(self, x: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.pole * z + x.sum(1, keepdim=True)
        h = torch.tanh(self.u(torch.cat([z.real, h], 1)))
        return h * z.imag, z, h


CELLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[tuple[int, ...]]]] = {
    "stack": (Stack, lambda: (r(N), (r(N), r(N))), [(0,), (1, 2)]),
    "skip": (Skip, lambda: {"a": r(N), "b": r(N), "x": r(D)}, [(0,), (2,), (1,)]),
    "spikes": (Spikes, lambda: (r(N), r(N), r(N)), [(0, 1), (2,)]),
    "turned": (Turned, lambda: (torch.complex(r(N), r(N)), r(N)), [(0,), (1,)]),
}


def r(*shape: int) -> Tensor:
    return 0.5 * torch.randn(B, *shape)


def results(call: Callable[..., Any], x: Tensor, state: Any, wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t for part in call(x, state) for t in seqparc.tree.flatten(part)[0]]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in leaves]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in real)
    return leaves, list(torch.autograd.grad(loss, wanted))


def apart(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name, backend", [*((name, "c") for name in CELLS), ("spikes", "torch")])
def test_values_and_gradients(name: str, backend: str) -> None:
    make, start, stages = CELLS[name]
    cell, state, x = make(), start(), torch.randn(B, T, D, requires_grad=True)
    leaves, structure = seqparc.tree.flatten(state)
    state = structure.unflatten([t.requires_grad_() for t in leaves])
    wanted = [x, *leaves, *cell.parameters()]
    rnn = seqparc.compile(cell, backend=backend, options=seqparc.Options(strategy="shooting", chunks=3, warmup=8, on_divergence="raise"))
    mine, grads = results(rnn, x, state, wanted)
    engine = rnn.engine()
    assert [s.leaves for s in engine.plan.stages] == stages
    assert rnn.stats.backend == backend and rnn.stats.strategy == "shooting" and rnn.stats.backward.chunks == 3
    theirs, right = results(rnn.sequential, x, state, wanted)
    assert apart(mine, theirs) < 2e-6 and apart(grads, right) < 2e-5


def test_each_stage_has_the_lanes_of_its_own_states() -> None:
    rnn = seqparc.compile(Spikes())
    rnn(torch.randn(B, T, D), (r(N), r(N), r(N)))
    first, second = (part.plan for _, part in rnn.engine().parts)
    assert first.program.lanes == second.program.lanes == N and first.scalar and second.scalar
    assert set(rnn.kernels()) == {("c", "forward"), ("c", "forward 2")}
    told = str(rnn.explain())
    assert "state 2 (12 numbers): a recurrence, given state 0, 1" in told and "lanes 2" in told
    assert "diagonal, zero, zero; diagonal, diagonal, zero; dense, dense, diagonal" in told


def test_the_loop_s_random_numbers_between_stages() -> None:
    cell, x = Stack(0.4), torch.randn(B, T, D)
    rnn = seqparc.compile(cell)
    state = (r(N), (r(N), r(N)))
    torch.manual_seed(3)
    y, _ = rnn(x, state)
    assert rnn.engine().plan.stages
    torch.manual_seed(3)
    assert torch.allclose(y, rnn.sequential(x, state)[0], atol=2e-6)


def test_lengths_resets_single_steps_and_validate() -> None:
    cell, x = Skip(), torch.randn(B, T, D)
    state = {"a": r(N), "b": r(N), "x": r(D)}
    rnn = seqparc.compile(cell)
    lengths, reset = torch.tensor([T, 7, 1]), torch.zeros(B, T, dtype=torch.bool)
    reset[:, 5] = True
    y, last = rnn(x, state, lengths=lengths, reset=reset)
    for b in range(B):
        now = start = {k: v[b : b + 1] for k, v in state.items()}
        for t in range(int(lengths[b])):
            now = cell(x[b : b + 1, t], start if reset[b, t] else now)
        assert all(torch.allclose(last[k][b], now[k][0], atol=1e-6) for k in now)
        assert torch.allclose(y["b"][b, int(lengths[b]) - 1], now["b"][0], atol=1e-6)
    one, _ = rnn.step(x[:, 0], state)
    assert torch.allclose(one["b"], rnn(x, state)[0]["b"][:, 0], atol=1e-6)
    report = rnn.validate(x, state)
    assert report.ok, str(report)


def test_in_a_graph_of_torch_compile() -> None:
    cell, x = Stack().eval(), torch.randn(B, T, D)
    rnn = seqparc.compile(cell)
    state = (r(N), (r(N), r(N)))
    expected = rnn(x, state)[0]
    got = torch.compile(lambda a: rnn(a, state)[0], fullgraph=True, backend="aot_eager")(x)
    assert rnn.engine().plan.stages and torch.allclose(got, expected, atol=1e-6)


def test_states_that_do_not_recur_run_as_one_and_say_so() -> None:
    def cell(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a = torch.tanh(x)
        return a, (a, a * x)

    rnn = seqparc.compile(cell, state=(torch.zeros(N), torch.zeros(N)))
    x = torch.randn(B, T, N)
    torch.testing.assert_close(rnn(x), rnn.sequential(x))
    assert rnn.stats.backend == "c" and rnn.stats.strategy
