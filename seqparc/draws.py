"""Random numbers that a cell draws: inputs of a step, drawn anew for every step of a run in the order in which the plain loop draws them.

A run begins with them: for each step in turn, each operation that draws, in the cell's order. So a seeded run has the numbers that the
seeded loop has, as long as nothing else draws in between, and backward sees the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqparc.ir import Source

#: Operations whose numbers depend on nothing but a shape and plain arguments: of a tensor that they fill or that is like the result …
_LIKE = frozenset(
    f"aten.{name}"
    for name in """
    rand_like.default randn_like.default bernoulli.p bernoulli_.float uniform_.default normal_.default exponential_.default
    native_dropout.default
    """.split()
)
#: … or of a size.
_SIZED = frozenset(("aten.rand.default", "aten.randn.default"))


@dataclass(frozen=True)
class Draw:
    """One draw of a step; `shape` and `dtype` of the tensor it is given, or that it gives."""

    function: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    like: bool
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    home: str  # the type of device whose generator it is
    source: Source | None

    def __call__(self, batch: int, device: torch.device) -> Tensor:
        """For a batch, on a device: [batch, ...]. Of a dropout that is one operation, the mask."""
        shape, kwargs = (batch, *self.shape[1:]), dict(self.kwargs)
        at = device if device.type == self.home else torch.device(self.home)
        if self.like:
            result = self.function(torch.ones(shape, dtype=self.dtype, device=at), *self.args, **kwargs)
        else:
            result = self.function(list(shape), *self.args, **kwargs, device=at)
        return (result[1] if isinstance(result, tuple) else result).to(device)


def draw_of(function: Any, args: Sequence[Any], kwargs: dict[str, Any], source: Source | None) -> Draw | None:
    """What an operation draws, if that depends on nothing but shapes; else None. Into other strides it draws in another order."""
    name = str(function)
    plain = tuple((k, v) for k, v in kwargs.items() if k not in ("device", "memory_format", "pin_memory", "layout") and v is not None)
    if any(isinstance(v, (Tensor, torch.Generator)) for v in (*args[1:], *(v for _, v in plain))):
        return None
    if name in _LIKE and args[0].is_contiguous() and (name != "aten.native_dropout.default" or args[2]):
        return Draw(function, tuple(args[0].shape), args[0].dtype, True, tuple(args[1:]), plain, args[0].device.type, source)
    if name in _SIZED:
        home = torch.device(kwargs.get("device") or "cpu").type
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return Draw(function, tuple(args[0]), dtype, False, tuple(args[1:]), plain, home, source)
    return None


class Replay(TorchDispatchMode):
    """Operations that draw give these numbers instead, in this order."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = iter(given)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in the recorder: dynamo is not to be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags or draw_of(func, args, kwargs or {}, None) is None:
            return func(*args, **(kwargs or {}))
        value = next(self.given)
        if func._schema.is_mutable:
            return args[0].copy_(value)
        if str(func) == "aten.native_dropout.default":
            return args[0] * value * (1 / (1 - args[1]) if args[1] < 1 else 0.0), value
        return value


def seed(device: torch.device) -> None:
    """Start the generators that a cell on this device may draw from anew, and no others."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index].manual_seed(0)


def drawn(draws: Sequence[Draw], batch: int, steps: int, device: torch.device) -> list[Tensor]:
    """[batch, time, ...] of every draw."""
    with torch.no_grad():
        rows = [[draw(batch, device) for draw in draws] for _ in range(steps)]
        return [torch.stack(column, 1) for column in zip(*rows, strict=True)]
