"""A compiled C kernel as a `Kernel` of the driver: packs arguments, runs without the interpreter lock."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqparc.codegen import openmp
from seqparc.codegen.build import SYMBOLS, load, registers
from seqparc.codegen.packing import Packing
from seqparc.codegen.source import CSource, emit
from seqparc.ir import Program
from seqparc.kept import Prepared
from seqparc.spans import LATELY, Spans

#: Where arguments of a kernel are; the streams' begin at FIRST.
THREADS, START, REACHED, END, SIZES, FIRST = 2, 6, 7, 8, 9, 13
#: Few lanes that a thread runs together.
TOGETHER = 4
#: What a step takes, in what one more of few lanes does. Those that run together wait ALONE for chains of operations; a lane of a tile, for
#: all of which weights are read once, takes TILED, and less where weights have at least MANY bytes. A vector more of a scalar program's
#: tile is HIDDEN behind what the one before it waits for, if it is small: tiles by their vectors, in what one of one vector takes.
ALONE, TILED, MANY, HIDDEN = 1.5, {False: 1.375, True: 1.0}, 1 << 17, {1: 1.0, 2: 2.0, 4: 3.2}
#: A number as the kernel is given it, among addresses and sizes.
_NUMBER, _BITS = struct.Struct("d"), struct.Struct("q")


class CKernel:
    """Runs a lane program over chunks of time on the CPU.

    Raises `ToolchainError` if there is no compiler, `TooIrregularError` if the program does not fit the skeleton.
    """

    chunk_per_warmup = 1

    def __init__(self, program: Program, dtype: torch.dtype, threads: int | None = None) -> None:
        """threads: how many the way of running is chosen for, where results may not depend on how many there are."""
        self.program, self.dtype, self.threads = program, dtype, threads
        self.compiled: CSource = emit(program, dtype is torch.float64, registers(), threads)
        ways = {"seqparc_run": self.compiled.packed}
        if self.compiled.few is not None:
            ways["seqparc_run_few"] = self.compiled.few
        library = load(self.compiled.text, self.compiled.parts, tuple(dict.fromkeys((*SYMBOLS, *ways))))
        openmp.runs_on(library)
        self._gap, self._scan = library.seqparc_gap, library.seqparc_scan
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        # The second is for few lanes, if there is one.
        self._ways = [(getattr(library, name), Packing(packed)) for name, packed in ways.items()]
        for run, _ in self._ways:
            run.argtypes, run.restype = [pointer], None
        sizes: list[Any] = [number, number, ctypes.c_double, ctypes.c_double]
        self._gap.argtypes, self._gap.restype = [pointer, pointer, pointer, *sizes, pointer], ctypes.c_double
        self._scan.argtypes, self._scan.restype = [pointer, pointer, number, number, number, number], None
        self.vector = int(library.seqparc_width())
        self.tile = int(library.seqparc_tile())
        self._many = sum(w.index.array.size for w in self.compiled.packed) * dtype.itemsize >= MANY

    @property
    def source(self) -> str:
        return self.compiled.text

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        tile, lanes = self.vector * self.tile, self.program.lanes
        if self.compiled.scalar:
            return -(-threads * tile // (batch * lanes))
        if len(self._ways) > 1 and not self._many:
            return -(-threads * TOGETHER // (batch * lanes))
        return -(-tile * -(-threads // lanes) // batch)  # a tile of a vector program holds one of its lanes

    def pace(self, chunks: int, batch: int, threads: int) -> float:
        """See `seqparc.runtime.driver.Kernel`."""

        def step(lanes: int) -> float:
            return self._beside(lanes, threads) if self._is_few(lanes, threads) else self._tiled(lanes, threads)

        return step(chunks * batch) / step(batch)

    def few(self, lanes: int) -> bool:
        """Whether each lane's numbers are to lie side by side."""
        return self._is_few(lanes, self.threads or openmp.threads())

    def _is_few(self, lanes: int, threads: int) -> bool:
        return len(self._ways) > 1 and self._beside(lanes, threads) < self._tiled(lanes, threads)

    def together(self, lanes: int, threads: int) -> float:
        """How many of so many lanes (chunks × samples) one tile holds; tiles are shared out over the threads evenly and in order."""
        mine, each = self.program.lanes, -(-lanes * self.program.lanes // threads)
        if self._is_few(lanes, threads):
            return lanes / -(-lanes // min(each, TOGETHER))
        vectors = -(-lanes * mine // self.vector)
        width = self.tile if not self.compiled.scalar or vectors >= self.tile * threads else 1
        return self.vector * width / (mine if self.compiled.scalar else 1)

    def _beside(self, lanes: int, threads: int) -> float:
        """What a step of so many lanes takes, each with its numbers side by side."""
        each = -(-lanes * self.program.lanes // threads)
        return ALONE * -(-each // TOGETHER) + each

    def _tiled(self, lanes: int, threads: int) -> float:
        """The same in tiles."""
        if not self.compiled.scalar:
            tiles = -(-lanes // (self.vector * self.tile)) * self.program.lanes
            return TILED[self._many] * self.vector * self.tile * -(-tiles // threads)
        vectors = -(-lanes * self.program.lanes // self.vector)
        width = self.tile if vectors >= self.tile * threads else 1
        return HIDDEN[width] * -(-vectors // (width * threads))

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[Prepared, list[Tensor]]:
        """See `seqparc.runtime.driver.Kernel`."""
        given = params if isinstance(params, Prepared) else Prepared([p if p.is_contiguous() else p.contiguous() for p in params])
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
        assert isinstance(params, Prepared)
        if not start.is_contiguous():
            start = start.contiguous()
        end = start.new_empty((len(spans), *start.shape[-2:]))
        run, packing = self._ways[self.few(end.shape[0] * end.shape[1])]
        args = self._arguments(spans, start, streams, params.addresses(packing), emits, sums, backwards, fade)
        args[END] = end.data_ptr()
        if reached is not None:
            args[REACHED] = reached.data_ptr()
        if sizes is not None:
            args[SIZES] = sizes.data_ptr()
        packed = array("q", args)  # lives as long as the call
        run(packed.buffer_info()[0])
        return end

    def _arguments(
        self, spans: Spans, start: Tensor, streams: Sequence[Tensor], params: Sequence[int], emits: Sequence[Tensor | None],
        sums: Sequence[Tensor | None], backwards: bool, fade: float,
    ) -> list[int]:  # fmt: skip
        """As the generated code reads them; no end states, no reached ones and no sizes yet."""
        batch, row = start.shape[-2:]
        apart = batch * row if start.dim() == 3 else 0
        args: list[int] = [
            len(spans), batch, openmp.threads(), *spans.addresses, start.data_ptr(), 0, 0, 0, row, apart, *_BITS.unpack(_NUMBER.pack(fade)),
        ]  # fmt: skip
        time = _from_the_end if backwards else _from_the_start
        for x in streams:
            args += time(x)
        args += params
        for y in emits:
            args += (0, 0, 0) if y is None else time(y)
        args += [0 if z is None else z.data_ptr() for z in sums]
        return args

    def again(
        self, spans: Spans, start: Tensor, streams: Sequence[Tensor], params: Prepared, emits: Sequence[Tensor | None],
        sums: Sequence[Tensor], backwards: bool, fade: float,
    ) -> Again:  # fmt: skip
        """A sweep that can be run again on other tensors that lie alike."""
        run, packing = self._ways[self.few(len(spans) * start.shape[0])]
        addresses = params.addresses(packing)
        args = self._arguments(spans, start, streams, addresses, emits, sums, backwards, fade)
        first = FIRST + 3 * len(streams) + len(addresses)  # of the emits
        return Again(run, packing, args, _offsets(args, FIRST, streams), len(addresses), _offsets(args, first, emits))

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


class Again:
    """A sweep whose arguments are known, but for where tensors lie."""

    def __init__(
        self, run: Callable[[int], None], packing: Packing, args: Sequence[int], streams: list[int], params: int, emits: list[int]
    ) -> None:
        """streams, emits: bytes from where a tensor lies to what is read or written of it first."""
        self._run, self._packing, self._args = run, packing, array("q", args)
        self._streams, self._params, self._emits = streams, params, emits

    def run(
        self, start: Tensor, streams: Sequence[Tensor], params: Prepared, emits: Sequence[Tensor | None], sums: Sequence[Tensor],
        end: Tensor, reached: Tensor | None = None, sizes: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`start` contiguous; streams and emits with the strides of those that the arguments were made for."""
        args = self._args[:]
        args[THREADS], args[START], args[END] = openmp.threads(), start.data_ptr(), end.data_ptr()
        if reached is not None and sizes is not None:
            args[REACHED], args[SIZES] = reached.data_ptr(), sizes.data_ptr()
        at = FIRST
        for x, offset in zip(streams, self._streams, strict=True):
            args[at] = x.data_ptr() + offset
            at += 3
        args[at : at + self._params] = params.addresses(self._packing)
        at += self._params
        for y, offset in zip(emits, self._emits, strict=True):
            if y is not None:
                args[at] = y.data_ptr() + offset
            at += 3
        for z in sums:
            args[at] = z.data_ptr()
            at += 1
        self._run(args.buffer_info()[0])


def _offsets(args: Sequence[int], first: int, tensors: Sequence[Tensor | None]) -> list[int]:
    """Bytes from where tensors lie to the addresses of them that are among arguments from `first` on."""
    return [0 if t is None else args[first + 3 * i] - t.data_ptr() for i, t in enumerate(tensors)]


def _from_the_start(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of batch and time."""
    sample, step, _ = x.stride()
    return x.data_ptr(), sample, step


def _from_the_end(x: Tensor) -> tuple[int, int, int]:
    """The same backwards in time: the last step's address and a negative stride."""
    sample, step, _ = x.stride()
    return x.data_ptr() + (x.shape[1] - 1) * step * x.element_size(), sample, -step
