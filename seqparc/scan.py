"""The scan over chunks of a Newton update."""

from __future__ import annotations

import torch
from torch import Tensor


def doubling(a: Tensor, r: Tensor, largest: bool = False) -> Tensor:
    """d_0 = r_0, d_c = r_c + a_{c-1} d_{c-1}, in log2(count) rounds; a [count - 1, ..., n, n], r [count, ..., n].

    largest: of numbers that are not negative, the larger of the two, not their sum; if n > 1 no more than that, for what meets in a sum
    comes from one chunk.
    """
    both = torch.fmax if largest else torch.add
    count = r.shape[0]
    d = r.clone()
    if count == 1:
        return d
    m = torch.cat((torch.zeros_like(a[:1]), a))
    step = 1
    while step < count:
        d = torch.cat((d[:step], both(d[step:], (m[step:] @ d[:-step].unsqueeze(-1)).squeeze(-1))))
        m = torch.cat((m[:step], m[step:] @ m[:-step]))
        step *= 2
    return d
