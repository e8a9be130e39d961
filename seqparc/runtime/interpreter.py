"""The torch backend: a lane program run with ordinary torch operations, lanes as the batch. Any device.

It is the fallback, and the second implementation that every generated kernel is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqparc import ir
from seqparc.ir import Program, Value
from seqparc.ops import OPS
from seqparc.scan import doubling
from seqparc.spans import LATELY, Spans


class TorchKernel:
    """Runs a lane program over chunks of time; values have shape [chunks, batch, lanes, size]."""

    chunk_per_warmup = 4
    scan = staticmethod(doubling)
    source = "(the torch backend interprets the program; see seqparc.text.print_program)"

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.program, self.dtype = program, dtype
        self.device = device or torch.device("cpu")
        self.order = ir.topological(program.outputs)
        self.offsets = np.concatenate([[0], np.cumsum(program.state_sizes)])
        self._indices: dict[ir.Index, Tensor] = {}

    def chunks_wanted(self, batch: int, threads: int) -> int:
        """See `seqparc.runtime.driver.Kernel`."""
        return -(-4096 // (batch * self.program.lanes))

    def pace(self, chunks: int, batch: int, threads: int) -> float:
        """See `seqparc.runtime.driver.Kernel`."""
        return max(1.0, chunks / self.chunks_wanted(batch, threads))

    def prepare(self, params: Sequence[Tensor], streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [p.reshape(-1) for p in params], [x.to(self.dtype) for x in streams]

    def index(self, index: ir.Index) -> Tensor:
        if index not in self._indices:
            self._indices[index] = torch.from_numpy(index.array.astype(np.int64)).to(self.device)
        return self._indices[index]

    def pick(self, tensor: Tensor, index: ir.Index) -> Tensor:
        """tensor[..., index] of a [..., numbers] tensor: [..., lanes, size]."""
        at = self.index(index)
        return tensor.index_select(-1, at.reshape(-1)).reshape(*tensor.shape[:-1], *at.shape)

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
        t0, length, lead = spans.t0, spans.length, spans.lead
        start = start.expand(len(spans), *start.shape[-2:])
        if lead is not None and reached is not None:
            nothing: list[Any] = [None]
            start = self.sweep(Spans(t0 - lead, lead), start, streams, params, nothing * len(emits), nothing * len(sums), backwards)
            reached.copy_(start)
        state = start.clone()
        begin = torch.from_numpy(np.ascontiguousarray(t0, np.int64)).to(start.device)
        fixed = {v: self.pick(params[v.slot], v.index) for v in self.order if isinstance(v, ir.Leaf) and v.kind == "param"}
        totals = [None if z is None else torch.zeros_like(z) for z in sums]
        lately = state.abs()
        shortest, longest = int(length.min()), int(length.max())
        for k in range(longest):
            live = np.flatnonzero(length > k)
            whole = k < shortest
            rows = slice(None) if whole else torch.from_numpy(live).to(start.device)
            at = begin[rows] + k
            now = [x.index_select(1, x.shape[1] - 1 - at if backwards else at).transpose(0, 1) for x in streams]
            values = self.evaluate(state[rows], now, fixed)
            for s in self.program.emits:
                out = emits[s.slot]
                if out is not None:
                    flat = values[s.value].flatten(2).transpose(0, 1)
                    to = out.shape[1] - 1 - at if backwards else at
                    out[:, to[:, None], self.index(s.index).reshape(-1)[None]] = flat.expand(out.shape[0], *flat.shape[1:])
            for s in self.program.sums:
                total = totals[s.slot]
                if total is not None:
                    part = torch.zeros_like(total[rows])
                    part[..., self.index(s.index).reshape(-1)] = values[s.value].flatten(2).to(total.dtype)
                    total[rows] += part
            following = torch.empty_like(state[rows])
            for v, value in zip(self.program.state, self.program.next, strict=True):
                following[..., self.index(v.index).reshape(-1) + int(self.offsets[v.slot])] = values[value].flatten(2)
            if whole:
                state = following
            else:
                state[rows] = following
            if sizes is not None:
                lately[rows] = torch.fmax(state[rows].abs(), lately[rows] * fade)
        if sizes is not None:
            sizes.copy_(lately)
        for z, total in zip(sums, totals, strict=True):
            if z is not None and total is not None:
                z.copy_(total)
        return state

    def gap(self, start: Tensor, end: Tensor, sizes: Tensor, atol: float, rtol: float) -> tuple[float, Tensor]:
        """See `seqparc.runtime.driver.Kernel`."""
        start, end = start[1:], end[:-1]
        size = torch.fmax(torch.fmax(start.abs(), end.abs()), sizes[:-1])
        most = torch.where(size.isfinite(), size, 0.0).cummax(0).values
        move = (end - start).abs_().div_(size.mul_(rtol).add_(most.mul_(atol))).nan_to_num_(nan=math.inf)
        move.masked_fill_((end == start) | (end.isnan() & start.isnan()), 0.0)
        worst = move.flatten(1).amax(1).cpu()
        return float(worst.max()), worst

    def evaluate(self, state: Tensor, streams: Sequence[Tensor], fixed: dict[ir.Leaf, Tensor]) -> dict[Value, Tensor]:
        """Every value of one step. state: [chunks, batch, numbers], streams alike."""
        values: dict[Value, Tensor] = {}
        lead = state.shape[:2]
        for v in self.order:
            match v:
                case ir.Leaf(kind="state", slot=slot, index=index):
                    start = int(self.offsets[slot])
                    out = self.pick(state[..., start : start + self.program.state_sizes[slot]], index)
                case ir.Leaf(kind="stream", slot=slot, index=index):
                    out = self.pick(streams[slot], index)
                case ir.Leaf():
                    out = fixed[v].expand(*lead, *fixed[v].shape)
                case ir.Const(value=number):
                    out = torch.full((*lead, self.program.lanes, v.size), number, dtype=self.dtype, device=state.device)
                case ir.Map(op=op, operands=operands):
                    out = OPS[op].torch(*(values[a] for a in operands))
                case ir.Gather(sources=sources, which=which, index=index):
                    out = self._gather([values[s] for s in sources], which, index)
                case ir.Contract(a=a, b=b, ia=ia, ib=ib):
                    dense = bool((ib.array == ib.array[:1]).all())
                    if dense and a in fixed:
                        weight = self._padded(fixed[a], ia)
                        out = torch.einsum("gek,cbgk->cbge", weight, self._padded(values[b], ir.Index(ib.array[0])))
                    else:
                        left = self._padded(fixed[a] if a in fixed else values[a], ia)
                        out = (left * self._padded(values[b], ib)).sum(-1)
                case ir.Reduce(fold=fold, x=x, index=index):
                    empty = 0.0 if fold == "sum" else float("-inf")
                    parts = self._padded(values[x], index, empty)
                    out = parts.sum(-1) if fold == "sum" else parts.amax(-1)
                case _:
                    raise TypeError(type(v).__name__)
            values[v] = out
        return values

    def _padded(self, tensor: Tensor, index: ir.Index, empty: float = 0.0) -> Tensor:
        """tensor[..., index] with `empty` where the index is -1."""
        at = self.index(index)
        picked = tensor.index_select(-1, at.clamp_min(0).reshape(-1)).reshape(*tensor.shape[:-1], *at.shape)
        return picked if bool((index.array >= 0).all()) else torch.where(at < 0, torch.full_like(picked, empty), picked)

    def _gather(self, sources: list[Tensor], which: ir.Index, index: ir.Index) -> Tensor:
        starts = np.concatenate([[0], np.cumsum([s.shape[-1] for s in sources])])
        flat = np.where(which.array < 0, -1, index.array + starts[which.array])
        joined = sources[0] if len(sources) == 1 else torch.cat(sources, -1)
        return self._padded(joined, ir.Index(flat))
