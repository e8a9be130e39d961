"""What a row of the zoo is: a public cell as its package has it, and what it takes to call it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Where `make zoo` puts the packages. Behind everything else on the path: some bring folders of general names.
FOLDER = Path(__file__).parents[2] / ".venv" / "zoo"
if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

Shape = tuple[int, ...]
#: The sizes that most rows have.
X, H = (5,), (8,)


@dataclass(frozen=True)
class Row:
    """One public cell.

    make       the cell, unmodified: a module, a method of one, or a function
    x, state   shapes of one sample; several of x are a tuple of inputs, several of the state a tuple of states
    structure  of the state Jacobian, as seqparc proves it, in the words of `compare.words`
    call       (cell, x, state) -> (out, state), where the cell itself is not called as x, state; of three lines at most
    pack       makes the package's own state from its tensors
    given      changes the normal random numbers that x is made of, where they would be no input
    writes     whether the cell writes into its input
    refused    what the error says, where a cell cannot be run in parallel
    missing    why the package does not give the cell
    """

    package: str
    name: str
    make: Callable[[], Any]
    x: tuple[Shape, ...]
    state: tuple[Shape, ...]
    structure: str = ""
    call: Callable[[Any, Any, Any], Any] | None = None
    pack: Callable[..., Any] | None = None
    given: Callable[..., Any] | None = None
    writes: bool = False
    refused: str = ""
    missing: str = ""

    @property
    def title(self) -> str:
        return f"{self.package} {self.name}"

    def cell(self) -> Any:
        """What seqparc.compile is given: the cell, or its adapter."""
        made = self.make()
        return made if self.call is None else Adapter(made, self.call)

    def example(self, batch: int, steps: int) -> tuple[Any, Any]:
        """x [batch, steps, ...] and a start state [batch, ...]."""
        xs = [torch.randn(batch, steps, *s) for s in self.x]
        states = [0.5 * torch.rand(batch, *s) for s in self.state]
        if self.given is not None:
            xs = [self.given(*xs)] if len(xs) == 1 else list(self.given(*xs))
        return (xs[0] if len(xs) == 1 else tuple(xs)), self.packed(*states)

    def packed(self, *states: Tensor) -> Any:
        """The state as the cell takes it."""
        if self.pack is not None:
            return self.pack(*states)
        return states[0] if len(states) == 1 else states


class Adapter(nn.Module):
    """A cell that is called as x, state."""

    def __init__(self, cell: Any, call: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.cell, self.call = cell, call
        self.__name__ = getattr(cell, "__name__", type(cell).__name__)

    def forward(self, x: Any, state: Any) -> Any:
        return self.call(self.cell, x, state)


class Lazy:
    """A module of a package, imported when something in it is first asked for; the package need not be there before."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def adapter_lines(row: Row) -> int:
    """Lines of a row's adapter, without the one that names it."""
    if row.call is None:
        return 0
    return max(1, len([line for line in inspect.getsource(row.call).splitlines() if line.strip()]) - 1)
