"""States too large for a chip: a time step is a few library products over all lanes, and generated kernels for what lies between.

The host walks through time; nothing it does waits for the device, so a CUDA graph can hold it. Programs that do not fall into
tiles run this way too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqparc import ir
from seqparc.codegen.device import RESIDENT, check, load, multiprocessors, on_device
from seqparc.codegen.elements import CONSTANTS, WARPS, emit
from seqparc.codegen.gpulaunch import TritonKernel
from seqparc.codegen.launcher import Launcher
from seqparc.codegen.parts import Product, split
from seqparc.codegen.schedule import TooIrregularError
from seqparc.ir import Program, Value
from seqparc.locks import Lock
from seqparc.spans import LATELY, Spans

_precision = Lock()

Ints = NDArray[np.integer[Any]]


class StepKernel:
    """Runs a lane program over chunks of time, step by step from the host. `why`: what stood against one kernel for all of it.

    Raises `TooIrregularError` if a gather falls into too many pieces.
    """

    chunk_per_warmup = 2

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device, precision: str = "ieee", why: str = "") -> None:
        check(device)
        self.program, self.dtype, self.device, self.precision, self.why = program, dtype, device, precision, why
        self.offsets = np.concatenate([[0], np.cumsum(program.state_sizes)])
        parts = split(program)
        self.work, self.places, self.widths = parts.work, parts.places, parts.widths
        self.compiled = emit(program, parts.plan, parts.places, dtype is torch.float64)
        module = load(self.compiled.text)
        self._run = [Launcher(getattr(module, part.name)) for part in self.compiled.parts]
        self._indices: dict[ir.Index, tuple[Tensor, Tensor | None]] = {}
        self._tables = [on_device(t.array, device, torch.int32) for t in self.compiled.tables]

    @property
    def source(self) -> str:
        return self.compiled.text

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        return -(-multiprocessors(self.device) * RESIDENT // (batch * self.program.lanes * self.program.n))

    def pace(self, chunks: int, batch: int, threads: int) -> float:
        """See `seqparc.runtime.driver.Kernel`."""
        return max(1.0, chunks / self.chunks_wanted(batch, threads))

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `seqparc.runtime.driver.Kernel`. The products' matrices follow the parameters."""
        given = [p.reshape(-1) for p in params]
        matrices = []
        for item in self.work:
            if isinstance(item, Product):
                parts = [self._weight(given, v, matrix) for v, matrix in item.members]
                lanes = max(p.shape[0] for p in parts)
                matrices.append(parts[0] if len(parts) == 1 else torch.cat([p.expand(lanes, -1, -1) for p in parts], -1))
        return [*given, *matrices], list(streams)

    def _weight(self, given: Sequence[Tensor], v: ir.Contract, matrix: Ints) -> Tensor:
        """A contraction's matrix [lanes or 1, k, e]: the parameter itself where its elements lie evenly, else a copy."""
        assert isinstance(v.a, ir.Leaf)
        leaf = v.a.index.array
        leaf = leaf[:1] if (leaf == leaf[:1]).all() else leaf
        elements = np.where(matrix[None] < 0, -1, leaf[:, np.maximum(matrix, 0)])
        found = None if (elements < 0).any() else ir.affine(elements)
        if found is not None and min(found[1]) >= 0:
            whole = given[v.a.slot]  # which may itself lie inside of something
            return whole.as_strided(elements.shape, found[1], whole.storage_offset() + found[0])
        return self._picked(elements)(given[v.a.slot])

    # -- what products and folds read and write: views made once, or what makes a copy at every step -----------------------------------

    def _array(self, buffers: Sequence[Tensor], v: Value) -> Tensor:
        """[lanes, rows, size] of a stored value."""
        p = self.places[v]
        return buffers[p.number][..., p.at : p.at + v.size]

    def _operand(self, buffers: Sequence[Tensor], state: Tensor, params: Sequence[Tensor], v: Value, index: Ints) -> Callable[[], Tensor]:
        """Elements `index` of a value, zero where that is -1: [lanes or 1, rows or 1, *index.shape]."""
        if v in self.places:
            x, pick = self._array(buffers, v), self._picked(index)
            return lambda: pick(x)
        assert isinstance(v, ir.Leaf)
        base = 0 if v.kind == "param" else self.offsets[v.slot]
        leaf = np.where(index[None] < 0, -1, v.index.array[:, np.maximum(index, 0)] + base)  # [lanes, ...]
        pick = self._picked(leaf)
        if v.kind == "param":
            fixed = pick(params[v.slot]).unsqueeze(1)
            return lambda: fixed
        return lambda: pick(state).transpose(0, 1)

    def _columns(self, buffers: Sequence[Tensor], state: Tensor, item: Product) -> Callable[[], Tensor]:
        """The left side of a product, [lanes, rows, k]: in place where it lies evenly."""
        if isinstance(item.x, ir.Leaf) and item.x.kind == "state":
            at = item.x.index.array[:, item.columns] + self.offsets[item.x.slot]
            found = ir.affine(at)
            if found is not None and min(found[1]) >= 0:
                offset, (by_lane, by_element) = found
                view = state.as_strided((len(at), len(state), at.shape[1]), (by_lane, state.stride(0), by_element), offset)
                return lambda: view
        elif item.x in self.places and np.array_equal(item.columns, np.arange(item.x.size)):
            whole = self._array(buffers, item.x)
            return lambda: whole
        return self._operand(buffers, state, (), item.x, item.columns)

    def _picked(self, index: Ints) -> Callable[[Tensor], Tensor]:
        """x -> x[..., index], with zero where the index is -1."""
        key = ir.Index(index)
        if key not in self._indices:  # once, as nothing is to be copied to the device while a CUDA graph is made
            holes = on_device(index < 0, self.device, torch.bool).view(index.shape) if (index < 0).any() else None
            self._indices[key] = on_device(np.maximum(index, 0), self.device, torch.int64), holes
        at, holes = self._indices[key]

        def pick(x: Tensor) -> Tensor:
            picked = x.index_select(-1, at).reshape(*x.shape[:-1], *index.shape)
            return picked if holes is None else picked.masked_fill_(holes, 0)

        return pick

    def _library(self, params: Sequence[Tensor], buffers: Sequence[Tensor], state: Tensor) -> Iterator[Callable[[], Any]]:
        """What each product and fold does, in order, for one of the two state buffers."""
        matrices = iter(params[len(self.program.param_sizes) :])
        for item in self.work:
            if isinstance(item, Product):
                yield _multiply(self._columns(buffers, state, item), next(matrices), buffers[item.buffer])
            elif isinstance(item, ir.Contract):
                dead = (item.ia.array < 0) | (item.ib.array < 0)
                left = self._operand(buffers, state, params, item.a, np.where(dead, -1, item.ia.array))
                right = self._operand(buffers, state, params, item.b, np.where(dead, -1, item.ib.array))
                yield _sum_of_products(left, right, self._array(buffers, item))
            elif isinstance(item, ir.Reduce):
                index = item.index.array
                if item.fold == "max":  # a number twice is no larger
                    index = np.where(index < 0, index.max(1, keepdims=True), index)
                yield _fold(item.fold, self._operand(buffers, state, params, item.x, index), self._array(buffers, item))

    # -- the walk --------------------------------------------------------------------------------------------------------

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
        t0, count, lead = spans.on(start.device)
        states = [start.expand(chunks, batch, row).reshape(chunks * batch, row).clone(), start.new_empty(chunks * batch, row)]
        for z in sums:
            if z is not None:
                z.zero_()
        outputs = (streams, params, emits, sums, backwards)
        with full_precision(self.precision):
            if reached is not None and spans.lead is not None:
                states = self._walk(t0 - lead, lead, int(spans.lead.max()), states, *outputs, batch, None, fade, out=False)
                reached.view(-1, row).copy_(states[0])
            lately = None
            if sizes is not None:
                lately = sizes.view(-1, row)
                torch.abs(states[0], out=lately)
            states = self._walk(t0, count, spans.longest, states, *outputs, batch, lately, fade, out=True)
        return states[0].view(chunks, batch, row)

    def _walk(
        self, t0: Tensor, count: Tensor, steps: int, states: list[Tensor], streams: Sequence[Tensor], params: Sequence[Tensor],
        emits: Sequence[Tensor | None], sums: Sequence[Tensor | None], backwards: bool, batch: int, lately: Tensor | None,
        fade: float, out: bool,
    ) -> list[Tensor]:  # fmt: skip
        """So many steps from states[0] on; the last states are the first of the two that come back."""
        rows, row = states[0].shape
        buffers = [states[0].new_empty(self.program.lanes, rows, width) for width in self.widths]
        given: dict[str, Any] = {"t0": t0, "count": count, "k": 0, "batch": batch, "rows": rows, "row": row, "lately": lately, "fade": fade}
        for letter, tensors in (("x", streams), ("y", emits)):
            for s, x in enumerate(tensors):
                if x is None:
                    given |= {f"{letter}{s}": None, f"{letter}{s}_b": 0, f"{letter}{s}_t": 0}
                else:
                    first, by = (x[:, -1:], -x.stride(1)) if backwards else (x, x.stride(1))
                    given |= {f"{letter}{s}": first, f"{letter}{s}_b": x.stride(0), f"{letter}{s}_t": by}
        for letter, rest in (("p", params), ("a", buffers), ("z", sums), ("T", self._tables)):
            given |= {f"{letter}{s}": x for s, x in enumerate(rest)}
        constants = {"OUT": out, "SIZES": lately is not None}
        turns = []  # the work of even steps and of odd ones
        for state, following in (states, states[::-1]):
            given |= {"state": state, "following": following}
            library = self._library(params, buffers, state)
            turns.append([next(library) if not isinstance(w, int) else self._loop(w, given, rows, constants) for w in self.work])
        for k in range(steps):
            for do in turns[k % 2]:
                do(k) if isinstance(do, _Launch) else do()
        return states if steps % 2 == 0 else states[::-1]

    def _loop(self, number: int, given: dict[str, Any], rows: int, constants: dict[str, Any]) -> _Launch:
        part = self.compiled.parts[number]
        names = [name for name in part.signature if name not in CONSTANTS]
        args = [given[name] for name in names]
        constants = constants | {"ROWS": part.tile[0], "COLUMNS": part.tile[1]}
        return _Launch(self._run[number], args, names.index("k"), -(-rows // part.tile[0]) * part.across, constants)

    def scan(self, a: Tensor, r: Tensor, largest: bool = False) -> Tensor:
        """See `seqparc.runtime.driver.Kernel`."""
        from seqparc.codegen.gpuscan import scan

        return scan(a, r, largest)

    def gap(self, start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
        """See `seqparc.runtime.driver.Kernel`."""
        from seqparc.codegen.gpugap import gap

        return gap(start, end, sizes, atol, rtol)


@dataclass
class _Launch:
    """A generated kernel with everything but the step."""

    run: Launcher
    args: list[Any]
    at: int  # where the step goes
    programs: int
    constants: dict[str, Any]

    def __call__(self, k: int) -> None:
        self.args[self.at] = k
        self.run(self.programs, self.args, self.constants, WARPS)


def _multiply(x: Callable[[], Tensor], w: Tensor, out: Tensor) -> Callable[[], Any]:
    if len(out) == 1:
        return lambda: torch.mm(x()[0], w[0], out=out[0])
    wide = w.expand(len(out), -1, -1)
    return lambda: torch.bmm(x(), wide, out=out)


def _sum_of_products(a: Callable[[], Tensor], b: Callable[[], Tensor], out: Tensor) -> Callable[[], Any]:
    return lambda: out.copy_((a() * b()).sum(-1))


def _fold(how: str, x: Callable[[], Tensor], out: Tensor) -> Callable[[], Any]:
    return lambda: out.copy_(x().sum(-1) if how == "sum" else x().amax(-1))


@contextlib.contextmanager
def full_precision(precision: str) -> Iterator[None]:
    """The library's float32 products in full precision meanwhile, or in TF32 where that was asked for."""
    library = torch.backends.cuda.matmul
    with _precision():  # it is one for all threads
        was = library.fp32_precision
        try:
            library.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            yield
        finally:
            library.fp32_precision = was


def kernel(program: Program, dtype: torch.dtype, device: torch.device, precision: str = "ieee") -> TritonKernel | StepKernel:
    """The Triton backend of a program: one kernel for all of the time loop, or where that is not to be had, step by step."""
    try:
        return TritonKernel(program, dtype, device, precision)
    except TooIrregularError as error:
        return StepKernel(program, dtype, device, precision, str(error))
