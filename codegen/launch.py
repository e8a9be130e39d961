"""A compiled C kernel as a `Kernel` of the driver: packs arguments, runs without the interpreter lock."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqparc.codegen import openmp
from seqparc.codegen.build import load
from seqparc.codegen.c import CSource, emit
from seqparc.ir import Program
from seqparc.spans import LATELY, Spans

#: A number as the kernel is given it, among addresses and sizes.
_NUMBER, _BITS = struct.Struct("d"), struct.Struct("q")


class CKernel:
    """Runs a lane program over chunks of time on the CPU.

    Raises `ToolchainError` if there is no compiler, `TooIrregularError` if the program does not fit the skeleton.
    """

    chunk_per_warmup = 4

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.program, self.dtype = program, dtype
        self.compiled: CSource = emit(program, dtype is torch.float64)
        library = load(self.compiled.text, self.compiled.parts)
        openmp.runs_on(library)
        self._run, self._gap, self._scan = library.seqparc_run, library.seqparc_gap, library.seqparc_scan
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes, self._run.restype = [pointer], None
        sizes: list[Any] = [number, number, ctypes.c_double, ctypes.c_double]
        self._gap.argtypes, self._gap.restype = [pointer, pointer, pointer, *sizes, pointer], ctypes.c_double
        self._scan.argtypes, self._scan.restype = [pointer, pointer, number, number, number, number], None
        self.vector = int(library.seqparc_width())
        self.tile = int(library.seqparc_tile())
        # Of every packed weight the parameter, where its elements lie in that, and which are none, if any.
        self._packs: list[tuple[int, Tensor, Tensor | None]] = []
        for p in self.compiled.packed:
            index = torch.from_numpy(p.index.array.reshape(-1).astype(np.int64))
            self._packs.append((p.slot, index.clamp_min(0), index < 0 if bool((index < 0).any()) else None))

    @property
    def source(self) -> str:
        return self.compiled.text

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        tile, lanes = self.vector * self.tile, self.program.lanes
        if self.compiled.scalar:
            return -(-threads * tile // (batch * lanes))
        return -(-tile * -(-threads // lanes) // batch)  # a tile of a vector program holds one of its lanes

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `seqparc.runtime.driver.Kernel`."""
        given = [p if p.is_contiguous() else p.contiguous() for p in params]
        for slot, index, holes in self._packs:
            weight = given[slot].view(-1).index_select(0, index)
            given.append(weight if holes is None else weight.masked_fill_(holes, 0))
        return given, [x if x.dtype == self.dtype else x.to(self.dtype) for x in streams]

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
        if not start.is_contiguous():
            start = start.contiguous()
        apart = batch * row if start.dim() == 3 else 0
        end = start.new_empty((chunks, batch, row))
        args: list[int] = [
            chunks, batch, openmp.threads(), *spans.addresses, start.data_ptr(), 0 if reached is None else reached.data_ptr(),
            end.data_ptr(), 0 if sizes is None else sizes.data_ptr(), row, apart, *_BITS.unpack(_NUMBER.pack(fade)),
        ]  # fmt: skip

        def time(x: Tensor) -> tuple[int, int, int]:
            """Address and strides; backwards in time is the last step's address and a negative stride."""
            if not backwards:
                return x.data_ptr(), x.stride(0), x.stride(1)
            return x.data_ptr() + (x.shape[1] - 1) * x.stride(1) * x.element_size(), x.stride(0), -x.stride(1)

        for x in streams:
            args += time(x)
        args += [p.data_ptr() for p in params]
        for y in emits:
            args += (0, 0, 0) if y is None else time(y)
        args += [0 if z is None else z.data_ptr() for z in sums]
        packed = array("q", args)
        self._run(packed.buffer_info()[0])
        return end

    def scan(self, a: Tensor, r: Tensor, largest: bool = False) -> Tensor:
        """See `seqparc.runtime.driver.Kernel`."""
        a, d = a.contiguous(), r.clone(memory_format=torch.contiguous_format)
        count, n = r.shape[0], r.shape[-1]
        self._scan(a.data_ptr(), d.data_ptr(), count, d[0].numel() // n, n, largest)
        return d

    def gap(self, start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
        """See `seqparc.runtime.driver.Kernel`."""
        chunks, batch, row = start.shape
        worst = torch.empty(chunks - 1, dtype=torch.float64)
        largest = self._gap(
            start.data_ptr(), end.data_ptr(), sizes.data_ptr(), chunks, batch * row, atol, rtol, worst.data_ptr()
        )  # fmt: skip
        return largest, worst
