"""Kernels for few lanes, whose numbers lie side by side in vectors, against torch's operations; and which runs they are for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.codegen import launch, rows
from seqparc.codegen.launch import CKernel
from seqparc.codegen.schedule import TooIrregularError
from seqparc.codegen.source import CSource, emit
from seqparc.ir import Program
from seqparc.runtime.interpreter import TorchKernel
from seqparc.spans import Spans

from .cells import CELLS, BlockGRU
from .test_kinds import KINDS

pytestmark = pytest.mark.usefixtures("quick")

#: (chunks, batch, threads): one to four lanes run together, with and without some left over.
RUNS = ((1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 2, 1), (5, 1, 2), (3, 3, 3))
STEPS = 70  # past the 64 after which sums are put by
FACTOR, UNITS = 4, 16  # times torch's own error in float32, which counts as at least so many rounding units


class Wide(nn.Module):
    """What few cells have: rows that are no multiple of a vector, products of states, folds along and across, elements from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 21
        self.w, self.v = nn.Parameter(torch.randn(21, 21) / 5), nn.Parameter(torch.randn(3, 7))
        self.register_buffer("order", torch.randperm(21, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a = (h @ self.w).unflatten(1, (3, 7))
        b = torch.softmax(a @ a.transpose(1, 2), 2)  # [batch, 3, 3]
        c = (b @ (a * self.v) + a.amax(1, keepdim=True) - a.amin(2, keepdim=True)).flatten(1)
        d = torch.bmm(h.unsqueeze(1), x.unsqueeze(2)).flatten(1) + h[:, ::2].sum(1, keepdim=True)
        h = torch.tanh(c[:, self.order] / 4 + x * h.flip(1) + d / 9)
        return torch.cat((h[:, 1::2], a.square().sum(2)), 1), h


class Grouped(nn.Module):
    """Products of ten groups, each of which reads numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 40
        self.w = nn.Parameter(torch.randn(10, 4, 4) / 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bgi,gij->bgj", h.unflatten(1, (10, 4)), self.w).flatten(1).roll(1, 1) + x)


class Interleaved(nn.Module):
    """Heads whose numbers take turns: those of one lie apart."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 33
        self.w = nn.Parameter(torch.randn(3, 11, 11) / 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        a = torch.einsum("bih,hij->bjh", h.unflatten(1, (11, 3)), self.w)
        return torch.tanh(a.flatten(1) + x)


OWN: dict[str, Callable[[], nn.Module]] = {"wide": Wide, "grouped": Grouped, "interleaved": Interleaved, "heads": lambda: BlockGRU(3, 11)}
VECTOR = (
    "GRU", "LSTM", "RNN tanh", "layer norm GRU", "LEM", "peephole LSTM", "two levels", "convolutions",
    "strided and transposed convolutions", "a sequence layer for one step", *OWN,
)  # fmt: skip


@functools.cache
def programs(name: str) -> dict[str, Program]:
    """Forward and backward."""
    torch.manual_seed(0)
    if name in OWN:
        cell = OWN[name]()
        x = torch.zeros(1, 2, cell.hidden_size * (3 if name == "heads" else 1))
    elif name in KINDS:
        cell, x = KINDS[name].make(), torch.zeros(1, 2, *KINDS[name].x)
    else:
        cell, x = CELLS[name].make(), torch.zeros(1, 2, CELLS[name].inputs)
    engine: Any = seqparc.compile(cell.double()).engine(x.double())
    return {"forward": engine.plan.program, "backward": engine.plan.adjoint().program}


def programs_of(cell: nn.Module) -> Program:
    engine: Any = seqparc.compile(cell).engine(torch.zeros(1, 2, 8))
    return engine.plan.program  # type: ignore[no-any-return]


def emitted(program: Program) -> CSource:
    return emit(program, double=True)


@functools.cache
def kernels(name: str, direction: str, dtype: torch.dtype) -> tuple[CKernel, TorchKernel]:
    program = programs(name)[direction]
    return CKernel(program, dtype), TorchKernel(program, torch.float64, torch.device("cpu"))


def swept(kernel: Any, dtype: torch.dtype, chunks: int, batch: int, led: bool) -> list[Tensor]:
    """Everything that a sweep gives: end states, those reached by the warm-up, sizes, emits and sums."""
    program, made = kernel.program, torch.Generator().manual_seed(chunks)

    def some(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=made) / 2 - 0.25).to(dtype)  # numbers that float32 holds exactly

    edges = np.sort(np.random.default_rng(chunks).permutation(STEPS - 1)[: chunks - 1] + 1)
    t0 = np.concatenate([[0], edges]).astype(np.int64)
    length = np.diff(np.append(t0, STEPS)) - np.arange(chunks) % 2  # some end before the next begins
    lead = np.minimum(t0, 5 + 7 * np.arange(chunks)) if led else None
    start, nothing = some(chunks, batch, sum(program.state_sizes)), torch.zeros(chunks, batch, sum(program.state_sizes), dtype=dtype)
    reached, sizes = (nothing.clone() if led else None), nothing.clone()
    written = {s.slot for s in program.emits}
    emits = [torch.zeros(batch, STEPS, n, dtype=dtype) if i in written else None for i, n in enumerate(program.emit_sizes)]
    sums = [torch.zeros(chunks, batch, n, dtype=torch.float64) for n in program.sum_sizes]
    streams, params = [some(batch, STEPS, n) for n in program.stream_sizes], [some(n) for n in program.param_sizes]
    given = kernel.prepare(params, streams)
    end = kernel.sweep(Spans(t0, length, lead), start, given[1], given[0], emits, sums, False, reached, sizes, 0.9)
    return [end, sizes, *(t for t in (reached, *emits, *sums) if t is not None)]


CASES = [(n, d) for n in VECTOR for d in ("forward", "backward")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_few_lanes_are_torchs(name: str, direction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, right = kernels(name, direction, dtype)
    plain = TorchKernel(mine.program, dtype, torch.device("cpu"))
    monkeypatch.setattr(mine, "few", lambda lanes: True)
    for chunks, batch, threads in RUNS:
        torch.set_num_threads(threads)
        for led in (False, True)[: 1 + (chunks > 1)]:
            found, truth = swept(mine, dtype, chunks, batch, led), swept(right, torch.float64, chunks, batch, led)
            own = [t.double() for t in swept(plain, dtype, chunks, batch, led)]
            found[1:2], truth[1:2], own[1:2] = ([], [], []) if led else (found[1:2], truth[1:2], own[1:2])  # sizes begin anew there
            for a, b, c in zip(found, truth, own, strict=True):
                most = max(float((c - b).abs().max()), UNITS * torch.finfo(dtype).eps * float(b.abs().max()))
                assert float((a.double() - b).abs().max()) <= FACTOR * most, (chunks, batch, threads, led)


def test_lanes_do_not_depend_on_those_beside_them() -> None:
    """To the bit, so that nothing depends on how many threads share lanes out."""
    mine, _ = kernels("GRU", "backward", torch.float32)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(swept(mine, torch.float32, 4, 1, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_where_threads_may_not_matter_lanes_are_grouped_for_a_fixed_number() -> None:
    program = programs("GRU")["forward"]
    assert "team = args[2]," in emit(program, double=True).text and "team = 8," in emit(program, double=True, team=8).text
    assert "team = 8," in CKernel(program, torch.float32, threads=8).source


def test_few_lanes_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = kernels("GRU", "backward", torch.float64)
    torch.set_num_threads(1)
    few = swept(mine, torch.float64, 5, 1, True)
    monkeypatch.setattr(mine, "few", lambda lanes: False)
    for a, b in zip(few, swept(mine, torch.float64, 5, 1, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("registers", [16, 32])
def test_tiles_for_every_number_of_registers(registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "registers", lambda: registers)
    monkeypatch.setattr(CKernel, "few", lambda self, lanes: False)
    for name in ("LSTM", "two levels"):
        program, right = programs(name)["backward"], kernels(name, "backward", torch.float64)[1]
        found, truth = (swept(k, torch.float64, 20, 2, False) for k in (CKernel(program, torch.float64), right))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_few_is_what_does_not_fill_the_tiles_of_every_thread() -> None:
    kernel, _ = kernels("GRU", "forward", torch.float32)
    tile = 2 * kernel.vector
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert all(kernel.few(n) for n in (1, threads, threads * (tile - 1), threads * tile + 1)) and not kernel.few(threads * tile)
    fixed = CKernel(kernel.program, torch.float32, threads=8)
    assert fixed.few(8 * (tile - 1)) and not fixed.few(8 * tile)
    heads, _ = kernels("heads", "forward", torch.float32)
    torch.set_num_threads(1)
    assert heads.few(tile - 1) and not heads.few(tile), "every head has tiles of its own"


def test_where_weights_are_many_tiles_are_taken_sooner() -> None:
    wide = CKernel(programs_of(nn.GRUCell(8, 128)), torch.float32)
    torch.set_num_threads(1)
    assert wide.few(wide.vector) and not wide.few(3 * wide.vector // 2)
    assert wide.chunks_wanted(1, 2) == 4 * wide.vector and kernels("GRU", "forward", torch.float32)[0].chunks_wanted(1, 2) == 8


def test_a_step_of_more_lanes_takes_longer_and_each_of_them_less() -> None:
    for kernel in (kernels("GRU", "forward", torch.float32)[0], kernels("heads", "backward", torch.float32)[0]):
        for threads in (1, 2, 4):
            paces = [kernel.pace(1 << k, 1, threads) for k in range(8)]
            assert paces[0] == 1 and all(a <= b <= 2 * a for a, b in itertools.pairwise(paces))
            assert kernel.pace(3, 4, threads) == pytest.approx(kernel.pace(12, 1, threads) / kernel.pace(4, 1, threads))


def test_every_vector_program_of_the_cells_has_such_a_kernel() -> None:
    found = {n for n in CELLS for p in programs(n).values() if not emitted(p).scalar}
    assert found <= set(VECTOR)
    assert all(emitted(p).few is not None for n in VECTOR for p in programs(n).values())


def test_every_way_to_print_is_among_them() -> None:
    texts = [emitted(p).text for n in VECTOR for p in programs(n).values()]
    for word in ("product(U", "product_apart(w", "= fold_row(", "= dot_rows(", "put_apart(", "pick(", "sp_max(acc", "sp_load(q", "+ g *"):
        assert any(word in text[text.index("INLINE void few") :] for text in texts), word


def test_what_is_refused_has_tiles_of_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tile: Any) -> Any:
        raise TooIrregularError("not wanted")

    program, right = programs("GRU")["forward"], kernels("GRU", "forward", torch.float64)[1]
    monkeypatch.setattr(rows, "emit", refused)
    kernel = CKernel(program, torch.float64)
    assert kernel.compiled.few is None and "seqparc_tiles_1" in kernel.source and not kernel.few(1)
    for a, b in zip(swept(kernel, torch.float64, 3, 1, True), swept(right, torch.float64, 3, 1, True), strict=True):
        torch.testing.assert_close(a, b)
