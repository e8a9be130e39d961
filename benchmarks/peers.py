"""Other solvers of recurrences, where they are installed (`make zoo` does that), at cases of their own: their cell, by their layer and by
seqparc.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from cases import Case
from torch import Tensor, nn

#: Where `make zoo` puts packages. Behind everything else on the path: some bring folders of general names.
FOLDER = Path(__file__).parents[1] / ".venv" / "zoo"
if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))


class Stepped(nn.Module):
    """One step of a pararnn-torch cell."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.hidden_size = cell, cell.d_h

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell.step(h, x)  # type: ignore[no-any-return]


class ParaRNN(nn.Module):
    """The same cell in pararnn-torch's own layer."""

    label = "pararnn-torch"

    def __init__(self, stepped: Stepped) -> None:
        super().__init__()
        import pararnn

        self.layer = pararnn.ParaRNN(stepped.cell)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


def cases() -> tuple[Case, ...]:
    """What can be compared here."""
    if importlib.util.find_spec("pararnn") is None:
        return ()
    import pararnn

    def make() -> Stepped:
        return Stepped(pararnn.ParaGRU(256, 256))

    return (
        Case("ParaGRU 256", make, (8, 2048, 256), ParaRNN),
        Case("ParaGRU 256, long", make, (8, 16384, 256), ParaRNN),
    )
