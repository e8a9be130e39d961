"""What is known of x at some times, at any time between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqparc.errors import ShapeError
from seqparc.tree import flatten

#: How a path goes from one sample to the next.
KINDS = ("linear", "cubic", "previous")


class Path:
    """A path through samples x [times, ...] (a tensor or a tree of them) at t [times] or, one for each of a batch, [times, batch].

    kind  "linear"; "previous", which holds each sample until the next; or "cubic", Hermite's cubic with the slope at each sample that of
          the straight line that leads to it, so that nothing depends on what comes later (Morrill et al. 2021, "Neural Controlled
          Differential Equations for Online Prediction Tasks")

    `path(times)` gives the values at other times, `path.derivative(times)` dx/dt, both [times, ...] like x: what the right-hand side
    of a controlled differential equation wants, `solve(func, y0, t, x=path.derivative)`. Outside of t the outermost piece goes on.
    """

    def __init__(self, t: Tensor, x: Any, kind: str = "linear") -> None:
        if kind not in KINDS:
            raise ValueError(f"a path is {', '.join(map(repr, KINDS))}, not {kind!r}")
        self.leaves, self.structure = flatten(x)
        for v in self.leaves:
            if v.shape[: t.dim()] != t.shape:
                raise ShapeError(f"x has shape {list(v.shape)} and t {list(t.shape)}: x is [times, batch, ...], a sample for each time")
        self.t, self.kind = t, kind

    def __call__(self, times: Tensor, piece: Tensor | None = None) -> Any:
        """The values at times [n] or [n, batch]; `piece`: the numbers [n] of the pieces to take them from."""
        return self._at(times, piece, _VALUES[self.kind])

    def derivative(self, times: Tensor, piece: Tensor | None = None) -> Any:
        """dx/dt at times [n] or [n, batch]."""
        return self._at(times, piece, _SLOPES[self.kind])

    def pieces(self, times: Tensor) -> Tensor:
        """Which piece each of times [n] lies in: k, from sample k to k + 1."""
        if self.t.dim() > 1:
            raise ShapeError("times that each sample has for itself are not looked up; say which piece they lie in")
        sign = 1 if len(self.t) < 2 or bool(self.t[-1] > self.t[0]) else -1
        found = torch.searchsorted((sign * self.t).detach().contiguous(), (sign * times).detach().contiguous(), right=True) - 1
        return found.clamp(0, max(len(self.t) - 2, 0))

    def _at(self, times: Tensor, piece: Tensor | None, rule: Any) -> Any:
        k = self.pieces(times) if piece is None else piece
        following = (k + 1).clamp(max=len(self.t) - 1)
        before = (k - 1).clamp(min=0)
        t = [self.t[i] for i in (before, k, following)]
        since = times - (t[1] if t[1].dim() == times.dim() else t[1][:, None])
        made = []
        for v in self.leaves:
            values = [v[i] for i in (before, k, following)]
            lead, span, gone = (_wide(u, v) for u in (t[1] - t[0], t[2] - t[1], since))
            line = (values[2] - values[1]) / span
            incoming = torch.where(lead == 0, line, (values[1] - values[0]) / torch.where(lead == 0, span, lead))
            made.append(rule(values[1], values[2], incoming, line, gone, span))
        return self.structure.unflatten(made)


def _wide(u: Tensor, like: Tensor) -> Tensor:
    """Times as they go with values: in their dtype, with axes for what they do not have."""
    return u.to(like.abs().dtype).reshape(*u.shape, *[1] * (like.dim() - u.dim()))


def _cubic(a: Tensor, b: Tensor, incoming: Tensor, line: Tensor, since: Tensor, span: Tensor) -> Tensor:
    """From a with slope `incoming` to b with the slope of the straight line between them."""
    u = since / span
    return a + since * (incoming + (line - incoming) * u * (2 - u))


def _cubic_slope(a: Tensor, b: Tensor, incoming: Tensor, line: Tensor, since: Tensor, span: Tensor) -> Tensor:
    u = since / span
    return incoming + (line - incoming) * u * (4 - 3 * u)


_VALUES = {
    "linear": lambda a, b, incoming, line, since, span: a + line * since,
    "previous": lambda a, b, incoming, line, since, span: a + 0 * since,
    "cubic": _cubic,
}
_SLOPES = {
    "linear": lambda a, b, incoming, line, since, span: line + 0 * since,
    "previous": lambda a, b, incoming, line, since, span: 0 * line * since,
    "cubic": _cubic_slope,
}
