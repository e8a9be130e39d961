"""`rnn.validate(x)`: a compiled cell against the plain loop in higher precision, values and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from seqparc.draws import seed
from seqparc.errors import ShapeError
from seqparc.plan import Stats
from seqparc.report import rendered
from seqparc.runtime.module import CompiledRNN
from seqparc.runtime.reference import loop
from seqparc.surroundings import untransformed
from seqparc.tree import flatten

#: A compiled result may lose this many times what the plain loop itself loses in the same precision.
FACTOR = 4.0
#: Relative error that is always allowed, in units of the dtype's epsilon: the plain loop may be exact by luck.
UNITS = 8.0
QUARTERS = 4
#: The bound where the reference is no more precise than the run itself.
SAME_PRECISION = 1e-10


@dataclass(frozen=True)
class Row:
    """Errors of one tensor, relative to the largest magnitude in the reference."""

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float
    loop: float  # largest error of the plain loop in the run's own precision
    bound: float
    apart: float = 0.0  # largest difference from the plain loop in the run's own precision
    #: The largest error in each quarter of time, and the plain loop's own; of tensors [batch, time, ...].
    quarters: tuple[tuple[float, float], ...] = ()

    @property
    def ratio(self) -> float:
        """How many times what the plain loop loses."""
        return self.largest / self.loop if self.loop else float("inf") if self.largest else 1.0

    @property
    def ok(self) -> bool:
        return self.largest <= self.bound


@dataclass(frozen=True)
class Report:
    """What `validate` found. `ok`: every error is within its bound and NaN stands exactly where the plain loop has it."""

    name: str
    rows: tuple[Row, ...]
    stats: Stats
    reference: str
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(r.ok for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything in it, of plain types."""
        rows = [{**asdict(r), "shape": list(r.shape), "ratio": r.ratio, "ok": r.ok} for r in self.rows]
        return {"cell": self.name, "ok": self.ok, "reference": self.reference, "rows": rows, "stats": asdict(self.stats)}

    def table(self) -> Table:
        title, caption = f"{self.name} against the plain loop in {self.reference}", "\n".join(self._lines())
        table = Table(title=title, caption=caption, caption_justify="left")
        table.add_column("tensor")
        table.add_column("shape")
        for head in ("largest error", "mean error", "plain loop's own", "from the plain loop", "allowed", ""):
            table.add_column(head, justify="right")
        for r in self.rows:
            numbers = (f"{v:.2g}" for v in (r.largest, r.mean, r.loop, r.apart, r.bound))
            table.add_row(r.name, str(list(r.shape)), *numbers, "ok" if r.ok else "WRONG")
        return table

    def _lines(self) -> list[str]:
        lines = ["errors are relative to the tensor's largest magnitude"]
        for r in self.rows:
            if r.quarters:
                told = ", ".join(f"{mine:.2g} ({own:.2g})" for mine, own in r.quarters)
                lines.append(f"{r.name} by quarters of time, the plain loop's own in brackets: {told}")
        for direction, s in (("forward", self.stats), ("backward", self.stats.backward)):
            if s is not None:
                end = "converged" if s.converged else f"finished sequentially: {s.fallback}"
                lines.append(
                    f"{direction}: {s.backend}, {s.strategy}, {s.chunks} chunk{'s' * (s.chunks != 1)} of {s.chunk_length} steps, "
                    f"{s.passes} pass{'es' * (s.passes != 1)}, gap {s.gap:.2g}, {end}"
                )
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return rendered(self.table())


def _differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


class Precise(TorchFunctionMode):
    """Runs PyTorch code in another floating-point dtype: every tensor of a lower one is converted where it is first used.

    A parameter keeps one converted stand-in, so its gradient is had in the same precision; see `leaf`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtypes = (dtype, dtype.to_complex())
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(self, t: Tensor) -> Tensor:
        """The stand-in of a parameter or other tensor that requires a gradient and has no history; itself if precise enough."""
        if t.dtype in self.dtypes:
            return t
        if id(t) not in self.leaves:
            with untransformed():  # a cell may call torch.func's transforms, and this is no part of it
                self.leaves[id(t)] = (t, t.detach().to(self.dtypes[t.is_complex()]).requires_grad_())
        return self.leaves[id(t)][1]

    def raised(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _differentiable(value) or value.dtype in self.dtypes:
            return value
        return self.leaf(value) if value.is_leaf and value.requires_grad else value.to(self.dtypes[value.is_complex()])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # an attribute such as .shape or .dtype
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.raised, (tuple(args), kwargs or {}))
        asked = kwargs.get("dtype")
        if isinstance(asked, torch.dtype) and (asked.is_floating_point or asked.is_complex):
            kwargs["dtype"] = self.dtypes[asked.is_complex]
        return func(*args, **kwargs)


def _parameters(rnn: CompiledRNN) -> dict[str, Tensor]:
    """Every tensor a gradient can be asked of besides x and the state, by name."""
    named: dict[str, Tensor] = dict(rnn.cell.named_parameters()) if isinstance(rnn.cell, nn.Module) else {}
    known = {id(t) for t in named.values()}
    named |= {name: t for name, t in rnn.captured().items() if id(t) not in known and t.is_leaf}
    return {n: t for n, t in named.items() if t.requires_grad}


def validate(rnn: CompiledRNN, x: Any, state: Any = None, grad: bool = True, reference_dtype: torch.dtype = torch.float64) -> Report:
    """Compare `rnn(x, state)` and its gradients with the plain loop over the cell.

    x [batch, time, ...], state [batch, ...] or None for the initial state. The plain loop runs twice: in `reference_dtype`,
    which is taken for the truth, and in the cell's own precision, whose error is the measure. Gradients are those of a sum
    of all outputs and the last state with fixed random weights. Raises ShapeError as a call does.
    """
    if not reference_dtype.is_floating_point:
        raise ShapeError(f"reference_dtype is {reference_dtype}; choose a floating-point dtype")
    leaves, convention, start = rnn.understand(x, state)
    own = next((t.dtype.to_real() if t.is_complex() else t.dtype for t in (*start, *leaves) if _differentiable(t)), torch.float32)

    with torch.set_grad_enabled(grad), torch.random.fork_rng(devices=sorted({t.device.index for t in leaves if t.is_cuda})):
        rnn(x, state)  # compiles, so that everything the cell closes over is known
        parameters = _parameters(rnn) if grad else {}

        def plain(xs: list[Tensor], ss: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return loop(lambda a, b: convention.call(rnn.cell, a, b), xs, ss)

        def compiled(xs: list[Tensor], ss: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            y, last = rnn(convention.inputs.unflatten(xs), convention.state.unflatten(ss))
            return flatten(y)[0], flatten(last)[0]

        def run(call: Callable[..., Any], mode: Precise | None) -> tuple[list[Tensor], list[Tensor | None]]:
            def copied(t: Tensor) -> Tensor:
                t = t.detach().clone() if mode is None else mode.raised(t.detach()).clone()
                return t.requires_grad_(grad and _differentiable(t))

            xs, ss = [copied(t) for t in leaves], [copied(t) for t in start]
            seed(leaves[0].device)  # for cells that draw
            with mode or contextlib.nullcontext():
                outputs, last = call(xs, ss)
            results = [*outputs, *last]
            if not grad:
                return results, []
            wanted = [t for t in (*xs, *ss) if t.requires_grad]
            wanted += list(parameters.values()) if mode is None else [mode.leaf(p) for p in parameters.values()]
            real = [torch.view_as_real(r) if r.is_complex() else r for r in results]
            scalar = sum((w.to(r.dtype) * r).sum() for w, r in zip(_weights(real), real, strict=True) if r.requires_grad)
            if not isinstance(scalar, Tensor):
                return results, [None] * len(wanted)
            return results, list(torch.autograd.grad(scalar, wanted, allow_unused=True))

        truth, eager, mine = run(plain, Precise(reference_dtype)), run(plain, None), run(compiled, None)
    names = _names("y", len(mine[0]) - len(start)) + _names("last", len(start))
    rows = [
        _row(n, own, a, b, c, along_time=i < len(names) - len(start))
        for i, (n, a, b, c) in enumerate(zip(names, mine[0], eager[0], truth[0], strict=True))
    ]
    if grad:
        floats = [k for k, t in zip(_names("x", len(leaves)), leaves, strict=True) if _differentiable(t)]
        floats += [k for k, t in zip(_names("state", len(start)), start, strict=True) if _differentiable(t)]
        named = [f"gradient of {n}" for n in (*floats, *parameters)]
        for name, a, b, c in zip(named, mine[1], eager[1], truth[1], strict=True):
            if a is not None or c is not None:
                like = next(t for t in (c, a) if t is not None)
                p, q, r = (torch.zeros_like(like) if t is None else t for t in (a, b, c))
                rows.append(_row(name, own, p, q, r))
    return Report(rnn.name, tuple(rows), rnn.stats, str(reference_dtype).removeprefix("torch."))


def _names(word: str, count: int) -> list[str]:
    return [word] if count == 1 else [f"{word}[{i}]" for i in range(count)]


def _weights(results: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results]


def _row(name: str, own: torch.dtype, mine: Tensor, loop: Tensor, truth: Tensor, along_time: bool = False) -> Row:
    """Errors of one tensor; NaN and inf must stand where they stand in the plain loop, and count as an infinite error if not."""
    a, b, c = (torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach() for t in (mine, loop, truth))
    a, b, c = a.double(), b.double(), c.double()
    scale = (float(c[c.isfinite()].abs().max()) if bool(c.isfinite().any()) else 0.0) or 1.0

    def worst(p: Tensor, q: Tensor) -> float:
        """The largest difference where both are finite."""
        error = (p - q).abs()[p.isfinite() & q.isfinite()]
        return float(error.max()) / scale if error.numel() else 0.0

    same = torch.where(a.isfinite(), b.isfinite(), (a == b) | (a.isnan() & b.isnan()))
    error = (a - c).abs()[a.isfinite() & c.isfinite()] / scale
    lost = worst(b, c)
    bound = SAME_PRECISION if own is torch.float64 else max(FACTOR * lost, UNITS * torch.finfo(own).eps)
    parts = list(zip(*(t.tensor_split(QUARTERS, 1) for t in (a, b, c)), strict=True)) if along_time and a.shape[1] >= QUARTERS else []
    return Row(
        name, tuple(mine.shape), largest=worst(a, c) if bool(same.all()) else float("inf"),
        mean=float(error.mean()) if error.numel() else 0.0, loop=lost, bound=bound, apart=worst(a, b),
        quarters=tuple((worst(p, r), worst(q, r)) for p, q, r in parts),
    )  # fmt: skip
