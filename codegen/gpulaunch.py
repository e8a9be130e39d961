"""A generated Triton kernel as a `Kernel` of the driver. Runs on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqparc.codegen.device import RESIDENT, check, load, multiprocessors, on_chip, on_device
from seqparc.codegen.launcher import Launcher
from seqparc.codegen.schedule import TooIrregularError
from seqparc.codegen.sweep import TritonSource, emit
from seqparc.codegen.tiles import Weight, padded
from seqparc.ir import Program
from seqparc.plan import Setting
from seqparc.spans import LATELY, Spans

#: Lanes per program of a scalar kernel.
LANES = 128
#: Lanes per program of a vector kernel, and elements of a tile per thread. More of either and the weights' share of the registers spills.
ROWS, EACH = 4, 1
#: Bytes of shared memory for all that is not weights.
SPARE = 8192

class TritonKernel:
    """Runs a lane program over chunks of time on a GPU.

    Raises `ToolchainError` if there is no Triton, `TooIrregularError` if the program does not fit tiles.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device, precision: str = "ieee") -> None:
        check(device)
        self.program, self.dtype, self.device = program, dtype, device
        self.compiled: TritonSource = emit(program, dtype is torch.float64, precision)
        must_fit(self.compiled, dtype is torch.float64, on_chip(device))
        module = load(self.compiled.text)
        self._run = Launcher(module.sweep)
        self._tables = [on_device(t.array, device, torch.int32) for t in self.compiled.tables]
        self._weights = [_layout(w, device) for w in self.compiled.weights]
        self.settings = settings(self.compiled)
        self.setting = self.settings[0]

    @property
    def block(self) -> int:
        """Lanes of a program."""
        return self.setting.block

    @property
    def chunk_per_warmup(self) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        return self.setting.chunk_per_warmup

    @functools.cached_property
    def identity(self) -> str:
        """What decides how fast a setting is."""
        import triton

        card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "interpreter"
        return f"{triton.__version__} {card} {self.compiled.text}"

    @property
    def source(self) -> str:
        return self.compiled.text

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        lanes = self.program.lanes
        if self.compiled.scalar:
            return -(-multiprocessors(self.device) * RESIDENT // (batch * lanes))
        return -(-self.block * -(-multiprocessors(self.device) // lanes) // batch)

    def pace(self, chunks: int, batch: int, threads: int) -> float:
        """See `seqparc.runtime.driver.Kernel`."""
        return max(1.0, chunks / self.chunks_wanted(batch, threads))

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `seqparc.runtime.driver.Kernel`. Weights become tiles; streams of 16 bits are read as they are."""
        given = [p if p.is_contiguous() else p.contiguous() for p in params]
        for w, (index, holes) in zip(self.compiled.weights, self._weights, strict=True):
            weight = given[w.slot].view(-1).index_select(0, index)
            given.append(weight if holes is None else weight.masked_fill_(holes, 0))
        return given, list(streams)

    def sweep(
        self,
        spans: Spans,
        start: Tensor,
        streams: Sequence[Tensor],
        params: Sequence[Tensor],
        emits: Sequence[Tensor | None],
        sums: Sequence[Tensor | None],
        backwards: bool = False,
        reached: Tensor | None = None,
        sizes: Tensor | None = None,
        fade: float = LATELY,
    ) -> Tensor:
        """Run chunks from their start states; see `seqparc.runtime.driver.Kernel`."""
        chunks, (batch, row) = len(spans), start.shape[-2:]
        end = start.new_empty((chunks, batch, row))
        self._launch(spans, start, streams, params, emits, sums, backwards, end, reached, sizes, fade=fade)
        return end

    def _launch(
        self, spans: Spans, start: Tensor, streams: Sequence[Tensor], params: Sequence[Tensor], emits: Sequence[Tensor | None],
        sums: Sequence[Tensor | None], backwards: bool, end: Tensor, reached: Tensor | None, sizes: Tensor | None,
        marks: Tensor | None = None, at: int = 0, finish: bool = False, fade: float = LATELY,
    ) -> None:  # fmt: skip
        """All chunks; or those of samples that `marks` from `at` on say moved; or, to finish, what is left of each sample at one go."""
        setting = self.setting  # which another thread may change meanwhile
        chunks, (batch, row) = len(spans), start.shape[-2:]
        if not start.is_contiguous():
            start = start.contiguous()
        apart = batch * row if start.dim() == 3 else 0
        bounds = spans.on(start.device)
        led = reached is not None and spans.lead is not None
        args: list[Any] = [
            bounds[0], bounds[1], bounds[2] if led else None, start, apart, reached if led else None, end, sizes,
            1 if finish else chunks, batch, row, marks, at, chunks, spans.steps, fade,
        ]  # fmt: skip

        def time(x: Tensor) -> tuple[Tensor, int, int]:
            """The tensor and its strides; backwards in time is the last step's place and a negative stride."""
            return (x[:, -1:], x.stride(0), -x.stride(1)) if backwards else (x, x.stride(0), x.stride(1))

        for x in streams:
            args += time(x)
        args += params
        for y in emits:
            args += (None, 0, 0) if y is None else time(y)
        args += [*sums, *self._tables]
        lanes = batch if finish else chunks * batch
        block, each = setting.block, self.program.lanes
        programs = -(-lanes * each // block) if self.compiled.scalar else -(-lanes // block) * each
        self._run(programs, args, {"LEAD": led, "SIZES": sizes is not None, "FINISH": finish, "BLOCK": block}, setting.warps)

    def alone(
        self, spans: Spans, start: Tensor, streams: Sequence[Tensor], params: Sequence[Tensor], emits: Sequence[Tensor | None],
        sums: Sequence[Tensor | None], backwards: bool, passes: int, atol: float, rtol: float, fade: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Passes and the end of them with nobody watching: the card itself marks what has to run again, and finishes what does not settle.

        Returns the last state [batch, row]; after each pass the largest gap in units of the tolerance; and the marks [passes, 1 + chunks,
        batch], whose last [-1, 0] is how many chunks of each sample had to be finished in one stretch.
        """
        from seqparc.codegen.gpugap import measure

        chunks, (batch, row) = len(spans), start.shape
        begun, end, sizes = start.new_empty((3, chunks, batch, row)).unbind()
        if spans.lead is None:
            begun.copy_(start)
        worst = torch.zeros(passes, dtype=torch.float64, device=start.device)
        marks = torch.zeros((passes, chunks + 1, batch), dtype=torch.int32, device=start.device)
        each = (chunks + 1) * batch
        given = (streams, params, emits, sums, backwards, end)
        self._launch(spans, start if spans.lead is not None else begun, *given, begun if spans.lead is not None else None, sizes, fade=fade)
        for k in range(passes):
            measure(begun, end, sizes, atol, rtol, worst, marks, k * each)
            if k + 1 < passes:
                self._launch(spans, begun, *given, None, sizes, marks, k * each, fade=fade)
        self._launch(spans, begun, *given, None, None, marks, (passes - 1) * each, finish=True)
        return end.select(0, -1), worst, marks

    def scan(self, a: Tensor, r: Tensor, largest: bool = False) -> Tensor:
        """See `seqparc.runtime.driver.Kernel`."""
        from seqparc.codegen.gpuscan import scan

        return scan(a, r, largest)

    def gap(self, start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
        """See `seqparc.runtime.driver.Kernel`."""
        from seqparc.codegen.gpugap import gap

        return gap(start, end, sizes, atol, rtol)


def must_fit(source: TritonSource, double: bool, most: int) -> None:
    """Raises TooIrregularError if the weights that a kernel keeps need more than `most` bytes of shared memory less what the rest needs."""
    held = sum(w.bytes for w in source.step.weights.values() if w.product == "dot") * (2 if double else 1)
    if held > most - SPARE:
        raise TooIrregularError(f"its weights, {held // 1024} KB, do not fit on the chip, which holds {most // 1024} KB a block")


def tile_of(source: TritonSource) -> tuple[int, int]:
    """(lanes, warps) of a program of a kernel."""
    if source.scalar:
        return LANES, 4
    widest = max((padded(hi - lo) for _, lo, hi in source.step.state_tiles()), default=1)
    return ROWS, max(1, min(16, ROWS * widest // (32 * EACH)))


def settings(source: TritonSource) -> tuple[Setting, ...]:
    """What a kernel may be launched with; the first where nothing better is known."""
    block, warps = tile_of(source)
    if source.scalar:
        tiles = [(block, warps), (block // 2, warps // 2), (block * 2, warps * 2)]
    else:  # a thread with one element; twice as many lanes; a thread with two
        tiles = [(block, warps), (block * 2, min(16, warps * 2)), (block, max(1, warps // 2))]
    return tuple(Setting(*tile, per) for per in (2, 1, 4) for tile in dict.fromkeys(tiles))


def _layout(w: Weight, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where the elements of a weight's tile, padded, lie in the parameter; and which are zero."""
    index = w.index.array
    wide = np.full((index.shape[0], *(padded(n) for n in index.shape[1:])), -1, np.int64)
    wide[:, : index.shape[1], : index.shape[2]] = index
    flat = torch.from_numpy(wide.reshape(-1)).to(device)
    return flat.clamp_min(0), (flat < 0) if bool((wide < 0).any()) else None
