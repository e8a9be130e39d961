"""Stretches of time that chunks run over, as kernels are given them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

#: What a step ago counts where it is asked how large the state was lately, if it is not known how fast the cell forgets.
LATELY = 0.5


@dataclass(frozen=True, eq=False)
class Spans:
    """Chunk c runs steps t0[c] … t0[c] + length[c] - 1, after the lead[c] steps before those; int64 each, one number per chunk."""

    t0: np.ndarray
    length: np.ndarray
    lead: np.ndarray | None = None
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t0)

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Where the three lie in memory, 0 for no lead: asked for at every call, and slow to find out."""
        return _address(self.t0), _address(self.length), 0 if self.lead is None else _address(self.lead)

    @functools.cached_property
    def steps(self) -> int:
        """Steps up to the end of the last chunk."""
        return int((self.t0 + self.length).max())

    @functools.cached_property
    def longest(self) -> int:
        """Steps of the longest chunk."""
        return int(self.length.max())

    def on(self, device: torch.device) -> torch.Tensor:
        """The three as rows of one tensor on a device, zeros for no lead."""
        if device not in self._copies:
            lead = np.zeros_like(self.t0) if self.lead is None else self.lead
            rows = np.stack((self.t0, self.length, lead))
            if len(self) == 1:  # filled, not copied: that can be part of a CUDA graph
                self._copies[device] = torch.stack([torch.full((1,), int(n), device=device) for n in rows[:, 0]])
            else:
                self._copies[device] = torch.from_numpy(rows).to(device)
        return self._copies[device]

    def pick(self, which: torch.Tensor) -> Spans:
        """Some of the chunks, with nothing before them."""
        at = which.numpy()
        return Spans(self.t0[at], self.length[at])

    @functools.cached_property
    def apart(self) -> Spans:
        """The chunks with nothing before them."""
        return Spans(self.t0, self.length)

    @functools.cached_property
    def before(self) -> Spans:
        """The steps that lead up to the chunks, and none of their own."""
        return Spans(self.t0, np.zeros_like(self.length), self.lead)


@functools.lru_cache(256)
def cut_evenly(steps: int, chunks: int, warmup: int = 0) -> Spans:
    """Chunks whose lengths differ by at most one step, led up to by `warmup` steps or as many as there are; the first by none."""
    edges = np.arange(chunks + 1, dtype=np.int64) * steps // chunks
    t0 = edges[:-1].copy()
    return Spans(t0, np.diff(edges), np.minimum(t0, warmup) if warmup else None)


@functools.lru_cache(256)
def span(begin: int, length: int) -> Spans:
    """One stretch of time."""
    return Spans(np.array([begin], np.int64), np.array([length], np.int64))


def _address(a: np.ndarray) -> int:
    assert a.dtype == np.int64 and a.flags.c_contiguous
    return int(a.__array_interface__["data"][0])
