"""From a right-hand side and times to a solution: the grid of steps, the inputs at every stage, one call of a compiled cell."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqparc.convention import called
from seqparc.errors import ConvergenceError, ShapeError
from seqparc.ode.field import Field, find
from seqparc.ode.methods import METHODS, Step, step_of
from seqparc.ode.paths import KINDS, Path
from seqparc.options import Options
from seqparc.plan import Stats
from seqparc.runtime.module import CompiledRNN
from seqparc.tree import Structure, describe, flatten

#: Newton's iterations, or squarings, that a step begins with and ends with.
EFFORT, MOST = 3, 12
#: Solvers that `solve` keeps.
KEPT = 32


@dataclass(frozen=True)
class Settings:
    """How an equation is solved.

    steps_per_interval  steps of equal size between one time of t and the next
    step_size           instead: steps of this size from t[0] on, the last one shorter, as torchdiffeq takes them
    interp              the solution between the ends of steps, where step_size does not lead to t: "linear" or "cubic" (Hermite)
    x_interp            x between its samples: "linear", "cubic" or "previous" (see `Path`)
    effort              Newton's iterations of implicit methods, squarings of "exponential": to begin with; more if they do not do
    run                 how the compiled step runs: a `seqparc.Options`. In a dict its fields stand beside the others
    """

    steps_per_interval: int = 1
    step_size: float | None = None
    interp: Literal["linear", "cubic"] = "linear"
    x_interp: Literal["linear", "cubic", "previous"] = "linear"
    effort: int = EFFORT
    run: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        for name, choices in (("interp", ("linear", "cubic")), ("x_interp", KINDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}")
        if self.steps_per_interval < 1 or self.effort < 1:
            raise ValueError("steps_per_interval and effort are at least 1")
        if self.step_size is not None and (self.steps_per_interval != 1 or not self.step_size > 0):
            raise ValueError("step_size is positive, and instead of steps_per_interval")

    @classmethod
    def of(cls, options: Settings | Options | dict[str, Any] | None) -> Settings:
        """Settings from themselves, `seqparc.Options`, a dict of the fields of both, or None."""
        if isinstance(options, cls):
            return options
        if isinstance(options, Options):
            return cls(run=options)
        if options is not None and not isinstance(options, dict):
            raise TypeError(f"options must be a dict, seqparc.Options, seqparc.ode.Settings or None, not {type(options).__name__}")
        own = {f.name for f in fields(cls)}
        rest = {k: v for k, v in (options or {}).items() if k not in own}
        unknown = sorted(set(rest) - {f.name for f in fields(Options)})
        if unknown:
            known = sorted((own | {f.name for f in fields(Options)}) - {"run"})
            raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}")
        given = {k: v for k, v in (options or {}).items() if k in own}
        return cls(**given) if not rest else cls(**given, run=Options.of(rest))


class Grid(NamedTuple):
    """Steps: where each begins and how long it is, [steps] or [steps, batch], and which interval of t it lies in, if that is known."""

    begin: Tensor
    size: Tensor
    interval: Tensor | None


class Given(NamedTuple):
    """A call of the compiled step, x and y [batch, ...], and what it was made of."""

    t: Tensor
    grid: Grid
    inputs: _Inputs
    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    structure: Structure
    field: Field


class Solver(nn.Module):
    """dy/dt = func(t, y) or func(t, y, x) by one method: `solver(y0, t, x)` is `solve(func, y0, t, x, method, options)`.

    It keeps what was found out about func, and compiles once for all numbers of steps and batch sizes. `stats` tells of the last call,
    `compiled` is the compiled step of the last call, which explains and validates itself.
    """

    compiled: CompiledRNN | None

    def __init__(self, func: Any, method: str = "rk4", options: Any = None) -> None:
        super().__init__()
        if method not in METHODS:
            adaptive = " Steps are of fixed size: there is no error control, and no rtol or atol."
            raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}.{adaptive}")
        if not callable(func):
            raise TypeError(f"func is a module or a function func(t, y) or func(t, y, x), not {type(func).__name__}")
        self.func, self.method, self.settings = func, method, Settings.of(options)
        self._fields: dict[Any, Field] = {}
        self._compiled: dict[Any, tuple[CompiledRNN, Step]] = {}
        self.__dict__["compiled"] = None  # not a part of its own: it has the parameters of func
        self._effort = self.settings.effort

    @property
    def stats(self) -> Stats:
        """What the last call did."""
        return self.compiled.stats if self.compiled is not None else Stats()

    def forward(self, y0: Any, t: Tensor, x: Any = None) -> Any:
        """The solution at t; see `solve`."""
        leaves, structure = flatten(y0)
        t = _checked(t, leaves)
        if len(t) < 2 or not all(v.numel() for v in leaves):
            return structure.unflatten([v.expand(len(t), *v.shape) for v in leaves])
        given = self.given(y0, t, x)
        states = self._run(given)
        shown = self._shown(given, [torch.cat((v[None], s.transpose(0, 1))) for v, s in zip(given.y, states, strict=True)])
        return given.structure.unflatten(shown if given.field.kept else [v[:, 0] for v in shown])

    def validate(self, y0: Any, t: Tensor, x: Any = None, **how: Any) -> Any:
        """Values and gradients against the plain loop of the same steps in float64: a Report; see `CompiledRNN.validate`."""
        given = self.given(y0, _checked(t, flatten(y0)[0]), x)
        self._run(given)
        assert self.compiled is not None
        return self.compiled.validate(given.x, given.y, **how)

    def _run(self, given: Given) -> list[Tensor]:
        """Leaves [batch, steps, ...] of the states after each step."""
        while True:
            rnn, step = self._cell(given.field)
            self.__dict__["compiled"] = rnn
            y, _ = rnn(given.x, given.y)
            if not step.doubting:
                return list(y)
            doubt, *states = y
            worst, allowed = float(doubt.detach().nan_to_num(0.0).max()), step.allowed(given.y[0].dtype)
            if worst <= allowed:  # what is no number shows itself in the states
                return states
            if step.effort >= MOST:
                raise ConvergenceError(
                    f"{self.method}: after {step.effort} iterations a step of {called(self.func)} is {worst:.3g} from solved, "
                    f"{allowed:.3g} being allowed. Take smaller steps (steps_per_interval), or an explicit method.",
                    best=[s.detach() for s in states],
                    gap=worst,
                )
            self._effort = min(2 * step.effort, MOST)

    def _cell(self, field: Field) -> tuple[CompiledRNN, Step]:
        """The compiled step, made anew where func is called otherwise or more effort is wanted."""
        key = (field.y, field.x, field.kept, field.way, field.recording, self._effort)
        if key not in self._compiled:
            made = step_of(self.method, field, self._effort)
            name = f"{self.method} of {called(self.func)}"
            rnn = CompiledRNN(made, state=None, signature=made.signature, options=self.settings.run, name=name)
            self._compiled[key] = rnn, made
        return self._compiled[key]

    # -- what a call is given ----------------------------------------------------------------------------------------

    def given(self, y0: Any, t: Tensor, x: Any = None) -> Given:
        """The call of the compiled step that solves an equation."""
        leaves, structure = flatten(y0)
        grid = _grid(t, self.settings)
        inputs = _Inputs(x if x is None or callable(x) else Path(t, x, self.settings.x_interp), grid)
        found = self._field(y0, t, inputs)
        if not found.kept:
            if t.dim() > 1:
                raise ShapeError(f"t is {list(t.shape)}, times of each sample, but {called(self.func)} takes y0 as one state, not a batch")
            leaves = [v[None] for v in leaves]
        batch = len(leaves[0])
        if t.dim() > 1 and t.shape[1] != batch:
            raise ShapeError(f"t is {list(t.shape)} and y0 has {batch} samples: t is [times] or [times, batch]")
        step = step_of(self.method, found, self._effort)
        if step.doubting and any(v.is_complex() for v in leaves):
            raise ShapeError(f"{self.method} is for real states; view them as real numbers, or take an explicit method")
        dtype = leaves[0].abs().dtype

        def rows(v: Tensor) -> Tensor:
            """Batch first: [steps] and [steps, batch, ...] as [batch, steps, ...]."""
            return v.transpose(0, 1) if v.dim() > 1 else v[None].expand(batch, -1)

        call = [rows(grid.size.to(dtype)), rows(grid.begin.to(dtype))]
        for c in step.nodes:
            call += [v.transpose(0, 1) if found.kept else v[None] for v in inputs.at(c)]
        return Given(t, grid, inputs, tuple(call), tuple(leaves), structure, found)

    def _field(self, y0: Any, t: Tensor, inputs: _Inputs) -> Field:
        """How func is called for what is like this y0, t and x."""
        first = [v[0] for v in inputs.at(0.0)]
        about = tuple((tuple(v.shape), v.dtype, v.device) for v in (*flatten(y0)[0], *first))
        training = tuple(m.training for m in self.func.modules()) if isinstance(self.func, nn.Module) else ()
        key = (flatten(y0)[1], inputs.structure, about, t.dim(), training)
        if key not in self._fields:
            self._fields[key] = find(self.func, t, y0, None if inputs.structure is None else inputs.structure.unflatten(first))
        return self._fields[key]

    # -- what it gives -----------------------------------------------------------------------------------------------

    def _shown(self, given: Given, states: list[Tensor]) -> list[Tensor]:
        """The solution at t, of leaves [steps + 1, batch, ...] at the ends of steps."""
        if self.settings.step_size is None:
            return [s[:: self.settings.steps_per_interval] for s in states]
        times = torch.cat((given.grid.begin, given.grid.begin[-1:] + given.grid.size[-1:]))
        step = (torch.searchsorted(*((times, given.t) if given.t[-1] > given.t[0] else (-times, -given.t))) - 1).clamp(min=0)
        u = ((given.t - times[step]) / given.grid.size[step]).clamp(max=1.0)
        slopes = self._slopes(given, states) if self.settings.interp == "cubic" else [None] * len(states)
        return [_between(u, given.grid.size[step], s[step], s[step + 1], d, step) for s, d in zip(states, slopes, strict=True)]

    def _slopes(self, given: Given, states: list[Tensor]) -> list[Tensor]:
        """dy/dt at the ends of steps [steps + 1, batch, ...], in one call of func."""
        grid, field = given.grid, given.field
        lead = len(grid.begin) + 1, states[0].shape[1]
        times = torch.cat((grid.begin, grid.begin[-1:] + grid.size[-1:])).to(states[0].abs().dtype)
        inputs = [torch.cat((a, b[-1:])) for a, b in zip(given.inputs.at(0.0), given.inputs.at(1.0), strict=True)]
        inputs = [v if field.kept else v[:, None] for v in inputs]
        found = field(times[:, None].expand(lead).reshape(-1), [s.flatten(0, 1) for s in states], [v.flatten(0, 1) for v in inputs])
        return [d.reshape(*lead, *d.shape[1:]) for d in found]


class _Inputs:
    """x at the nodes of steps."""

    def __init__(self, path: Any, grid: Grid) -> None:
        self.path, self.grid = path, grid
        self.structure: Structure | None = None
        self.at(0.0)

    def at(self, c: float) -> list[Tensor]:
        """Leaves [steps, ...] at the times that are the part c into each step."""
        if self.path is None:
            return []
        begin, size, interval = self.grid
        owner = getattr(self.path, "__self__", self.path)
        if isinstance(owner, Path):
            # At its ends a step is on the piece that it goes through, not on a neighbour.
            piece = owner.pieces(begin + (0.998 * c + 0.001) * size) if interval is None or owner is not self.path else interval
            values = self.path(begin + c * size, piece)
        else:
            values = self.path(begin + c * size)
        leaves, self.structure = flatten(values)
        for v in leaves:
            if v.shape[:1] != begin.shape[:1]:
                raise ShapeError(f"x gave {describe(leaves)} at {len(begin)} times; it gives [times, ...]")
        return leaves


def _between(u: Tensor, size: Tensor, y0: Tensor, y1: Tensor, slopes: Tensor | None, step: Tensor) -> Tensor:
    """The solution the part u [times] into steps from y0 to y1 [times, ...]."""
    u, size = (v.to(y0.abs().dtype).reshape(-1, *[1] * (y0.dim() - 1)) for v in (u, size))
    if slopes is None:
        return torch.where(u == 1, y1, y0 + u * (y1 - y0))
    a, b = slopes[step], slopes[step + 1]
    return (1 + 2 * u) * (1 - u) ** 2 * y0 + u * (1 - u) ** 2 * size * a + u * u * (3 - 2 * u) * y1 + u * u * (u - 1) * size * b


def _checked(t: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """t where y0 is; raises ShapeError for times that are none."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() not in (1, 2):
        seen = describe([t]) if isinstance(t, Tensor) else type(t).__name__
        raise ShapeError(f"t is {seen}; it is a floating-point tensor [times] or [times, batch]")
    if not leaves or not all(v.is_floating_point() or v.is_complex() for v in leaves):
        raise ShapeError(f"y0 is {describe(leaves)}; it consists of floating-point or complex tensors")
    spans = t.detach()[1:] - t.detach()[:-1]
    if not bool(((spans > 0).all(0) | (spans < 0).all(0)).all()):
        raise ShapeError("t must go up, or go down, from each time to the next")
    return t.to(leaves[0].device)


def _grid(t: Tensor, settings: Settings) -> Grid:
    """The steps that lead from each time to the next, or of a given size from the first time on."""
    if settings.step_size is not None:
        if t.dim() > 1:
            raise ShapeError("step_size is for times that all samples share; with t [times, batch] say steps_per_interval")
        towards = settings.step_size if t[-1] > t[0] else -settings.step_size
        n = int(torch.ceil((t[-1] - t[0]).detach() / towards + 1))
        ends = torch.cat((t[0] + towards * torch.arange(n - 1, dtype=t.dtype, device=t.device), t[-1:]))
        return Grid(ends[:-1], ends[1:] - ends[:-1], None)
    m = settings.steps_per_interval
    size = ((t[1:] - t[:-1]) / m).repeat_interleave(m, 0)
    part = torch.arange(m, dtype=t.dtype, device=t.device).repeat(len(t) - 1)
    begin = t[:-1].repeat_interleave(m, 0)
    begin = begin + size * part.reshape(-1, *[1] * (t.dim() - 1)) if m > 1 else begin
    return Grid(begin, size, torch.arange(len(t) - 1, device=t.device).repeat_interleave(m))


@functools.lru_cache(KEPT)
def _kept(func: Any, method: str, settings: Settings) -> Solver:
    return Solver(func, method, settings)


def solve(func: Any, y0: Any, t: Tensor, x: Any = None, method: str = "rk4", options: Any = None) -> Any:
    """The solution of dy/dt = func(t, y), or func(t, y, x), from y0 at t[0], at all times t: y [times, ...], the first being y0.

    func     a module or function: t a tensor without axes, y like y0; it returns what y is like
    y0       a tensor [batch, ...] or, where func takes it as a whole, [...]; or a tree of such
    t        [times], going up or down; or [times, batch], times of each sample
    x        what the right-hand side is driven by: samples at t, a tensor or tree [times, batch, ...]; or a path, which is called with
             times [n] and gives values [n, batch, ...] (`seqparc.ode.Path`, its `derivative`, any function)
    method   one of `seqparc.ode.METHODS`; all take steps of fixed size. "rk4" is what torchdiffeq calls so, Kutta's 3/8 rule
    options  a dict of the fields of `seqparc.ode.Settings` and of `seqparc.Options`

    Differentiable in y0, t, x and the parameters of func: the gradient is that of the discrete solution, the same that autograd gives
    through a loop over the steps. What was compiled for a func is kept for the last 32 of them; a `Solver` keeps its own.

    Raises ShapeError for y0, t or x of the wrong shape, SignatureError where func cannot be called, ConvergenceError where an implicit
    step cannot be solved, and what `seqparc.compile` documents.
    """
    settings = Settings.of(options)
    solver = _kept(func, method, settings) if isinstance(func, Hashable) else Solver(func, method, settings)
    return solver(y0, t, x)
