"""Values and all gradients of one run, and the plain loop's in float64 to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import seqparc
from seqparc.runtime.reference import loop
from seqparc.tree import flatten
from seqparc.validate import Precise


class Runs:
    """One cell, one input, one start state, one cotangent: run by anything, in any precision."""

    def __init__(self, cell: Any, inputs: int, batch: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(100 * steps + batch)
        self.cell = cell
        # Numbers that float32 holds exactly, so that one truth serves every precision.
        self.x = torch.randn(batch, steps, inputs, generator=generator).double()
        rnn = seqparc.compile(cell)
        like = next(cell.parameters())
        _, self.convention, start = rnn.understand(self.x.to(like.dtype))
        self.start = [0.5 * torch.rand(s.shape, generator=generator).double() for s in start]
        self.generator = generator.get_state()

    def weights(self, results: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator()
        generator.set_state(self.generator)
        return [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]

    def run(self, call: Callable[..., Any], dtype: torch.dtype, mode: Precise | None = None, cell: Any = None) -> dict[str, Tensor]:
        """`call(x, start leaves) -> (output leaves, last leaves)`, and gradients of x, start and parameters, by name."""
        x, start = self.x.to(dtype).requires_grad_(), [s.to(dtype).requires_grad_() for s in self.start]
        parameters = dict((cell or self.cell).named_parameters())
        with mode or contextlib.nullcontext():
            outputs, last = call(x, start)
        results = [*outputs, *last]
        total = sum((w.to(r.dtype) * r).sum() for w, r in zip(self.weights(results), results, strict=True))
        wanted = [x, *start, *(mode.leaf(p) if mode else p for p in parameters.values())]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        names = [f"y{i}" for i in range(len(outputs))] + [f"last{i}" for i in range(len(last))]
        found = dict(zip(names, (r.detach() for r in results), strict=True))
        names = ["dx", *(f"dstart{i}" for i in range(len(start))), *(f"d{n}" for n in parameters)]
        return found | {n: torch.zeros_like(w) if g is None else g for n, g, w in zip(names, grads, wanted, strict=True)}

    def plain(self, x: Tensor, start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return loop(lambda a, b: self.convention.call(self.cell, a, b), [x], start)

    def compiled(self, rnn: seqparc.CompiledRNN) -> Callable[..., Any]:
        def call(x: Tensor, start: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            y, last = rnn(x, self.convention.state.unflatten(start))
            return flatten(y)[0], flatten(last)[0]

        return call

    def truth(self) -> dict[str, Tensor]:
        """The plain loop in float64."""
        return self.run(self.plain, torch.float64, Precise(torch.float64))


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest magnitude; inf where one is not finite and the other is."""
    out = {}
    for name, t in truth.items():
        a, scale = found[name].double(), float(t.abs().max()) or 1.0
        worst = float((a - t).abs().max()) / scale
        out[name] = worst if worst == worst else float("inf")
    return out
