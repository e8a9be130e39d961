"""Differential equations against torchdiffeq by the same method at the same steps, and in the forms that users write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import seqparc
from seqparc.errors import ConvergenceError, ShapeError, SignatureError
from seqparc.ode import METHODS, Path, Settings, Solver, solve

T = torch.linspace(0, 1, 13, dtype=torch.float64) ** 1.2  # not uniform
SHARED = ("euler", "midpoint", "heun2", "heun3", "rk4")  # with torchdiffeq, which has no others of fixed step that need no tolerance


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A field that looks at the time, as torchdiffeq's examples write it."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(n + 1, 6).double(), nn.Linear(6, n).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.cat((y, t.expand(*y.shape[:-1], 1)), -1))))


def gradients(result, inputs: list[Tensor]) -> list[Tensor]:
    leaves = list(result) if isinstance(result, tuple) else [result]
    weighed = [rand(*v.shape, seed=i) * (torch.view_as_real(v).sum(-1) if v.is_complex() else v) for i, v in enumerate(leaves)]
    return list(torch.autograd.grad(sum(w.sum() for w in weighed), inputs))


def agree(func, y0, t: Tensor, x=None, plain=None, method: str = "rk4", options=None) -> Solver:
    """Values, and gradients by y0, t and parameters, against torchdiffeq's odeint of `plain` (or func), autograd going through its steps.

    Without those by t where x is given: samples stay where they are when torchdiffeq's times move.
    """
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []

    def start() -> tuple[list[Tensor], object, Tensor]:
        leaves = [v.clone().requires_grad_() for v in ((y0,) if isinstance(y0, Tensor) else y0)]
        return leaves, leaves[0] if isinstance(y0, Tensor) else tuple(leaves), t.clone().requires_grad_(x is None)

    told = {k: v for k, v in (options or {}).items() if k in ("step_size", "interp")}
    leaves, y, times = start()
    wanted = odeint(plain or func, y, times, method=method, options=told)
    wanted_g = gradients(wanted, [*leaves, *[times][: x is None], *parameters])
    solver = Solver(func, method, {"backend": "torch", **(options or {})})
    leaves, y, times = start()
    found = solver(y, times, x)
    found_g = gradients(found, [*leaves, *[times][: x is None], *parameters])
    pairs = zip(wanted if isinstance(wanted, tuple) else (wanted,), found if isinstance(found, tuple) else (found,), strict=True)
    for a, b in ((a.detach(), b.detach()) for a, b in (*pairs, *zip(wanted_g, found_g, strict=True))):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).abs().max()) <= 1e-10 * (1 + float(a.abs().max()))
    return solver


@pytest.mark.parametrize("method", SHARED)
def test_methods_are_torchdiffeqs(method):
    backend = "c" if method == "rk4" else "torch"
    assert agree(Net(), rand(3, 2), T, method=method, options={"backend": backend}).stats.backend == backend


def test_dopri5_is_torchdiffeqs_where_that_accepts_every_step():
    f, h = Net(), 0.1
    t = torch.arange(6, dtype=torch.float64) * h
    fixed = {"first_step": h, "min_step": h, "max_step": h, "step_t": t[1:]}
    with torch.no_grad():
        wanted = odeint(f, rand(3, 2), t, method="dopri5", rtol=1e9, atol=1e9, options=fixed)
        found = solve(f, rand(3, 2), t, method="dopri5", options={"backend": "torch"})
    assert float((wanted - found).abs().max()) < 1e-10


ORDER = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "rk4_classic": 4, "dopri5": 5, "implicit_euler": 1,
         "implicit_midpoint": 2, "trapezoid": 2, "exponential": 2}  # fmt: skip


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[1], torch.cos(3 * t) - torch.sin(y[0]) * (1 + 0.2 * y[1])))


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_their_order(method):
    """A driven pendulum has no simple solution; a fine one of order five is taken for it."""
    solver, best = (Solver(pendulum, m, {"backend": "torch"}) for m in (method, "dopri5"))

    def end(solver: Solver, n: int) -> Tensor:
        return solver(torch.tensor([1.5, -1.0], dtype=torch.float64), torch.linspace(0, 2, n + 1).double())[-1]

    exact = end(best, 200)
    coarse, fine = (float((end(solver, n) - exact).norm()) for n in (12, 24))
    assert math.log2(coarse / fine) > ORDER[method] - 0.3


MATRIX = 0.3 * rand(3, 3)
FORMS = {
    "one state, a matrix": (lambda t, y: MATRIX @ y, rand(3)),
    "one number": (lambda t, y: -y * torch.sin(t), rand(1)[0]),
    "one state, its numbers by name": (lambda t, y: torch.stack((y[1], -torch.sin(y[0]))), rand(2)),
    "particles that see each other": (lambda t, y: torch.cos(t) * (y.mean(0, keepdim=True) - y), rand(5, 2)),
    "a batch, the time a factor": (lambda t, y: -t * y, rand(4, 2)),
    "a batch, the time a column": (lambda t, y: torch.cat((y[:, 1:], -y[:, :1] * t.expand(len(y), 1)), 1), rand(4, 2)),
    "a switch in time": (lambda t, y: torch.where(t > 0.5, -y, y), rand(4, 2)),
    "a constant field": (lambda t, y: torch.ones(2, dtype=torch.float64) + 0 * t, rand(4, 2)),
    "two leaves": (lambda t, y: (y[1], -y[0].sum(-1, keepdim=True) * y[1]), (rand(4, 1), rand(4, 1, seed=1))),
    "leaves of two ranks": (lambda t, y: (t * y[0].tanh(), -y[0].sum(-1)), (rand(4, 3), rand(4, seed=1))),
    "complex": (lambda t, y: 1j * t * y, torch.complex(rand(4, 2), rand(4, 2, seed=1))),
}


@pytest.mark.parametrize("form", FORMS)
def test_functions_are_called_as_they_are_written(form):
    agree(*FORMS[form], T)


def test_methods_of_modules_bring_their_parameters():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2).double()

        def field(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.lin(y)) * t.sin()

    model, y0 = Model(), rand(3, 2)
    totals = solve(model.field, y0, T).sum(), odeint(model.field, y0, T, method="rk4").sum()
    found, wanted = (torch.autograd.grad(total, model.lin.weight)[0] for total in totals)
    assert float((found - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["onwards", "backwards"])
def test_steps_of_a_size_of_their_own(t, interp):
    agree(lambda t, y: -t * y, rand(4, 2), t, options={"step_size": 0.07, "interp": interp})


def test_steps_between_times():
    f = Net()
    fine = solve(f, rand(3, 2), torch.linspace(0, 1, 25).double(), options={"backend": "torch"})
    found = solve(f, rand(3, 2), torch.linspace(0, 1, 9).double(), options={"backend": "torch", "steps_per_interval": 3})
    assert float((found - fine[::3]).detach().abs().max()) < 1e-14


def test_every_sample_has_times_of_its_own():
    f, y0 = Net(), rand(3, 2)
    t = torch.stack((T, 0.5 * T, 1 - T), 1)
    found = solve(f, y0, t, options={"backend": "torch"})
    alone = [solve(f, y0[i : i + 1], t[:, i], options={"backend": "torch"}) for i in range(3)]
    assert float((found - torch.cat(alone, 1)).detach().abs().max()) < 1e-14


X = rand(13, 4, 2, seed=5)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_inputs_are_interpolated_within_a_step(kind):
    path = Path(T, X, kind)
    plain = lambda t, y: torch.tanh(path(t[None])[0]) - y  # noqa: E731
    agree(lambda t, y, x: torch.tanh(x) - y, rand(4, 2), T, X, plain, options={"x_interp": kind})


def test_inputs_are_held_or_given_as_a_function():
    held = solve(lambda t, y, x: x - y, rand(4, 2), T, X, "euler", {"x_interp": "previous", "backend": "torch"})
    y = rand(4, 2)
    for k in range(12):
        y = y + (T[k + 1] - T[k]) * (X[k] - y)
    assert float((held[-1] - y).abs().max()) < 1e-14
    agree(lambda t, y, x: x - y, rand(4, 2), T, lambda t: torch.sin(t)[:, None, None].expand(-1, 4, 2), plain=lambda t, y: torch.sin(t) - y)


def test_a_path_meets_its_samples_and_has_the_slopes_it_says():
    t = T.clone().requires_grad_()
    for kind in ("linear", "cubic"):
        path = Path(T, X, kind)
        assert torch.allclose(path(T), X)
        at = (T[:-1] + 0.3 * (T[1:] - T[:-1])).requires_grad_()
        (slope,) = torch.autograd.grad(path(at)[..., 0, 0].sum(), at)
        assert torch.allclose(slope, path.derivative(at)[..., 0, 0])
    before, after = (path.derivative(T[3:4], torch.tensor([k]))[0] for k in (2, 3))  # the cubic has no kinks
    assert torch.allclose(before, after) and t.requires_grad


def test_what_cannot_be_solved_is_said():
    y0 = rand(4, 2)
    with pytest.raises(ShapeError, match="go up, or go down"):
        solve(lambda t, y: -y, y0, torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(ShapeError, match="floating-point"):
        solve(lambda t, y: -y, y0, torch.arange(4))
    with pytest.raises(ShapeError, match="a sample for each time"):
        solve(lambda t, y, x: x - y, y0, T, X.transpose(0, 1))
    with pytest.raises(ShapeError, match="4 samples"):
        solve(lambda t, y: -y, y0, T[:, None].expand(-1, 3))
    with pytest.raises(SignatureError, match="must be alike"):
        solve(lambda t, y: (y, y), y0, T)
    with pytest.raises(SignatureError, match=r"torch\.where"):
        solve(lambda t, y: y if t > 0.5 else -y, y0, T)
    with pytest.raises(ValueError, match="no error control"):
        solve(lambda t, y: y, y0, T, method="dopri8")
    with pytest.raises(TypeError, match="steps_per_interval"):
        solve(lambda t, y: y, y0, T, options={"steps": 3})


def test_one_time_is_the_start_and_no_samples_have_no_solution():
    assert torch.equal(solve(lambda t, y: -y, rand(4, 2), T[:1]), rand(4, 2)[None])
    assert solve(lambda t, y: -y, rand(0, 2), T).shape == (13, 0, 2)


def test_a_solver_validates_and_tells():
    solver = Solver(Net(), options={"steps_per_interval": 2})
    assert solver.validate(rand(3, 2), T).ok
    assert solver.stats.chunk_length * solver.stats.chunks >= 24
    assert [name for name, _ in solver.named_parameters()] == ["func.a.weight", "func.a.bias", "func.b.weight", "func.b.bias"]
    assert Settings.of({"steps_per_interval": 2, "backend": "c"}).run == seqparc.Options(backend="c")


def test_training_changes_what_a_kept_solver_gives():
    f, y0 = Net(), rand(3, 2)
    first = solve(f, y0, T)
    with torch.no_grad():
        f.b.weight.mul_(2)
    again = solve(f, y0, T)
    assert float((again - odeint(f, y0, T, method="rk4")).abs().max()) < 1e-10 < float((again - first).abs().max())


@pytest.mark.parametrize("method", ["implicit_euler", "implicit_midpoint", "trapezoid"])
def test_implicit_steps_are_solved_and_differentiated_by_the_implicit_function_theorem(method):
    """Of a linear equation the step is known: y⁺ = (1 - h a A)⁻¹ (1 + h (1 - a) A) y, and autograd differentiates that."""
    part = {"implicit_euler": 1.0, "implicit_midpoint": 0.5, "trapezoid": 0.5}[method]
    a = (rand(2, 2) - 3 * torch.eye(2, dtype=torch.float64)).requires_grad_()
    y0 = rand(3, 2).requires_grad_()
    found = solve(lambda t, y: y @ a.T, y0, T, method=method, options={"backend": "torch"})
    one, rows = torch.eye(2, dtype=torch.float64), [y0]
    for h in T[1:] - T[:-1]:
        rows.append(torch.linalg.solve(one - h * part * a, (one + h * (1 - part) * a) @ rows[-1].T).T)
    wanted = torch.stack(rows)
    assert float((found - wanted).detach().abs().max()) < 1e-12
    for p, q in zip(gradients(found, [a, y0]), gradients(wanted, [a, y0]), strict=True):
        assert float((p - q).abs().max()) < 1e-10


def test_implicit_steps_of_a_nonlinear_field_have_the_derivative_of_differences():
    f, y0 = Net(), rand(2, 2).requires_grad_()

    def loss(y0: Tensor) -> Tensor:
        return (rand(13, 2, 2) * solve(f, y0, T, method="implicit_midpoint", options={"backend": "torch"})).sum()

    (found,) = torch.autograd.grad(loss(y0), y0)
    e = 1e-6
    with torch.no_grad():
        for i in range(2):
            d = torch.zeros(2, 2, dtype=torch.float64)
            d[i, i] = e
            assert abs(float((loss(y0 + d) - loss(y0 - d)) / (2 * e) - found[i, i])) < 1e-7


def test_a_step_that_cannot_be_solved_is_an_error():
    """z = y + h (z² + 1) has no real solution for these."""
    with pytest.raises(ConvergenceError, match="smaller steps") as caught:
        solve(lambda t, y: y**2 + 1, torch.ones(3, 1), torch.arange(3.0), method="implicit_euler", options={"backend": "torch"})
    assert caught.value.gap > 1e-10
    start = torch.tensor([[1.0], [torch.nan]])  # a sample that is no number does not hide it
    with pytest.raises(ConvergenceError):
        solve(lambda t, y: y**2 + 1, start, torch.arange(3.0), method="implicit_euler", options={"backend": "torch"})


def test_the_exponential_method_is_exact_for_linear_fields():
    a = rand(3, 3) - 2 * torch.eye(3, dtype=torch.float64)
    t = torch.linspace(0, 8, 5).double()  # steps of 2, far outside of what an explicit method bears
    found = solve(lambda t, y: y @ a.T, rand(2, 3), t, method="exponential", options={"backend": "torch"})
    wanted = torch.stack([rand(2, 3) @ torch.matrix_exp(s * a).T for s in t])
    assert float((found - wanted).abs().max()) < 1e-11
