"""deterministic=True: the same bits from run to run and for every number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import seqparc

from .cells import CELLS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("name", ["elementwise GRU", "GRU", "LSTM", "two levels"])
def test_bits_do_not_depend_on_threads_or_earlier_runs(name: str) -> None:
    cell = CELLS[name].make()
    rnn = seqparc.compile(cell, options={"deterministic": True})
    x = torch.randn(2, 3000, CELLS[name].inputs, requires_grad=True)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        y, last = rnn(x)
        results = [*seqparc.tree.flatten(y)[0], *seqparc.tree.flatten(last)[0]]
        return [*results, *torch.autograd.grad([r.square().sum() for r in results], [x, *cell.parameters()])]

    first = run(2)
    assert rnn.stats.chunks > 1 and rnn.stats.backward is not None and rnn.stats.backward.chunks > 1
    for threads in (2, 1, 3, 4, 1):
        for a, b in zip(run(threads), first, strict=True):
            assert torch.equal(a, b)
