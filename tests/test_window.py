"""Streams of few numbers, which kernels read and write by windows of several steps, however they lie in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import seqparc


class Oscillator(nn.Module):
    """Driven and damped, x [batch, 2]; a state of two numbers, of which one is read out."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.3, 0.2, 0.9]))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, p = state
        p = torch.tanh(self.k[0] * p - self.k[1] * q + x[:, :1] * torch.sigmoid(x[:, 1:]))
        q = self.k[2] * q + p
        return q, (q, p)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.k.new_full((batch, 1), 0.1), self.k.new_zeros(batch, 1)


def _as_it_is(x: Tensor) -> Tensor:
    return x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "side by side": _as_it_is,
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of more": lambda x: torch.cat((x, x + 1, x), -1)[..., 2:4].sub_(1),
    "every other step": lambda x: torch.stack((x, x), 2).flatten(1, 2)[:, ::2],
    "one for all samples": lambda x: x[:1].expand_as(x),
    "one for all steps": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_however_a_stream_lies(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    precise = Oscillator().double()
    cell = copy.deepcopy(precise).to(dtype)
    oracle = seqparc.compile(precise)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for chunks in (1, 5, 37):
        rnn = seqparc.compile(cell, backend="c", options={"chunks": chunks, "warmup": 20 if chunks > 1 else None})
        for batch, steps in ((1, 1), (2, 7), (1, 8), (3, 40), (2, 129), (1, 640), (3, 643)):
            x = LAYOUTS[layout](torch.randn(batch, steps, 2, dtype=dtype)).requires_grad_()
            weight = torch.linspace(-1, 1, steps, dtype=dtype)[:, None]
            found, right = [], []
            exact = x.detach().double().requires_grad_()
            for results, call, of, leaf in ((found, rnn, cell, x), (right, oracle.sequential, precise, exact)):
                y, (_, p) = call(leaf)
                # Of the first sum the cotangent has no stride, of the second one that changes.
                for total in (y.sum(), (y * weight).sum() + p.sum()):
                    results += [y, p, *torch.autograd.grad(total, [leaf, of.k], retain_graph=True)]
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max())))
        source = rnn.source("c", "backward")
        assert "load_window" in source and "store_window" in source
