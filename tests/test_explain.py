"""What `explain` says: the Jacobian in matrix form against autograd, tables, HTML, LaTeX, pictures, and where a call's time goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.formula import formula
from seqparc.passes.matrices import Form, Matrix, NoFormError, matrix_form
from seqparc.runtime.interpreter import TorchKernel
from seqparc.runtime.run import Values, streams_of
from tests.cells import CELLS


class TwoInARow(nn.Module):
    """A hidden layer inside the recurrence."""

    def __init__(self, inputs: int, n: int, width: int = 5) -> None:
        super().__init__()
        self.hidden_size = n
        self.up, self.down = nn.Linear(n, width), nn.Linear(width, n)
        self.w = nn.Linear(inputs, n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + self.down(torch.tanh(self.up(h))))


class Joined(nn.Module):
    """One weight for input and state together, a maximum over the state, and a product of two parts of it."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Linear(inputs + n, n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = torch.sin(self.w(torch.cat((x, h), -1))) + 0.1 * h.amax(-1, keepdim=True)
        return h * h.flip(-1) / (1 + h.square().sum(-1, keepdim=True))


MORE: dict[str, tuple[Callable[[], Any], int]] = {
    "two in a row": (lambda: TwoInARow(3, 4), 3), "joined": (lambda: Joined(3, 4), 3), "GRU 64": (lambda: nn.GRUCell(4, 64), 4),
}  # fmt: skip


def dense(m: Matrix, values: dict[ir.Value, Tensor]) -> Tensor:
    """A matrix with its numbers."""
    at = torch.from_numpy(m.entries.array.astype(np.int64))
    return torch.zeros(m.shape, dtype=torch.float64).index_put((at[:, 0], at[:, 1]), values[m.value][at[:, 2]], accumulate=True)


def numbers(form: Form, rnn: seqparc.CompiledRNN, x: Tensor, start: list[Tensor]) -> Tensor:
    """The matrix form with numbers for its vectors, by the interpreter: ∂(next state)/∂(state) at x[0, 0]."""
    plan = rnn.engine(x).plan  # type: ignore[union-attr]
    terms = [t for block in form.blocks.values() for t in block]
    wanted = list(dict.fromkeys(v for t in terms for v in (t.left, *(v for m, d in t.chain for v in (m.value, d)))))
    stores = tuple(ir.Store(k, ir.Index(np.arange(v.size)[None]), v) for k, v in enumerate(wanted))
    kernel = TorchKernel(replace(plan.core, emits=stores, sums=()), torch.float64)
    made = Values(rnn.understand(x)[0], lambda name: plan.attributes[name]())
    weights = [w.detach().reshape(-1) for w in made.of(plan.weights)]
    fixed = {v: kernel.pick(weights[v.slot], v.index) for v in kernel.order if isinstance(v, ir.Leaf) and v.kind == "param"}
    streams = [s.detach()[:, :1].transpose(0, 1) for s in streams_of(plan, made)]
    flat = torch.cat([s.reshape(1, 1, -1) for s in start], -1)
    values = {v: t[0, 0, 0].expand(v.size) for v, t in kernel.evaluate(flat, streams, fixed).items()}
    at = np.concatenate([[0], np.cumsum(form.sizes)])
    jacobian = torch.zeros(int(at[-1]), int(at[-1]), dtype=torch.float64)
    for (i, j), block in form.blocks.items():
        for t in block:
            product = torch.diag(values[t.left])
            for m, d in t.chain:
                product = product @ dense(m, values) @ torch.diag(values[d])
            jacobian[at[i] : at[i + 1], at[j] : at[j + 1]] += product
    return jacobian


@pytest.mark.parametrize("name", [*CELLS, *MORE])
def test_the_matrix_form_is_the_jacobian(name: str) -> None:
    """On random numbers, against autograd through the cell itself."""
    make, inputs = MORE[name] if name in MORE else (CELLS[name].make, CELLS[name].inputs)
    rnn = seqparc.compile(make().double())
    x = torch.randn(1, 2, inputs, dtype=torch.float64)
    _, convention, zeros = rnn.understand(x)
    start = [torch.rand_like(s) + 0.1 for s in zeros]
    form = matrix_form(rnn.engine(x).plan.core)  # type: ignore[union-attr]

    def step(*state: Tensor) -> Tensor:
        return torch.cat([s.reshape(-1) for s in convention.call(rnn.cell, [x[:, 0]], list(state))[1]])

    columns = torch.autograd.functional.jacobian(step, tuple(start))
    truth = torch.cat([c.reshape(sum(form.sizes), -1) for c in columns], 1)
    torch.testing.assert_close(numbers(form, rnn, x, start), truth, rtol=1e-11, atol=1e-12)


def said(cell: Any, inputs: int) -> tuple[str, ...]:
    rnn = seqparc.compile(cell)
    return formula(rnn.engine(torch.zeros(1, 2, inputs)).plan, cell).text()  # type: ignore[union-attr]


def test_the_matrix_form_reads_as_one_would_write_it() -> None:
    assert said(nn.RNNCell(3, 5), 3)[0] == "J = diag(1 - g1^2) W1"
    assert said(CELLS["affine"].make(), 3) == ("J = W1", "W1 = a.weight, 6 × 6")
    two = said(TwoInARow(3, 4), 3)
    assert two[0] == "J = diag(1 - g1^2) W1 diag(1 - g2^2) W2"
    assert two[-2:] == ("W1 = down.weight, 4 × 5", "W2 = up.weight, 5 × 4")
    gru = said(nn.GRUCell(3, 10), 3)
    assert gru[0] == "J = diag(g1) + diag(g3*(1 - g1)*(1 - g2^2)) W1 + diag(a1*(1 - g1)) W2 + diag(g1*(1 - g1)*(-g2 + s)) W3"
    assert "W1 = weight_hh[20:30], 10 × 10" in gru
    assert any(re.fullmatch(r"g2 = tanh\(.*g3\*\(\(W1 s\) \+ bias_hh\[20:30\]\)\)", line) for line in gru)
    blocks = said(CELLS["block GRU"].make(), 72)  # with the names that its lines give, and its parameter u told from the input
    assert blocks[0].endswith("+ diag(z)") and "W1 = cell.u[0], 24 × 24, 8 blocks of 3 × 3 on its diagonal" in blocks
    assert said(nn.LSTMCell(3, 4), 3)[0].startswith("J = J00, J01; J10, J11")


def test_a_jacobian_that_nobody_would_read_is_not_written() -> None:
    class Deep(nn.Module):
        hidden_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            for layer in self.layers:
                h = h + torch.tanh(layer(h))
            return torch.tanh(h + x)

    rnn = seqparc.compile(Deep())
    plan = rnn.engine(torch.zeros(1, 2, 2)).plan  # type: ignore[union-attr]
    with pytest.raises(NoFormError, match="more than 48 ways"):
        matrix_form(plan.core)
    assert "no matrix form" in formula(plan, rnn.cell).text()[0]
