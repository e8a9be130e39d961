"""A row, compiled and looped over: values, last states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import seqparc
from seqparc.passes.dependency import Structure
from seqparc.tree import flatten

from .plain import loop
from .rows import Row

Run = Callable[[Any, Any], tuple[Any, Any]]


@dataclass
class Subject:
    """A row's cell, compiled, and numbers to run it on."""

    row: Row
    rnn: seqparc.CompiledRNN
    x: Any
    state: Any

    @classmethod
    def of(cls, row: Row, batch: int, steps: int, **options: Any) -> Subject:
        torch.manual_seed(0)
        cell = row.cell()
        x, state = row.example(batch, steps)
        return cls(row, seqparc.compile(cell, options=options, name=row.title), x, state)

    def plain(self, x: Any, state: Any) -> tuple[Any, Any]:
        """The plain loop over the cell itself."""
        return loop(self.rnn.cell, self.rnn.understand(x, state)[1], x, state, self.row.writes)

    def results(self, run: Run) -> dict[str, Tensor]:
        """The outputs and last states of a run, and the gradients of x, the start state and every parameter, by name."""
        leaves, structure = flatten((self.x, self.state))
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in leaves]
        torch.manual_seed(1)  # for cells that draw random numbers
        y, last = run(*structure.unflatten(leaves))
        made = {f"y{i}": t for i, t in enumerate(flatten(y)[0])} | {f"last{i}": t for i, t in enumerate(flatten(last)[0])}
        parameters = {n: p for n, p in self.rnn.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(2)
        weights = [torch.randn(t.shape, generator=generator) for t in made.values()]
        uses = [(t, w) for t, w in zip(made.values(), weights, strict=True) if t.requires_grad]
        wanted = {f"d{i}": t for i, t in enumerate(leaves) if t.requires_grad} | {f"d{n}": p for n, p in parameters.items()}
        grads: Any = [None] * len(wanted)
        if uses:
            grads = torch.autograd.grad([t for t, _ in uses], list(wanted.values()), [w for _, w in uses], allow_unused=True)
        gradients = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), grads, strict=True)}
        return {name: t.detach() for name, t in made.items()} | gradients

    def structure(self) -> Structure:
        """What seqparc proves about the state Jacobian. Raises what compiling raises."""
        engine = self.rnn.engine(self.x, self.state)
        assert not isinstance(engine, str) and engine is not None, engine
        return engine.plan.structure

    def dependence(self, trials: int = 4) -> np.ndarray:
        """[next state numbers, state numbers]: where a perturbed state number was seen to change the next state."""
        leaves, convention, start = self.rnn.understand(self.x, self.state)
        sizes = [s[0].numel() for s in start]
        total = sum(sizes)
        seen = np.zeros((total, total), bool)
        for trial in range(trials):
            x_t = [v[:1, trial].expand(total + 1, *v.shape[2:]).clone() for v in leaves]
            flat = torch.cat([s[:1].flatten(1) for s in start], 1).expand(total + 1, -1).clone()
            flat[1:] += 0.3 * (-1) ** trial * torch.eye(total)  # each of the samples has another number changed
            parts = [p.reshape(total + 1, *s.shape[1:]) for p, s in zip(flat.split(sizes, 1), start, strict=True)]
            torch.manual_seed(trial)
            with torch.no_grad():
                _, following = convention.call(self.rnn.cell, x_t, parts)
            after = torch.cat([f.flatten(1) for f in following], 1)
            seen |= ((after[1:] - after[:1]).abs() > 1e-5 * (1 + after[:1].abs())).numpy().T  # less is rounding: a product's rows differ
        return seen


def words(s: Structure) -> str:
    """ "dense", "diagonal", "triangular" (solved group after group), "8 blocks of 2" that never meet, "none" if no state is read."""
    largest = max(map(len, s.components))
    if not s.pattern.any() or largest == 1:
        return "diagonal" if s.pattern.any() else "none"
    triangular = any(len(group) < largest for group in s.order)
    if len(s.components) == 1:
        return "triangular" if triangular else "dense"
    return f"{len(s.components)}{' triangular' if triangular else ''} blocks of {largest}"


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest number."""
    assert found.keys() == right.keys()
    out = {}
    for name, t in right.items():
        worst = float((found[name].double() - t.double()).abs().max())
        out[name] = worst / (float(t.abs().max()) or 1.0)
    return out
