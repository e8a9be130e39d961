"""What the tests of life in the rest of PyTorch share: three compiled modules, what they are compared with, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import seqparc
from tests.test_surface import Gated

#: What is compiled to [batch, time, width] -> (y, last), and the width.
MODULES: dict[str, tuple[Callable[[], Any], int]] = {
    "GRU": (lambda: nn.GRUCell(3, 5), 3),
    "elementwise": (lambda: Gated(6), 6),
    "LSTM layer": (lambda: nn.LSTM(3, 4, batch_first=True), 3),
}


def made(name: str, *lead: int, dtype: torch.dtype = torch.float32, backend: str = "auto") -> tuple[Any, Tensor]:
    """A compiled module and an x for it."""
    make, width = MODULES[name]
    cell = make() if dtype is torch.float32 else make().to(dtype)
    return seqparc.compile(cell, backend=backend), torch.randn(*(lead or (2, 9)), width, dtype=dtype)


def eager(module: Any) -> Callable[..., Any]:
    """What a compiled module is compared with: the plain loop, or torch's own layer, on the same tensors."""
    if isinstance(module, seqparc.CompiledRNN):
        return module.sequential
    layer = copy.deepcopy(nn.LSTM(module.input_size, module.hidden_size, batch_first=True)).to(module.weight_hh_l0.dtype)
    names = list(dict(layer.named_parameters()))
    return lambda x: torch.func.functional_call(layer, {n: getattr(module, n) for n in names}, (x,))


def gradients(results: Any, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum in which every number has its own weight."""
    leaves = [t for t in tree_leaves(results) if t.requires_grad]
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape) for t in leaves]
    return list(torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, leaves, strict=True)), wanted))


def close(mine: Any, right: Any, **tolerance: float) -> None:
    """Two trees of tensors of the same dtypes and about the same numbers."""
    for a, b in zip(tree_leaves(mine), tree_leaves(right), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def same(module: Any, x: Tensor, wanted: Sequence[Tensor] | None = None, run: Callable[..., Any] | None = None) -> None:
    """Results and gradients of a compiled module, or of `run`, are those of the plain loop."""
    x = x.clone().requires_grad_()
    asked = [x, *(module.parameters() if wanted is None else wanted)]
    asked = [t for t in asked if t.requires_grad]
    mine, right = (run or module)(x), eager(module)(x)
    close(mine, right)
    close(gradients(mine, asked), gradients(right, asked))
