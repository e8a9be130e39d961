"""Complex states, inputs and parameters: values and gradients of the plain loop, by torch's conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc

pytestmark = pytest.mark.usefixtures("quick")

B, T, D, N = 3, 37, 4, 6
C64, C128 = torch.complex64, torch.complex128


def noise(*shape: int, dtype: torch.dtype = C64) -> Tensor:
    return torch.randn(*shape, dtype=dtype) * 0.4


class LRU(nn.Module):
    """The linear recurrent unit: one complex number per lane, a real output."""

    def __init__(self) -> None:
        super().__init__()
        self.nu, self.theta = nn.Parameter(torch.rand(N)), nn.Parameter(6 * torch.rand(N))
        self.b, self.c = nn.Parameter(noise(N, D)), nn.Parameter(noise(D, N))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(torch.complex(-torch.exp(self.nu), self.theta))
        h = decay * h + x.to(h.dtype) @ self.b.T
        return (h @ self.c.T).real, h


class Unitary(nn.Module):
    """A unitary matrix and modReLU, whose modulus has a corner at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.b, self.bias = nn.Parameter(noise(N, N)), nn.Parameter(noise(N, D)), nn.Parameter(torch.rand(N) - 0.7)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        turn = torch.linalg.qr(self.raw)[0]
        z = h @ turn.conj().T + x.to(h.dtype) @ self.b.T
        return torch.sgn(z) * torch.relu(z.abs() + self.bias)


class Polar(nn.Module):
    """Modulus and angle, apart and together again."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(noise(N))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = (h * self.w + x.mean(1, keepdim=True)) / (2 + h.conj() * h)
        return torch.polar(torch.tanh(z.abs()), z.angle() * 0.9) + torch.exp(0.1 * z) - torch.log(z + 3) / 4


class Moves(nn.Module):
    """What moves numbers: parts, conjugates, slices, writes, products of matrices, real and complex side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(noise(2, N // 2, N // 2))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = h * torch.where(h.real > 0, h, h.conj()).imag + (x[:, :1] - h) * (0.2 - 0.1j)
        heads = torch.bmm(h.reshape(-1, 2, N // 2).transpose(0, 1), self.m).transpose(0, 1).reshape(-1, N)
        new = torch.zeros_like(h)
        new[:, : N // 2] = heads[:, N // 2 :]
        new[:, N // 2 :] = torch.view_as_complex(torch.stack([heads.real[:, :3].tanh(), heads.imag[:, 3:].sin()], -1))
        new = torch.cat([new[:, 1:], x[:, 1:2] + 0 * new[:, :1]], 1)
        return 0.5 * new.roll(1, 1) - torch.reciprocal(new + 3) + new.square() / 8 + (new**3).sum(1, keepdim=True) / 50


class Mixed(nn.Module):
    """A complex state beside a real one, and complex numbers out of a real input's phase."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D + N, N)

    def forward(self, x: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = torch.sigmoid(self.gate(torch.cat([x, h], 1)))
        z = f * z * torch.exp(1j * x[:, :1]) + (1 - f)
        h = torch.tanh(z.real - 0.3 * h * z.imag)
        return z + h, z, h


CELLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "LRU": (LRU, lambda: noise(B, N)),
    "unitary": (Unitary, lambda: noise(B, N)),
    "polar": (Polar, lambda: noise(B, N)),
    "moves": (Moves, lambda: noise(B, N)),
    "mixed": (Mixed, lambda: (noise(B, N), torch.randn(B, N))),
}


def results(call: Callable[..., Any], x: Tensor, state: Any, wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves and the gradients of a real loss that weighs both parts of everything."""
    leaves = [t for part in call(x, state) for t in seqparc.tree.flatten(part)[0]]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in real)
    return leaves, list(torch.autograd.grad(loss, wanted))


def apart(mine: list[Tensor], theirs: list[Tensor]) -> float:
    assert [(t.shape, t.dtype) for t in mine] == [(t.shape, t.dtype) for t in theirs]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(mine, theirs, strict=True))


RUNS = [(name, strategy) for name in CELLS for strategy in ("sequential", "shooting")] + [("LRU", "newton"), ("mixed", "newton")]


@pytest.mark.parametrize("name, strategy", RUNS)
def test_values_and_gradients(name: str, strategy: str) -> None:
    make, start = CELLS[name]
    cell, state = make(), start()
    x = torch.randn(B, T, D, requires_grad=True)
    rnn = seqparc.compile(cell, options=seqparc.Options(strategy=strategy, chunks=4, warmup=4))
    wanted = [x, *(t.requires_grad_() for t in seqparc.tree.flatten(state)[0]), *cell.parameters()]
    y, grads = results(rnn, x, state, wanted)
    assert rnn.stats.backend == "c" and rnn.stats.strategy == strategy
    expected, right = results(rnn.sequential, x, state, wanted)
    assert apart(y, expected) < 1e-5 and apart(grads, right) < 2e-5


def test_one_complex_number_is_a_lane() -> None:
    rnn = seqparc.compile(LRU())
    rnn(torch.randn(B, T, D), noise(B, N))
    plan = rnn.engine().plan
    assert plan.program.lanes == N and len(plan.program.state) == 2


@pytest.mark.parametrize("name", ["unitary", "moves"])
def test_double_precision(name: str) -> None:
    cell = CELLS[name][0]()
    for key, value in cell.named_parameters():
        setattr(cell, key, nn.Parameter(value.detach().to(C128 if value.is_complex() else torch.float64)))
    rnn = seqparc.compile(cell)
    x, h = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True), noise(2, N, dtype=C128).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rnn(a, b), (x, h))


def test_the_modulus_at_zero() -> None:
    cell, x = Unitary(), torch.zeros(B, T, D, requires_grad=True)
    state = torch.zeros(B, N, dtype=C64, requires_grad=True)
    rnn = seqparc.compile(cell)
    _, grads = results(rnn, x, state, [x, state, *cell.parameters()])
    _, right = results(rnn.sequential, x, state, [x, state, *cell.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))


def test_complex_input_and_a_function() -> None:
    pole = torch.tensor(0.9 + 0.3j)

    def resonator(x: Tensor, h: Tensor) -> Tensor:
        return pole * h + x

    x = noise(B, T, N).requires_grad_()
    rnn = seqparc.compile(resonator, state=torch.zeros(N, dtype=C64))
    y, last = rnn(x)
    expected, _ = rnn.sequential(x)
    assert torch.allclose(y, expected, atol=1e-6) and torch.equal(last, y[:, -1])
    mine, theirs = (torch.autograd.grad(v.abs().sum(), x)[0] for v in (y, expected))
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_lengths_resets_steps_and_validate() -> None:
    cell = LRU()
    rnn = seqparc.compile(cell, state=lambda n: torch.zeros(n, N, dtype=C64))
    x = torch.randn(B, T, D)
    lengths, reset = torch.tensor([T, 5, 0]), torch.rand(B, T) < 0.1
    y, last = rnn(x, lengths=lengths, reset=reset)
    for b in range(B):
        h = torch.zeros(1, N, dtype=C64)
        for t in range(int(lengths[b])):
            h = torch.zeros_like(h) if reset[b, t] else h
            out, h = cell(x[b : b + 1, t], h)
            assert torch.allclose(y[b, t], out[0], atol=1e-6)
        assert torch.allclose(last[b], h[0], atol=1e-6) and not y[b, int(lengths[b]) :].any()
    out, state = rnn.step(x[:, 0])
    assert state.dtype == C64 and torch.allclose(out, rnn(x)[0][:, 0], atol=1e-6)
    report = rnn.validate(x)
    assert report.ok and any("gradient of b" in r.name for r in report.rows), str(report)


def test_hidden_size_finds_a_complex_state() -> None:
    class Sized(LRU):
        hidden_size = N

    rnn = seqparc.compile(Sized())
    y, last = rnn(torch.randn(B, T, D))
    assert last.dtype == C64 and y.shape == (B, T, D)


def test_what_is_not_known_for_complex_numbers_is_said() -> None:
    rnn = seqparc.compile(lambda x, h: torch.tanh(h) * 0.5 + x, signature="x, h -> h")
    x, h = torch.randn(B, T, N), noise(B, N)
    with pytest.warns(seqparc.errors.SeqparcWarning, match=r"test_complex.py.*tanh.*not known there for complex numbers"):
        y, last = rnn(x, h)
    assert torch.allclose(y, rnn.sequential(x, h)[0], atol=1e-6) and y.is_complex() and torch.equal(last, y[:, -1])


def test_conjugate_views_are_told_from_what_they_view() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        turned = h.conj()
        return (h - turned) * 0.5 + (turned.imag + turned.real) * x

    rnn = seqparc.compile(cell)
    x, h = torch.randn(B, T, N), noise(B, N)
    assert torch.allclose(rnn(x, h)[0], rnn.sequential(x, h)[0], atol=1e-6)

    def writes(x: Tensor, h: Tensor) -> Tensor:
        new = h * 0.5
        new.conj().mul_(x)
        return new

    with pytest.raises(seqparc.TraceError, match=r"test_complex.py.*conjugate view"):
        seqparc.compile(writes)(x, h)


def test_in_a_graph_of_torch_compile() -> None:
    rnn = seqparc.compile(LRU())
    x, h = torch.randn(B, T, D), noise(B, N)
    expected = rnn(x, h)
    got = torch.compile(lambda a, b: rnn(a, b), fullgraph=True, backend="aot_eager")(x, h)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(got, expected, strict=True))


@pytest.mark.parametrize("numbers", [1, 3])
@pytest.mark.parametrize("what", ["x", "start", "weight", "cotangent"])
def test_numbers_that_are_there_with_the_other_sign(what: str, numbers: int) -> None:
    """torch's imaginary part of a conjugate is a view whose numbers are to be negated when they are read."""

    def given(name: str, *shape: int) -> Tensor:
        view = noise(*shape).conj().imag
        assert view.is_neg()
        return view if name == what else view.resolve_neg()

    w = given("weight", numbers)
    rnn = seqparc.compile(lambda x, h: torch.tanh(w * h + x), state=torch.zeros(numbers), backend="c")
    for steps in (1, T):
        for _ in range(7):
            x, h = given("x", B, steps, numbers), given("start", B, numbers)
            g, x = given("cotangent", B, steps, numbers), x if what == "x" else x.requires_grad_()
            mine, right = rnn(x, h), rnn.sequential(x, h)
            torch.testing.assert_close(mine, right)
            if x.requires_grad:
                torch.testing.assert_close(torch.autograd.grad(mine[0], x, g), torch.autograd.grad(right[0], x, g))
