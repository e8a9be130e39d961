"""The right-hand side dy/dt = func(t, y) or func(t, y, x), of many samples that may each be at a time of its own.

Users write func for one time, a tensor without axes, and for y as they have it: a batch, or one state without a batch axis. A cell
computes rows [rows, ...] that know nothing of each other. How func is called for rows is found out, and held against what it gives for
one row at a time: the first way that agrees is taken.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.convention import called
from seqparc.errors import SignatureError
from seqparc.tree import Structure, describe, flatten, seen

#: Rows of a trial.
ROWS = 4


class Field(nn.Module):
    """func of rows: t [rows], leaves of y [rows, ...], leaves of x [rows, ...] -> leaves of dy/dt [rows, ...].

    kept: a row of y goes to func as a batch of one, because func takes batches; otherwise without that axis.
    """

    def __init__(self, func: Any, y: Structure, x: Structure | None, kept: bool, way: str, recording: bool = False) -> None:
        super().__init__()
        self.func = func
        if inspect.ismethod(func) and isinstance(func.__self__, nn.Module):
            self.owner = func.__self__  # a method's parameters are its module's
        self.y, self.x, self.kept, self.way = y, x, kept, way
        self.recording = recording  # func asks autograd for a derivative and leaves it to the caller to have it switched on

    def given(self, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
        """What func gives for one time."""
        args = (t, self.y.unflatten(y)) if self.x is None else (t, self.y.unflatten(y), self.x.unflatten(x))
        with torch.enable_grad() if self.recording else contextlib.nullcontext():
            result = self.func(*args)
        found = self.y.conform(result)
        if found is None:
            raise SignatureError(f"{called(self.func)} returned {seen(result)} as the derivative of y = {seen(args[1])}; it must be alike")
        return [d.expand(v.shape) for d, v in zip(found, y, strict=True)]

    def alone(self, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
        """What func gives for one row, t [], y and x [...]."""
        if not self.kept:
            return self.given(t, y, x)
        return [d[0] for d in self.given(t, [v[None] for v in y], [v[None] for v in x])]

    def forward(self, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
        return WAYS[self.way](self, t, y, x)


def _whole(field: Field, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """All rows in one call, for a func that does not look at the time: that of the first row, which no other may read."""
    return field.given(t[0], y, x)


def _spread(field: Field, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """All rows in one call, the time as a column."""
    return field.given(t.reshape(-1, *[1] * (y[0].dim() - 1)), y, x)


def _each(field: Field, t: Tensor, y: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """Each row by itself, batched by torch."""
    return torch.vmap(field.alone)(t, list(y), list(x))  # type: ignore[no-any-return]


#: How func may be called for rows, the plainest first.
WAYS: dict[str, Callable[[Field, Tensor, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]] = {
    "whole": _whole,
    "spread": _spread,
    "each": _each,
}


class _Looks(torch.utils._python_dispatch.TorchDispatchMode):
    """Whether any operation is given a certain tensor, or memory of it."""

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.memory, self.seen = t.untyped_storage()._cdata, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for a in torch.utils._pytree.tree_leaves((args, kwargs or {})):
            if isinstance(a, Tensor) and a.untyped_storage()._cdata == self.memory:
                self.seen = True
        return func(*args, **(kwargs or {}))


def find(func: Any, t: Tensor, y: Any, x: Any) -> Field:
    """How to call func, at times t [steps] or [steps, batch], from a state y, with inputs x at one time or None.

    Raises SignatureError, which says what was tried.
    """
    y_leaves, y_structure = flatten(y)
    x_leaves, x_structure = flatten(x) if x is not None else ([], None)
    told: list[str] = []
    generator = torch.Generator().manual_seed(0)
    sizes = {v.shape[:1] for v in (*y_leaves, *x_leaves)}
    times = t.detach().reshape(-1).to(y_leaves[0].abs().dtype)
    times = times[torch.linspace(0, len(times) - 1, ROWS, device=times.device).long()]
    times = times + torch.rand(ROWS, generator=generator).to(times) * (times[-1] - times[0]) / ROWS
    with torch.random.fork_rng(devices=[]):
        for kept in (True, False):
            if kept and (len(sizes) != 1 or sizes == {torch.Size([])}):
                told.append("as a batch: not all leaves of y and x have the same first axis")
                continue
            for recording in (False, True):
                made = Field(func, y_structure, x_structure, kept, "whole", recording)
                try:
                    found = _agreeing(made, times, y_leaves, x_leaves, generator)
                except Exception as error:  # whatever func raises when it is called as it was not meant to be
                    found = f"{type(error).__name__}: {error}"
                if found is None:
                    return made
                told.append(f"{'as a batch' if kept else 'as one state'}: {found}")
                if "not require grad" not in found:
                    break
    shown = "\n  ".join(dict.fromkeys(told))
    if "data-dependent" in shown:
        shown += "\nWhat Python decides by a tensor's value is one for all steps: write torch.where(condition, a, b) in place of an if."
    raise SignatureError(
        f"{called(func)} could not be called as dy/dt = func(t, y{'' if x is None else ', x'}) with y = {describe(y_leaves)}, for several "
        f"times at once and with the same results as for one:\n  {shown}\n"
        "func takes t without axes and y as y0 is, returns what y is like, and does nothing at random."
    )


def _agreeing(
    field: Field, times: Tensor, y: Sequence[Tensor], x: Sequence[Tensor], generator: torch.Generator
) -> str | None:
    """Set the way to call a field that agrees with one row at a time; None, or what is the matter."""
    with torch.no_grad():
        if field.kept:
            ys, xs = ([_near(v, generator) for v in leaves] for leaves in (y, x))
            together = field.given(times[0], ys, xs)
            for i in {0, len(ys[0]) // 2, len(ys[0]) - 1}:
                one = field.alone(times[0], [v[i] for v in ys], [v[i] for v in xs])
                if not _same([d[i] for d in together], one):
                    return "a row alone gives something else than in its batch, so that y is taken for one state"
        rows = [[_near(v[torch.arange(ROWS) % len(v)] if field.kept else v.expand(ROWS, *v.shape), generator) for v in of] for of in (y, x)]
        wanted = [field.alone(times[i], [v[i] for v in rows[0]], [v[i] for v in rows[1]]) for i in range(ROWS)]
        stacked = [torch.stack(leaf) for leaf in zip(*wanted, strict=True)]
        failed: Exception | None = None
        for way in WAYS:
            field.way = way
            at, first = times.clone(), times[0].clone()
            try:
                with _Looks(first) as looks:
                    found = field.given(first, *rows) if way == "whole" else field(at, *rows)
            except Exception as error:  # this way is not how func may be called
                failed = error
                continue
            if not (way == "whole" and looks.seen) and _same(found, stacked):
                return None
        if failed is not None:
            raise failed
        return "several rows at once give something else than one at a time"


def _near(v: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers near those of a tensor, none like another."""
    v = v.detach()
    if not (v.is_floating_point() or v.is_complex()):
        return v.clone()
    noise = torch.rand(v.shape, generator=generator, dtype=torch.float64) - 0.5
    return v + 0.1 * (1 + v.abs()) * noise.to(v.device, v.abs().dtype)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Equal up to rounding, which products of other sizes make otherwise."""
    for p, q in zip(a, b, strict=True):
        unit = 1e-9 if p.abs().dtype is torch.float64 else 1e-4
        scale = float(q.abs().nan_to_num(0.0, 0.0, 0.0).max()) if q.numel() else 0.0
        if p.shape != q.shape or not torch.allclose(p, q, rtol=unit, atol=unit * scale, equal_nan=True):
            return False
    return True
