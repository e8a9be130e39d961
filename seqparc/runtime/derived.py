"""Cells made from a cell: ((x leaves, and what else is given), (state leaves)) -> (state leaves) or ((output leaves), (state leaves))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.convention import Convention
from seqparc.draws import Replay
from seqparc.tree import LEAF, Structure


def leaves(count: int) -> Structure:
    """So many tensors in a tuple."""
    return Structure("tuple", children=(LEAF,) * count)


class Derived(nn.Module):
    """What these cells have in common: the cell they are made from, and how they are called."""

    def __init__(self, cell: Any, convention: Convention, n_x: int) -> None:
        super().__init__()
        self.cell, self.convention, self.n_x = cell, convention, n_x
        self.n_out = 0 if convention.out is None else convention.out.count
        #: What is given beside x, and given out beside the outputs.
        self.more_in = self.more_out = 0

    @property
    def signature(self) -> Convention:
        """How this is called."""
        n, m = self.n_x + self.more_in, self.n_out + self.more_out
        state = leaves(self.convention.state.count)
        return Convention(("x", "state"), state, leaves(n), "out, state" if m else "state", leaves(m) if m else None)


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves [...], complex ones as [..., 2]."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


class Paired(Derived):
    """A cell with complex states as one with pairs of real numbers, [..., 2]: kernels, Jacobians and gradients know no others."""

    def __init__(self, cell: Any, convention: Convention, n_x: int, state: Sequence[Tensor]) -> None:
        super().__init__(cell, convention, n_x)
        self.complex = tuple(s.is_complex() for s in state)

    def as_complex(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """State leaves as the cell has them."""
        return [torch.view_as_complex(t.contiguous()) if c else t for t, c in zip(tensors, self.complex, strict=True)]

    def own(self, outputs: Sequence[Tensor], last: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Output and last state leaves as the cell has them."""
        return self.as_complex(outputs) if self.convention.out is None else list(outputs), self.as_complex(last)

    def forward(self, x: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Any:
        out, following = self.convention.call(self.cell, list(x), self.as_complex(state))
        return tuple(as_real(following)) if out is None else (tuple(out), tuple(as_real(following)))


class Redrawn(Derived):
    """A cell that is given the random numbers it would draw, behind x."""

    def __init__(self, cell: Any, convention: Convention, n_x: int, n_draws: int) -> None:
        super().__init__(cell, convention, n_x)
        self.more_in = n_draws

    def forward(self, given: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Any:
        with Replay(given[self.n_x :]):
            out, following = self.convention.call(self.cell, list(given[: self.n_x]), list(state))
        return tuple(following) if out is None else (tuple(out), tuple(following))
