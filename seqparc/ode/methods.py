"""Steps of methods: each is a cell ((h, t, inputs…), y) -> y after the step, and a row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction as F
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.ode.field import Field

Leaves = Sequence[Tensor]


@dataclass(frozen=True)
class Table:
    """A method's coefficients (Butcher's): k_i = f(t + c_i h, y + h Σ_j a_ij k_j), then y + h Σ_i b_i k_i.

    Rows of `a` as long as their number are explicit; one longer, with an entry on the diagonal, are solved for k_i.
    """

    c: tuple[F, ...]
    a: tuple[tuple[F, ...], ...]
    b: tuple[F, ...]
    source: str


def _table(source: str, c: str, a: Sequence[str], b: str) -> Table:
    return Table(_row(c), tuple(map(_row, a)), _row(b), source)


def _row(text: str) -> tuple[F, ...]:
    return tuple(map(F, text.split()))


TABLES: dict[str, Table] = {
    "euler": _table("Euler", "0", [""], "1"),
    "midpoint": _table("Runge's midpoint rule", "0 1/2", ["", "1/2"], "0 1"),
    "heun2": _table("Heun's method of order 2", "0 1", ["", "1"], "1/2 1/2"),
    "heun3": _table("Heun's method of order 3", "0 1/3 2/3", ["", "1/3", "0 2/3"], "1/4 0 3/4"),
    "rk4": _table("Kutta's 3/8 rule, which torchdiffeq calls rk4", "0 1/3 2/3 1", ["", "1/3", "-1/3 1", "1 -1 1"], "1/8 3/8 3/8 1/8"),
    "rk4_classic": _table("the classical method of Runge and Kutta", "0 1/2 1/2 1", ["", "1/2", "0 1/2", "0 0 1"], "1/6 1/3 1/3 1/6"),
    "dopri5": _table(
        "Dormand and Prince 1980, order 5, at fixed step",
        "0 1/5 3/10 4/5 8/9 1",
        [
            "",
            "1/5",
            "3/40 9/40",
            "44/45 -56/15 32/9",
            "19372/6561 -25360/2187 64448/6561 -212/729",
            "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
        ],
        "35/384 0 500/1113 125/192 -2187/6784 11/84",
    ),
    "implicit_euler": _table("the implicit Euler method", "1", ["1"], "1"),
    "implicit_midpoint": _table("the implicit midpoint rule (Gauss, order 2), symplectic", "1/2", ["1/2"], "1"),
    "trapezoid": _table("the trapezoidal rule", "0 1", ["", "1/2 1/2"], "1/2 1/2"),
}

#: What `method` may be, and where each comes from.
METHODS: dict[str, str] = {name: table.source for name, table in TABLES.items()} | {
    "exponential": "the linearisation about the state and the middle of the step, solved exactly (exponential Rosenbrock-Euler; DEER, "
    "Lim et al. 2024, linearises alike)",
}


def step_of(method: str, field: Field, effort: int) -> Step:
    """The cell of a method."""
    if method == "exponential":
        return Exponential(field, effort)
    return RungeKutta(field, TABLES[method], effort)


class Step(nn.Module):
    """A step of size h [rows] from y at t [rows], with x at the times t + c h for each c of `nodes`.

    effort: Newton's iterations, or squarings. A `doubting` step also gives out how far they were from doing their part, [rows].
    """

    nodes: tuple[float, ...]
    doubting = False

    @property
    def signature(self) -> str:
        """How it is called."""
        return "x, state -> out, state" if self.doubting else "x, state -> state"

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest doubt of a step that has done its part."""
        raise NotImplementedError

    def __init__(self, field: Field, effort: int) -> None:
        super().__init__()
        self.field, self.effort = field, effort

    def inputs(self, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, list[Leaves]]:
        """h, t, and the leaves of the user's x at each node."""
        h, t, *rest = x
        n = len(rest) // len(self.nodes)
        return h, t, [rest[i * n : (i + 1) * n] for i in range(len(self.nodes))]


class RungeKutta(Step):
    """Explicit methods, and those that solve one stage after the other."""

    def __init__(self, field: Field, table: Table, effort: int) -> None:
        super().__init__(field, effort)
        self.nodes = tuple(dict.fromkeys(map(float, table.c)))
        self.stage = [self.nodes.index(float(c)) for c in table.c]
        self.a = [[float(v) for v in row] for row in table.a]
        self.b = [float(v) for v in table.b]

        self.doubting = any(len(row) > i for i, row in enumerate(self.a))

    def allowed(self, dtype: torch.dtype) -> float:
        """How far from solved before the last of Newton's steps, which squares it."""
        return 1e-10 if dtype is torch.float64 else 1e-5

    def forward(self, x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Any:
        h, t, inputs = self.inputs(x)
        slopes: list[Leaves] = []
        doubts: list[Tensor] = []
        for i, row in enumerate(self.a):
            at, now = t + self.nodes[self.stage[i]] * h, inputs[self.stage[i]]
            start = moved(y, h, row[:i], slopes)
            if len(row) > i:
                slope, doubt = self.solved(at, start, now, row[i] * h)
                doubts.append(doubt)
            else:
                slope = self.field(at, start, now)
            slopes.append(slope)
        after = tuple(moved(y, h, self.b, slopes))
        return ((torch.stack(doubts).amax(0), *after), after) if doubts else after

    def solved(self, t: Tensor, start: Leaves, x: Leaves, h: Tensor) -> tuple[Leaves, Tensor]:
        """k = f(t, start + h k) by Newton's method, and how far from solved it was before the last of its steps.

        The last step is all that a gradient sees: with k at the solution and M = 1 - h ∂f/∂y,

            k - M⁻¹ (k - f(t, start + h k))

        has the value k and, where k and M are held fixed, the derivative M⁻¹ ∂f that the implicit function theorem gives.
        """
        shapes = [v.shape for v in start]
        with torch.no_grad():
            fixed, held, size = [v.detach() for v in start], [v.detach() for v in x], h.detach()[:, None]
            k = flat(self.field(t.detach(), fixed, held))
            for step in range(self.effort):
                at = parts(flat(fixed) + size * k, shapes)
                slope, jacobian = linearised(self.field, t.detach(), at, held)
                inverse = inverted(torch.eye(k.shape[1], dtype=k.dtype, device=k.device) - size[:, :, None] * jacobian)
                if step < self.effort - 1:
                    k = k - (inverse @ (k - slope)[:, :, None])[:, :, 0]
            doubt = ((k - slope).abs() / (1 + k.abs())).amax(1)
        missing = k - flat(self.field(t, parts(flat(start) + h[:, None] * k, shapes), x))
        return parts(k - (inverse @ missing[:, :, None])[:, :, 0], shapes), doubt


class Exponential(Step):
    """y + h φ₁(h J) f, f and J = ∂f/∂y at y and the middle of the step: the exact solution of y' = f + J (y - y₀).

    φ₁(z) = (eᶻ - 1) / z, by Taylor's series of h J / 2^effort, doubled `effort` times: φ₁(2z) = (eᶻ + 1) φ₁(z) / 2.
    """

    nodes = (0.5,)
    doubting = True
    terms = 13  # 0.5^13 / 14! is 1e-15

    def forward(self, x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Any:
        h, t, inputs = self.inputs(x)
        slope, jacobian = linearised(self.field, t + 0.5 * h, y, inputs[0], create_graph=True)
        scaled = jacobian * (h / 2**self.effort)[:, None, None]
        one = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
        phi = one.expand_as(scaled)
        for k in range(self.terms, 1, -1):  # φ₁ = 1 + z/2 (1 + z/3 (1 + …))
            phi = one + scaled @ phi / k
        exponential = one + scaled @ phi
        for _ in range(self.effort):
            phi = 0.5 * (exponential @ phi + phi)
            exponential = exponential @ exponential
        after = flat(y) + h[:, None] * (phi @ slope[:, :, None])[:, :, 0]
        made = tuple(parts(after, [v.shape for v in y]))
        return (scaled.abs().sum(2).amax(1), *made), made

    def allowed(self, dtype: torch.dtype) -> float:
        """The norm up to which the series is exact."""
        return 0.5


def moved(y: Leaves, h: Tensor, weights: Sequence[float], slopes: Sequence[Leaves]) -> list[Tensor]:
    """y + h Σ w k, of each leaf."""
    terms = [(w, k) for w, k in zip(weights, slopes, strict=True) if w]
    if not terms:
        return list(y)
    return [v + h.reshape(-1, *[1] * (v.dim() - 1)) * sum(w * k[i] if w != 1 else k[i] for w, k in terms) for i, v in enumerate(y)]


def flat(leaves: Leaves) -> Tensor:
    """Leaves [rows, ...] as one tensor [rows, n]."""
    rows = [v.reshape(v.shape[0], -1) for v in leaves]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def parts(whole: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The leaves of a tensor [rows, n]."""
    sizes = [s[1:].numel() for s in shapes]
    pieces = whole.split(sizes, 1) if len(sizes) > 1 else (whole,)
    return [p.reshape(p.shape[0], *s[1:]) for p, s in zip(pieces, shapes, strict=True)]


def linearised(field: Field, t: Tensor, y: Leaves, x: Leaves, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """f(t, y) [rows, n] and ∂f/∂y [rows, n, n]."""
    shapes = [v.shape for v in y]
    with torch.enable_grad():
        at = flat(y)
        at = at if at.requires_grad else at.detach().requires_grad_()
        slope = flat(field(t, parts(at, shapes), x))
        rows, n = slope.shape
        each = torch.eye(n, dtype=slope.dtype, device=slope.device)[:, None].expand(n, rows, n)
        if not slope.requires_grad:
            return slope, slope.new_zeros(rows, n, n)
        (found,) = torch.autograd.grad(slope, at, each, create_graph=create_graph, is_grads_batched=True, allow_unused=True)
    return slope, found.transpose(0, 1) if found is not None else slope.new_zeros(rows, n, n)


def inverted(matrix: Tensor) -> Tensor:
    """The inverse of matrices [rows, n, n], by Gauss and Jordan without pivots: those of small steps are close to one."""
    n = matrix.shape[1]
    whole = torch.cat((matrix, torch.eye(n, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)), 2)
    for i in range(n):
        row = whole[:, i : i + 1] / whole[:, i : i + 1, i : i + 1]
        rest = whole - whole[:, :, i : i + 1] * row
        whole = torch.cat((rest[:, :i], row, rest[:, i + 1 :]), 1)
    return whole[:, :, n:]
