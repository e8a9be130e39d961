"""The least time a run can take: what is counted, what is measured, and that nothing is told to be faster."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import seqparc
from seqparc import store
from seqparc.codegen import floor as about
from seqparc.codegen.floor import Rates, Work, floor, rates, work
from seqparc.runtime.engine import Engine


def program(cell: nn.Module, x: torch.Tensor, direction: str = "forward") -> tuple[seqparc.CompiledRNN, object]:
    rnn = seqparc.compile(cell)
    rnn(x)[0].sum().backward()
    engine = rnn.engine()
    assert isinstance(engine, Engine)
    return rnn, engine.kernels[direction][1].program  # type: ignore[attr-defined]


def test_what_a_step_needs_is_counted() -> None:
    _, p = program(nn.GRUCell(8, 32), torch.randn(1, 64, 8))
    found = work(p)  # type: ignore[arg-type]
    assert found.function == 96 and found.numbers == 8 + 32
    assert 96 * 40 < found.multiply < 96 * 40 + 32 * 10  # the products, and half of what little is done beside them


def test_rates_are_the_best_that_were_seen(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Rates(1e9, 1e8, 1e9, 2e-6), Rates(2e9, 3e8, 1.5e9, 1e-6)
    for seen, kept in ((slow, slow), (fast, fast), (replace(slow, bytes=9e9), replace(fast, bytes=9e9))):
        monkeypatch.setattr(about, "_measured", lambda dtype, threads, seen=seen: seen)
        rates.cache_clear()
        assert rates(torch.float32, 3) == kept
    assert any(f.name.startswith("rates-") for f in store.folder().iterdir())
    rates.cache_clear()


def test_this_processor_has_rates() -> None:
    single, double = rates(torch.float32, 1), rates(torch.float64, 1)
    assert all(value > 0 for r in (single, double) for value in asdict(r).values())
    assert 1e8 < single.multiply < 1e12 and 1e7 < single.function < single.multiply and 1e8 < single.bytes < 1e12
    assert single.multiply > double.multiply and single.function > double.function


def test_the_floor_is_the_larger_of_arithmetic_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rates(multiply=1e9, function=1e8, bytes=1e9, start=1e-6)
    monkeypatch.setattr(about, "rates", lambda dtype, threads: rate)
    for need, seconds, unit in (
        (Work(100, 1, 1), 10 * (1e-7 + 1e-8), "multiply-adds"), (Work(10, 20, 1), 10 * (1e-8 + 2e-7), "functions"),
        (Work(10, 1, 100), 10 * 4e-7, "memory"),
    ):  # fmt: skip
        monkeypatch.setattr(about, "work", lambda program, need=need: need)
        found = floor(None, torch.float32, 2, 5, 1)  # type: ignore[arg-type]
        assert found.seconds == pytest.approx(seconds) and found.unit == unit


def test_it_is_told_and_no_run_is_faster() -> None:
    rnn, p = program(nn.GRUCell(4, 16), x := torch.randn(4, 4096, 4))
    rnn(x)[0].sum().backward()
    text = str(rnn.explain())
    assert text.count("times the least that this processor") == 2 and "mostly" in text
    s = rnn.stats
    assert (s.batch, s.steps) == (4, 4096) and s.seconds is not None and s.backward is not None and s.backward.seconds is not None
    assert s.seconds > floor(p, torch.float32, 4, 4096, torch.get_num_threads()).seconds  # type: ignore[arg-type]
