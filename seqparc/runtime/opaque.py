"""Cells with operations that are not known in the core: the cell itself runs all chunks at once, each a row of its batch.

That samples do not see each other is proved of what is known, and tried of the operations that are not. Of the state nothing is proved, so
it is one dense lane that only passes correct. The gradient is the cell's own, traced and run in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from seqparc import ir
from seqparc.convention import Convention
from seqparc.errors import UnsupportedOpError
from seqparc.exact import LIMITS, reaches
from seqparc.graphs import Piece
from seqparc.ir import Program, Value
from seqparc.plan import Plan, StateShape
from seqparc.runtime.interpreter import TorchKernel
from seqparc.surroundings import autocast, recast

#: One step: x leaves and state leaves, flat over rows, to the new state leaves.
Step = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


class Unknown:
    """The structure of what nothing is known about; see `seqparc.passes.dependency.Structure`."""

    kind = "unknown"

    def __init__(self, numbers: int) -> None:
        self.pattern = np.ones((numbers, numbers), bool)
        self.components = self.order = (tuple(range(numbers)),)


class OpaqueKernel(TorchKernel):
    """Runs chunks of time by calling a step on all their rows."""

    source = "(the cell itself, called for all chunks at once)"

    def __init__(self, step: Step, program: Program, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__(program, dtype, device)
        self.step = step

    def evaluate(self, state: Tensor, streams: Sequence[Tensor], fixed: dict[ir.Leaf, Tensor]) -> dict[Value, Tensor]:
        lead = state.shape[:2]
        now = state.flatten(0, 1).split_with_sizes(list(self.program.state_sizes), -1)
        with torch.no_grad():
            following = self.step([s.flatten(0, 1) for s in streams], now)
        return {v: f.reshape(*lead, 1, -1).to(self.dtype) for v, f in zip(self.program.next, following, strict=True)}


def plan_of(
    cell: Any, convention: Convention, x: Sequence[Tensor], state: Sequence[Tensor], attributes: dict[str, Any], why: str
) -> Plan:
    """A plan that calls the cell, of which samples are known not to see each other; `why` it comes to that."""
    if any(t.is_complex() for t in (*x, *state)):
        raise UnsupportedOpError(why)
    sizes = tuple(s[0].numel() for s in state)
    wide = any(not t.is_floating_point() or t.dtype is torch.float64 for t in (*x, *state))  # that holds integers of up to 53 bits
    limit = LIMITS[torch.float64].all
    leaves = tuple(ir.leaf("state", i, np.arange(n)[None]) for i, n in enumerate(sizes))
    program = Program(
        name="cell", lanes=1, state=leaves, next=leaves,
        emits=tuple(ir.Store(i, v.index, v) for i, v in enumerate(leaves)), state_sizes=sizes,
        stream_sizes=tuple(t[0].numel() for t in x), param_sizes=(), emit_sizes=sizes,
    )  # fmt: skip
    home = state[0].device.type
    cast = autocast(home)
    like = [(t.shape[1:], t.dtype) for t in (*x, *state)]

    def step(streams: Sequence[Tensor], now: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [t.reshape(-1, *shape).to(dtype) for t, (shape, dtype) in zip((*streams, *now), like, strict=True)]
        with recast(home, cast):
            return convention.call(cell, given[: len(x)], given[len(x) :])[1]

    def outputs(*values: Tensor) -> Sequence[Tensor]:
        with recast(home, cast):
            return convention.call(cell, list(values[: len(x)]), list(values[len(x) :]))[0] or ()

    nothing = Piece([], lambda: (), "", [])
    given = [*(("x", i) for i in range(len(x))), *(("state", i) for i in range(len(state)))]

    def none(*_: Any) -> Any:
        raise AssertionError("an opaque cell has no programs derived from it")

    return Plan(
        states=tuple(StateShape(tuple(s.shape[1:]), s.dtype) for s in state),
        dtype=torch.float64 if wide else torch.float32,
        prelude=nothing,
        weights=nothing,
        readout=None if convention.out is None else Piece(given, outputs, "", []),
        direct=tuple(range(len(x))),
        core=program,
        program=program,
        scalar=False,
        structure=Unknown(sum(sizes)),
        attributes=attributes,
        frozen={},
        given=limit if any(reaches(limit, t.dtype) for t in (*x, *state)) else None,
        coarse=False,
        adjoint=none,
        stored=none,
        jacobian=none,
        own_gradient=(why,),
        step=step,
        notes=[why],
    )


def by_sample(node: fx.Node) -> bool:
    """Whether an operation treats each row by itself: it is elementwise, or rows give alone, and in another order, what they give together.

    Rows of very different kinds, as an operation over all of them may show itself only where all are zero, or one is large.
    """
    value = node.meta["val"]
    results = value if isinstance(value, (list, tuple)) else (value,)
    (args, kwargs), (other, named) = node.meta["static"]
    flat, structure = tree_flatten((args, kwargs))
    if flat != tree_flatten((other, named))[0]:  # it is told the batch size
        return False
    inputs = [v.meta["val"] for v in flat if isinstance(v, fx.Node)]
    moving = [v for v in flat if isinstance(v, fx.Node) and v.meta["kind"] in ("x", "state")]
    batch = {v.meta["val"].shape[0] for v in moving if isinstance(v.meta["val"], Tensor) and v.meta["val"].dim()}
    if len(batch) != 1 or not all(isinstance(v, Tensor) for v in (*inputs, *results)):
        return False
    (size,) = batch
    if any(t.dim() == 0 or t.shape[0] != size for t in (*results, *(v.meta["val"] for v in moving))):
        return False
    target: Any = node.target
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return True
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 1.0, -1.0, 100.0, 0.0, 0.01], dtype=torch.float64)

    def rows(t: Tensor) -> Tensor:
        made = torch.rand(len(scales), *t.shape[1:], generator=generator, dtype=torch.float64)
        made = made * scales.reshape(-1, *[1] * (t.dim() - 1))
        picked = t.detach().index_select(0, torch.arange(len(scales), device=t.device) % size)
        return made.to(t) if t.is_floating_point() or t.is_complex() else picked  # integers may be places

    stacks = {v: rows(v.meta["val"]) for v in moving}

    def run(which: list[int]) -> Sequence[Tensor]:
        values = [stacks[v][which] if v in stacks else v.meta["val"] if isinstance(v, fx.Node) else v for v in flat]
        given, named = tree_unflatten(values, structure)
        result = target(*given, **named)
        return result if isinstance(result, (list, tuple)) else (result,)

    order = list(range(len(scales)))
    with torch.no_grad():
        try:
            together, *others = ((which, run(which)) for which in (order, *([k] for k in order), order[::-1], [0, 4]))
        except RuntimeError:  # it does not take another number of rows
            return False
        for which, parts in others:
            for whole, part in zip(together[1], parts, strict=True):
                if not torch.allclose(whole[which].to(torch.complex128), part.to(torch.complex128), rtol=1e-5, atol=1e-8, equal_nan=True):
                    return False
    return True
