"""Cells that draw random numbers: a seeded run is the seeded plain loop, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqparc

pytestmark = pytest.mark.usefixtures("quick")


class Dropped(nn.Module):
    """Dropout of the input and of what comes back."""

    def __init__(self, one_operation: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.one_operation = 4, one_operation
        self.w, self.u = nn.Linear(3, 4), nn.Linear(4, 4)

    def drop(self, v: Tensor, p: float) -> Tensor:
        if self.one_operation:
            return torch.native_dropout(v, p, self.training)[0] if self.training else v
        return F.dropout(v, p, self.training)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(self.drop(x, 0.2)) + self.drop(self.u(h), 0.4))


class Zoneout(nn.Module):
    """Some numbers of the state stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = self.cell(x, state)
        if not self.training:
            return 0.1 * state[0] + 0.9 * h, 0.1 * state[1] + 0.9 * c
        keep_h, keep_c = (torch.empty_like(s).bernoulli_(0.1) for s in state)
        return torch.where(keep_h > 0, state[0], h), keep_c * state[1] + (1 - keep_c) * c

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.cell.weight_hh.new_zeros(batch, 4)
        return zero, zero


class Noisy(nn.Module):
    """Noise of several kinds, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 3
        self.w = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        a = torch.randn_like(h) * 0.1
        b = torch.rand(x.shape[0], 3, dtype=x.dtype)
        c = torch.empty(x.shape[0], 3, dtype=x.dtype).uniform_(-1, 2)
        d = torch.randn(x.shape[0], 1, dtype=x.dtype)
        e = torch.zeros_like(x).normal_(0.5, 0.1) + torch.empty_like(x).exponential_(2.0)
        return torch.tanh(self.w * h + x * b + a) * 0.9 + 0.1 * c * d + 0.01 * e


CELLS: dict[str, Callable[[], nn.Module]] = {
    "dropout": Dropped, "dropout in one operation": lambda: Dropped(True), "zoneout": Zoneout, "noise": Noisy,
}  # fmt: skip


def seeded(call: Callable[..., tuple[object, object]], cell: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    results = [t for part in call(x) for t in seqparc.tree.flatten(part)[0]]
    total = sum(((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in results), torch.zeros(()))
    return [*(t.detach() for t in results), *torch.autograd.grad(total, [x, *cell.parameters()])]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", CELLS)
def test_a_seeded_run_is_the_seeded_loop(name: str, backend: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]().double()
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    for options in ({"strategy": "shooting", "chunks": 3}, {"strategy": "sequential"}, {"strategy": "newton"}):
        rnn = seqparc.compile(cell, backend=backend, options=options)
        first = seeded(rnn, cell, x)  # the call that compiles draws no more than any other
        right = seeded(rnn.sequential, cell, x)
        for mine, correct in zip(first, right, strict=True):
            torch.testing.assert_close(mine, correct, rtol=1e-9, atol=1e-10)
        assert rnn.stats.backend == backend
    after = seeded(rnn, cell, x), torch.rand(1)
    seeded(rnn.sequential, cell, x)
    assert torch.equal(torch.rand(1), after[1])  # and leaves the generator where the loop does
    torch.manual_seed(6)
    assert not torch.equal(seqparc.tree.flatten(rnn(x)[0])[0][0], first[0])


@pytest.mark.parametrize("name", ["dropout", "zoneout"])
def test_nothing_is_drawn_in_evaluation(name: str) -> None:
    cell, x = CELLS[name]().eval(), torch.randn(2, 9, 3)
    rnn = seqparc.compile(cell).eval()
    state = torch.get_rng_state()
    y = rnn(x)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for mine, right in zip(seqparc.tree.flatten(y)[0], seqparc.tree.flatten(rnn.sequential(x)[0])[0], strict=True):
        torch.testing.assert_close(mine, right)


def test_the_cell_itself_may_be_put_into_evaluation() -> None:
    cell, x = Dropped(), torch.randn(2, 9, 3)
    rnn = seqparc.compile(cell)
    for mode in (True, False, True):
        cell.train(mode)  # not the compiled module, which does not hear of it
        torch.manual_seed(2)
        y = rnn(x)[0]
        torch.manual_seed(2)
        torch.testing.assert_close(y, rnn.sequential(x)[0])


def test_a_number_that_a_cell_holds_may_change() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size, self.dt, self.drop = 3, 0.1, nn.Dropout(0.5)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h + self.dt * torch.tanh(self.drop(x) - h)

    cell, x = Stepped(), torch.randn(2, 9, 3)
    rnn = seqparc.compile(cell)
    for dt, p in ((0.1, 0.5), (0.3, 0.5), (0.3, 0.1)):
        cell.dt, cell.drop.p = dt, p
        torch.manual_seed(2)
        y = rnn(x)[0]
        torch.manual_seed(2)
        torch.testing.assert_close(y, rnn.sequential(x)[0])
    engine = rnn.engine()
    rnn(x)
    assert rnn.engine() is engine


def test_validation_draws_the_same_for_all_it_compares() -> None:
    rnn, x = seqparc.compile(Dropped()), torch.randn(2, 60, 3)
    state = torch.get_rng_state()
    report = rnn.validate(x)
    assert report.ok and report.stats.backend == "c" and torch.equal(torch.get_rng_state(), state)


def test_lengths_and_steps_draw_too() -> None:
    cell = Zoneout()
    rnn, x = seqparc.compile(cell), torch.randn(2, 7, 3)
    torch.manual_seed(1)
    (h, _), _ = rnn(x, lengths=[7, 3])
    torch.manual_seed(1)
    (right, _), _ = rnn.sequential(x)
    torch.testing.assert_close(h[0], right[0])
    torch.testing.assert_close(h[1, :3], right[1, :3])
    state, rows = None, []
    torch.manual_seed(1)
    for t in range(7):
        (row, _), state = rnn.step(x[:, t], state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), right)


def test_draws_into_part_of_a_tensor_run_as_the_loop() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        noise = torch.zeros(x.shape[0], 3, 2)
        noise[..., 0].normal_()
        return torch.tanh(h + x + noise.sum(-1))

    rnn = seqparc.compile(cell, state=torch.zeros(3))
    with pytest.warns(seqparc.SeqparcWarning, match=r"test_draws.py:\d+: random numbers that depend on more than a shape"):
        rnn(torch.zeros(2, 5, 3))


def test_draws_that_all_samples_share_run_as_the_loop() -> None:
    rnn = seqparc.compile(lambda x, h: torch.tanh(h + x + torch.randn(3)), state=torch.zeros(3))
    with pytest.warns(seqparc.SeqparcWarning, match=r"test_draws.py:\d+: random numbers of shape \[3\], whose first axis is not the batch"):
        rnn(torch.zeros(2, 5, 3))
    assert rnn.stats.backend == "eager"


def test_a_gradient_of_its_own_sees_the_same_numbers() -> None:
    class Noisy(nn.Module):
        """Neurons that fire by chance, with dropout in front, and another kind of draw in place."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(7, 4), nn.Dropout(0.3)

        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            drive = self.linear(self.drop(torch.cat([x, v], 1)))
            p = torch.sigmoid(drive)
            spike = (torch.rand_like(p) < p).to(p.dtype)
            spike = p + (spike - p).detach()
            keep = torch.empty_like(v).bernoulli_(0.8)
            return spike, 0.7 * v * keep + drive * (1 - spike.detach())

    cell = Noisy().double()
    rnn = seqparc.compile(cell)
    x, v = torch.randn(3, 41, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    found = []
    for run in (rnn, rnn.sequential):
        u, start = x.clone().requires_grad_(), v.clone().requires_grad_()
        torch.manual_seed(5)
        y, last = run(u, start)
        found.append([y, last, *torch.autograd.grad((y * y.detach().cumsum(1)).sum() + last.sum(), [u, start, *cell.parameters()])])
    assert rnn.engine().plan.own_gradient and rnn.stats.backend == rnn.stats.backward.backend == "c"
    for a, b in zip(*found, strict=True):
        assert float((a - b).detach().abs().max()) < 1e-10 * float(1 + b.detach().abs().max())
