"""Complex states as pairs of real numbers, [..., 2]: kernels, Jacobians and gradients know real states only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.convention import Convention
from seqparc.tree import LEAF, Structure


def as_real(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Leaves [...], complex ones as [..., 2]."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]


class Paired(nn.Module):
    """A cell whose state is real where the cell's own is complex: ((x leaves), (state leaves)) -> ((output leaves), (state leaves))."""

    def __init__(self, cell: Any, convention: Convention, n_x: int, state: Sequence[Tensor]) -> None:
        super().__init__()
        self.cell, self.convention, self.n_x = cell, convention, n_x
        self.complex = tuple(s.is_complex() for s in state)

    def as_complex(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """State leaves as the cell has them."""
        return [torch.view_as_complex(t.contiguous()) if c else t for t, c in zip(leaves, self.complex, strict=True)]

    def own(self, outputs: Sequence[Tensor], last: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Output and last state leaves as the cell has them."""
        return self.as_complex(outputs) if self.convention.out is None else list(outputs), self.as_complex(last)

    @property
    def signature(self) -> Convention:
        """How this is called."""

        def leaves(count: int) -> Structure:
            return Structure("tuple", children=(LEAF,) * count)

        out = self.convention.out
        returns = "state" if out is None else "out, state"
        own = None if out is None else leaves(out.count)
        return Convention(("x", "state"), leaves(len(self.complex)), leaves(self.n_x), returns, own)

    def forward(self, x: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Any:
        out, following = self.convention.call(self.cell, list(x), self.as_complex(state))
        return tuple(as_real(following)) if out is None else (tuple(out), tuple(as_real(following)))
