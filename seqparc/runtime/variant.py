"""Sequences of different lengths, and states put back on the way.

A reset is part of the step: the cell is compiled with `where(reset, initial, state)` in front, so the kernels, the Jacobians and the
gradients know of it, and a reset is a place where chunks converge at once. A length is not, as a state that is only held after its end
would have to travel through all chunks behind it: the run goes on, over the sample's last input, and what counts is picked out. Only where
it grows beyond all numbers on the way, and its gradients with it, is the state put back at every step past the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc.convention import Convention
from seqparc.errors import ShapeError
from seqparc.runtime.derived import Derived
from seqparc.surroundings import bare, empty, watched


class Variant(Derived):
    """A cell that gives its states out beside its outputs, and with `resets` is told where to begin anew and from what.

    ((x leaves, reset, initial state leaves), (state leaves)) -> ((output leaves, state leaves), (state leaves)).
    """

    def __init__(self, cell: Any, convention: Convention, n_x: int, resets: bool) -> None:
        super().__init__(cell, convention, n_x)
        self.resets, self.more_out = resets, convention.state.count
        self.more_in = 1 + convention.state.count if resets else 0

    def forward(self, given: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, now = given[: self.n_x], list(state)
        if self.resets:
            again, *initial = given[self.n_x :]
            now = [torch.where(again.reshape(-1, *[1] * (s.dim() - 1)), i, s) for i, s in zip(initial, now, strict=True)]
        out, following = self.convention.call(self.cell, list(x), now)
        # Clones: a cell may write into its state. Contiguous: torch.export cannot reason about strides that are kept.
        return (*(out or ()), *(s.clone(memory_format=torch.contiguous_format) for s in following)), tuple(following)


def checked_reset(reset: Any, x: Tensor) -> Tensor:
    """`reset` as a tensor of bools [batch, time]. Raises ShapeError."""
    found = torch.as_tensor(reset, device=x.device)
    if found.shape != x.shape[:2] or found.dtype is not torch.bool:
        raise ShapeError(
            f"reset is {found.dtype} of shape {list(found.shape)}; it must be bools [batch, time] = {list(x.shape[:2])}: True where the "
            "state is put back before that step"
        )
    return found


def checked_lengths(lengths: Any, x: Tensor) -> Tensor:
    """`lengths` as a tensor of ints [batch]. Raises ShapeError."""
    found = torch.as_tensor(lengths, device=x.device)
    batch, steps = x.shape[:2]
    if found.shape != (batch,) or found.dtype.is_floating_point or found.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ShapeError(f"lengths is {found.dtype} of shape {list(found.shape)}; it must be ints [batch] = [{batch}]")
    fit, _ = bare(((found >= 0) & (found <= steps)).all())
    if empty(fit) or watched():  # looked at when there are numbers
        torch._assert_async(fit, "lengths must be from 0 to the number of steps")  # type: ignore[attr-defined]
    elif not fit.all():
        raise ShapeError(f"lengths go from {int(bare(found)[0].min())} to {int(bare(found)[0].max())}; x has {steps} steps")
    return found.long()


def inside(lengths: Tensor, steps: int) -> Tensor:
    """[batch, time]: which steps a sample has."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)


def masked(y: Sequence[Tensor], live: Tensor) -> list[Tensor]:
    """y [batch, time, ...] with zeros past each length."""
    return [v.masked_fill(~live.reshape(*live.shape, *[1] * (v.dim() - 2)), 0) for v in y]


def prolonged(x: Sequence[Tensor], lengths: Tensor, live: Tensor) -> list[Tensor]:
    """x [batch, time, ...] with each sample's last step past its length, where anything may lie: a number that the cell is known to take.

    A sample without a step has that of the longest; zeros, where none has any.
    """
    longest = lengths.sort(descending=True).indices[:1]
    rows = torch.where(lengths > 0, torch.arange(lengths.shape[0], device=live.device), longest)
    at = torch.minimum(torch.arange(live.shape[1], device=live.device), (lengths[rows] - 1).clamp_min(0).unsqueeze(1))
    rows, some = rows.unsqueeze(1), (lengths > 0).any().expand_as(live)
    filled = masked([v.detach()[rows, at] for v in x], some)
    return [torch.where(live.reshape(*live.shape, *[1] * (v.dim() - 2)), v, f) for v, f in zip(x, filled, strict=True)]


def last_of(states: Sequence[Tensor], start: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
    """The state after each sample's last step; the one to start from where it has none."""
    rows, at = torch.arange(lengths.shape[0], device=lengths.device), (lengths - 1).clamp_min(0)
    none = lengths == 0
    return [torch.where(none.reshape(-1, *[1] * (s.dim() - 1)), s.to(y.dtype), y[rows, at]) for y, s in zip(states, start, strict=True)]


def given_to(variant: Variant, x: Sequence[Tensor], start: Sequence[Tensor], reset: Tensor | None) -> list[Tensor]:
    """The leaves of x that a variant is given."""
    if not variant.resets or reset is None:
        return list(x)
    return [*x, reset, *(s.unsqueeze(1).expand(-1, x[0].shape[1], *s.shape[1:]) for s in start)]


def bounded(states: Sequence[Tensor]) -> bool:
    """Whether the last states are finite numbers, as far as that can be seen."""
    if watched() or any(empty(bare(s)[0]) for s in states):
        return True
    return all(bool(torch.isfinite(bare(s[:, -1:])[0]).all()) for s in states)
