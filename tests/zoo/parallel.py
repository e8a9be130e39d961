"""Cells of packages that run them in parallel themselves: pararnn-torch and mingru-scans. A step is the module's method `step`."""

from __future__ import annotations

from functools import partial
from typing import Any

from .rows import H, Lazy, Row, X

pararnn, mingru = Lazy("pararnn"), Lazy("mingru.min_gru")
Para, Mingru = partial(Row, "pararnn-torch"), partial(Row, "mingru-scans")


def para(name: str, *sizes: int, **options: Any) -> Any:
    return lambda: getattr(pararnn, name)(*(sizes or (5, 8)), **options).step


PARARNN = (
    Para("ParaCfC", para("ParaCfC"), (X,), (H,), "diagonal"),
    Para("ParaGRU", para("ParaGRU"), (X,), (H,), "diagonal"),
    Para("ParaGRU, heads", para("ParaGRU", mix="head", n_heads=2), (X,), (H,), "2 blocks of 4"),
    Para("ParaHopfield", para("ParaHopfield"), (X,), (H,), "dense"),
    Para("ParaNLRU", para("ParaNLRU"), (X,), (H,), "diagonal"),
    Para("ParaTitans", para("ParaTitans"), (X,), (H,), "diagonal"),
    Para("ParaLSTM", para("ParaLSTM"), (X,), ((2, 8),), "8 blocks of 2"),
    Para("ParaSLSTM", para("ParaSLSTM"), (X,), ((4, 8),), "8 blocks of 4"),
    Para("ParaSLSTM, heads", para("ParaSLSTM", mix="head", n_heads=2), (X,), ((4, 8),), "2 blocks of 16"),
    Para("ParaM2RNN", para("ParaM2RNN", 5, k_dim=4, v_dim=3), (X,), ((4, 3),), "4 blocks of 3"),
    Para("ParaRWKV7", para("ParaRWKV7", n_heads=2), (X,), ((2, 4, 4),), "8 blocks of 4"),
)

#: Their steps run without gradients.
MINGRU = (
    Mingru("MinGRU", lambda: mingru.MinGRU(5, 8).step, (X,), (H,), "diagonal"),
    Mingru("SignedMinGRU", lambda: mingru.SignedMinGRU(5, 8).step, (X,), (H,), "diagonal"),
    Mingru("RotationMinGRU", lambda: mingru.RotationMinGRU(5, 8).step, (X,), (H,), "4 blocks of 2"),
    Mingru("GivensMinGRU", lambda: mingru.GivensMinGRU(5, 8, block_size=4).step, (X,), (H,), "2 blocks of 4"),
    Mingru("DeltaMinGRU", lambda: mingru.DeltaMinGRU(5, 8, n_heads=2).step, (X,), ((32,),), "8 blocks of 4"),
)

ROWS = (*PARARNN, *MINGRU)
