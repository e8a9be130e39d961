"""What a cell that keeps its state on itself starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqparc import held
from seqparc.convention import Convention, called
from seqparc.errors import ShapeError, StateError
from seqparc.matching import alike, x_only
from seqparc.tree import LEAF, Structure, flatten


def held_state(cell: Any, x: list[Tensor], inputs: Structure) -> dict[str, Any] | None:
    """What a cell that keeps its state on itself holds before the first step, {attribute: [batch, ...]}; None if it keeps none.

    That is what it holds now; where that is nothing, a number or of another batch, tensors that do the same. Raises StateError where
    neither zeros nor that number does.
    """
    name = called(cell)
    for words in x_only(cell, inputs):
        way = Convention(words, LEAF, inputs)
        with held.untouched(cell, x):
            before, watch = held.attributes(cell), held.Watch(cell)
            torch.manual_seed(0)
            try:
                result = way.invoke(cell, [t.clone() for t in x], [])
                flatten(result)
            except Exception:  # whatever the user's code raises: it is not called so, or gives nothing out
                continue
            after = {n: v for n, v in watch.changed().items() if _per_sample(v, len(x[0])) and n in before}
        if not after:
            continue
        fits = {n: _per_sample(before[n], len(x[0])) and _shapes(before[n]) == _shapes(v) for n, v in after.items()}
        start = {n: before[n] if fits[n] else _like(v, before[n]) for n, v in after.items()}
        structure = flatten(start)[1]
        same = Convention(words, structure, inputs, "out, state", held=structure.names)
        with held.untouched(cell, x), held.Used() as used:
            torch.manual_seed(0)
            given = {n: structure_of.unflatten([t.clone() for t in leaves]) for n, (leaves, structure_of) in _parts(start).items()}
            again = same.invoke(cell, [t.clone() for t in x], flatten(given)[0])
        read = {n: start[n] for n in start if used.reads(given[n])}
        if not read:  # what a cell only writes there is not its state
            continue
        if not alike((result, after), again):
            raise StateError(
                f"{name} keeps its state on itself ({', '.join(read)}) and starts from something else than zeros. Say from what with "
                "state=, a dict {attribute: tensor} for one sample, or a callable batch -> state."
            )
        return read
    return None


def _parts(state: dict[str, Any]) -> dict[str, tuple[list[Tensor], Structure]]:
    return {n: flatten(v) for n, v in state.items()}


def _per_sample(value: Any, batch: int) -> bool:
    """Whether a value is a tree of tensors [batch, ...]."""
    try:
        leaves, _ = flatten(value)
    except ShapeError:
        return False
    return bool(leaves) and all(t.dim() > 0 and t.shape[0] == batch for t in leaves)


def _shapes(value: Any) -> tuple[Any, ...]:
    leaves, structure = flatten(value)
    return structure, *[(t.shape, t.dtype) for t in leaves]


def _like(value: Any, number: Any) -> Any:
    """A tree of tensors like another's, all of one number; zeros where there is none."""
    leaves, structure = flatten(value)
    number = number if isinstance(number, (int, float)) and not isinstance(number, bool) else 0
    return structure.unflatten([torch.full_like(t, number, requires_grad=False) for t in leaves])
