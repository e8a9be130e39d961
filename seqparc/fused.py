"""What PyTorch computes in one operation, in the operations it is made of: cells on a GPU, so that one recording serves all devices, and
derivatives of activations and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table


def _gates(given: Tensor, recurrent: Tensor, b_given: Tensor | None, b_recurrent: Tensor | None) -> tuple[Tensor, Tensor]:
    return given if b_given is None else given + b_given, recurrent if b_recurrent is None else recurrent + b_recurrent


def gru(
    given: Tensor, recurrent: Tensor, h: Tensor, b_given: Tensor | None = None, b_recurrent: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The new state of a GRU from both products [batch, 3 units], gates in the order r, z, n; then what only backward would want."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (g.chunk(3, 1) for g in _gates(given, recurrent, b_given, b_recurrent))
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (h - n) * z + n, h


def lstm(
    given: Tensor, recurrent: Tensor, c: Tensor, b_given: Tensor | None = None, b_recurrent: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The new (h, c) of an LSTM from both products [batch, 4 units], gates in the order i, f, g, o."""
    x, h = _gates(given, recurrent, b_given, b_recurrent)
    i, f, g, o = (x + h).chunk(4, 1)
    new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(new), new, c


def floored(size: Tensor, least: float) -> Tensor:
    """At least so much, with the derivative of the size itself everywhere."""
    return torch.where(size < least, size + (least - size).detach(), size)


def cosine_similarity(call: Callable[..., Tensor], x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """As torch computes it: no gradient is lost where a norm is below eps. `call(floored, size, eps)` makes that one operation."""
    kind = torch.promote_types(x1.dtype, x2.dtype)
    one, two = (t.to(kind) for t in torch.broadcast_tensors(x1, x2))
    sizes = (call(floored, torch.linalg.vector_norm(t, 2, dim, keepdim=True), eps) for t in (one, two))
    return torch.mul(*(t / size for t, size in zip((one, two), sizes, strict=True))).sum(dim)


FUSED: dict[str, Callable[..., Any]] = {"aten._thnn_fused_gru_cell.default": gru, "aten._thnn_fused_lstm_cell.default": lstm}

#: Derivatives that are known as they are; of others torch says what they are made of.
_DERIVATIVES = frozenset(f"aten.{name}_backward.default" for name in ("tanh", "sigmoid", "threshold", "select", "slice", "diagonal"))


def made_of(operation: Any) -> Callable[..., Any] | None:
    """The operations that one is made of, as a function; None: it is taken as it is."""
    name = str(operation)
    if name in FUSED:
        return FUSED[name]
    if name.endswith(("_backward.default", "_backward_data.default")) and name not in _DERIVATIVES:
        return decomposition_table.get(operation)
    return None
