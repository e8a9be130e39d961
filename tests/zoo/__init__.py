"""Recurrent cells of public packages, as they are: one row each, and what they have in common to be called.

`make zoo` installs the packages. `tests/test_zoo.py` compares every row with its plain loop; `python -m tests.zoo` writes docs/zoo.md.
"""

from __future__ import annotations

from . import parallel, recurrent, spiking, xlstm
from .rows import Row

ROWS: dict[str, Row] = {row.title: row for row in (*recurrent.ROWS, *xlstm.ROWS, *parallel.ROWS, *spiking.ROWS)}
