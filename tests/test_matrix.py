"""Every cell by every strategy on every backend, forward and all gradients, against the plain loop in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import seqparc

from .cells import CELLS
from .oracle import Runs, errors

#: (batch, steps) in every run; the others at night.
SHAPES = ((1, 1), (3, 1), (1, 2), (3, 2), (1, 3), (3, 3), (1, 31), (3, 31), (1, 33), (3, 33), (1, 1000), (3, 1025))
MORE = ((3, 1000), (1, 1025))
#: What the torch backend, which interprets, is run on as well.
SHORT = tuple(s for s in SHAPES if s[1] < 100)
#: float64: relative. float32: times the plain loop's own error, which counts as at least this many rounding units.
DOUBLE, FACTOR, UNITS = 1e-10, 4, 1


@functools.cache
def cell(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same weights in every precision."""
    torch.manual_seed(sum(map(ord, name)))
    return CELLS[name].make().to(dtype)


@functools.cache
def reference(name: str, batch: int, steps: int) -> tuple[Runs, dict[str, Tensor], dict[str, float]]:
    """The run, the truth, and the errors of the plain loop in float32."""
    runs = Runs(cell(name, torch.float32), CELLS[name].inputs, batch, steps)
    truth = runs.truth()
    return runs, truth, errors(runs.run(runs.plain, torch.float32), truth)


@functools.cache
def compiled(name: str, dtype: torch.dtype, backend: str, strategy: str) -> seqparc.CompiledRNN:
    chunks = 4 if strategy == "shooting" else None
    return seqparc.compile(cell(name, dtype), backend=backend, options={"strategy": strategy, "chunks": chunks})  # type: ignore[no-any-return]


def check(name: str, dtype: torch.dtype, backend: str, strategy: str, batch: int, steps: int) -> None:
    runs, truth, own = reference(name, batch, steps)
    rnn = compiled(name, dtype, backend, strategy)
    found = errors(runs.run(runs.compiled(rnn), dtype, cell=rnn.cell), truth)
    if dtype is torch.float64:
        worst = {n: e for n, e in found.items() if not e < DOUBLE}
    else:
        # Values and gradients of one run share their scale of error: the loop may have been lucky in one of them.
        least = max(max(own.values()), UNITS * torch.finfo(dtype).eps)
        worst = {n: (e, own[n]) for n, e in found.items() if not e <= FACTOR * max(own[n], least)}
    assert not worst, (batch, steps, worst)
    assert rnn.stats.backend == backend and rnn.stats.backward is not None and rnn.stats.backward.backend == backend
    assert len(rnn._engines) == 1, "batch and length must not be compiled in"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
STRATEGIES = pytest.mark.parametrize("strategy", ["sequential", "shooting", "newton"])


@STRATEGIES
@DTYPES
@pytest.mark.parametrize("name", CELLS)
def test_c_backend(name: str, dtype: torch.dtype, strategy: str, request: pytest.FixtureRequest) -> None:
    if dtype is torch.float64 or strategy == "newton":  # most of the text is that of the others, which are compiled as for users
        request.getfixturevalue("quick")
    for batch, steps in SHAPES:
        check(name, dtype, "c", strategy, batch, steps)


@STRATEGIES
@DTYPES
@pytest.mark.parametrize("name", CELLS)
def test_torch_backend(name: str, dtype: torch.dtype, strategy: str) -> None:
    for batch, steps in SHORT:
        check(name, dtype, "torch", strategy, batch, steps)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["c", "torch"])
@STRATEGIES
@DTYPES
@pytest.mark.parametrize("name", CELLS)
def test_more_shapes(name: str, dtype: torch.dtype, strategy: str, backend: str) -> None:
    for batch, steps in MORE if backend == "c" else (*MORE, *(s for s in SHAPES if s not in SHORT)):
        check(name, dtype, backend, strategy, batch, steps)


@pytest.mark.parametrize("name", CELLS)
def test_structure_is_proved(name: str) -> None:
    rnn = compiled(name, torch.float64, "torch", "sequential")
    engine = rnn.engine(torch.zeros(1, 2, CELLS[name].inputs, dtype=torch.float64))
    assert not isinstance(engine, str) and engine is not None
    assert engine.plan.structure.kind == CELLS[name].kind
