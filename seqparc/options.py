"""What can be asked for, and the few environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Strategy = Literal["auto", "sequential", "shooting", "newton"]
Backend = Literal["auto", "triton", "c", "torch"]
Update = Literal["auto", "none", "diagonal", "exact"]

_CHOICES = {
    "strategy": ("auto", "sequential", "shooting", "newton"),
    "backend": ("auto", "triton", "c", "torch"),
    "update": ("auto", "none", "diagonal", "exact"),
    "on_divergence": ("sequential", "raise", "warn"),
    "precision": ("ieee", "tf32x3", "tf32"),
    "save": ("recompute", "store"),
}


@dataclass(frozen=True)
class Options:
    """How a compiled cell runs.

    strategy        "sequential" (one chunk), "shooting" (chunks), "newton" (chunks of one step: DEER), or "auto"
    chunks          number of chunks for "shooting"; None: chosen
    warmup          steps run before a chunk to guess its start state; None: chosen, and adapted from run to run
    update          correction of the chunk start states between passes: "none" (Picard), "diagonal" (quasi-Newton), "exact" (Newton),
                    or "auto": none, and where the gap then falls slowly one that it takes
    atol, rtol      a chunk start state has converged when it moves by at most rtol * size + atol * most, size being how large that number
                    was in the last few steps, most how large it ever was before; None: by dtype
    max_passes      passes before the sequential kernel finishes the run; None: as long as a pass is expected to pay
    on_divergence   when the passes do not converge: "sequential" finishes exactly, "warn" also warns, "raise" raises
    backend         "c", "torch", "triton", or "auto" by device
    tune            on a GPU, try tiles, warps and chunk lengths out once a cell settles, and remember on disk which were fastest; each
                    takes seconds to compile. What was found before is used either way
    deterministic   nothing adapts from run to run, nothing depends on the number of threads
    precision       of float32 contractions on a GPU
    save            what forward keeps for backward: "recompute" the states only, and backward computes the values of each step anew;
                    "store" also what is costly of those (products with the state, exp, tanh and their like): quicker where arithmetic
                    and not memory is what a step waits for, and larger by as many numbers a step as `rnn.explain(x)` says.
                    Under transforms of torch.func, in graphs of torch.compile and torch.export, and for cells that bring a gradient
                    of their own or run by calls of the cell, it is "recompute" whatever is asked for

    Raises ValueError for a value that is none of these, TypeError for an option that there is not.

    >>> seqparc.Options(strategy="shooting", chunks=8).chunks
    8
    >>> seqparc.Options(strategy="fast")
    Traceback (most recent call last):
    ValueError: Options.strategy is 'fast'; choose one of 'auto', 'sequential', 'shooting', 'newton'
    """

    strategy: Strategy = "auto"
    chunks: int | None = None
    warmup: int | None = None
    update: Update = "auto"
    atol: float | None = None
    rtol: float | None = None
    max_passes: int | None = None
    on_divergence: Literal["sequential", "raise", "warn"] = "sequential"
    backend: Backend = "auto"
    tune: bool = False
    deterministic: bool = False
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee"
    save: Literal["recompute", "store"] = "recompute"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Options.{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}")
        for name, least in (("chunks", 1), ("warmup", 0), ("max_passes", 1), ("atol", 0), ("rtol", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Options.{name} is {value!r}; it must be at least {least}")

    @classmethod
    def of(cls, options: Options | dict[str, Any] | None) -> Options:
        """Options from themselves, a dict of fields, or None."""
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if isinstance(options, dict):
            known = {f.name for f in fields(cls)}
            unknown = sorted(set(options) - known)
            if unknown:
                raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
            return replace(cls(), **options)
        raise TypeError(f"options must be a seqparc.Options, a dict or None, not {type(options).__name__}")


#: name -> (default, meaning). The only variables seqparc reads, besides CC.
ENVIRONMENT = {
    "SEQPARC_CACHE": (None, "folder of generated sources, objects and plans (default: the user's cache folder)"),
    "CC": (None, "the C compiler, with arguments if need be (default: the first of cc, gcc, clang)"),
    "SEQPARC_VERIFY": ("0", "1 runs the IR verifier after every pass"),
}


def environment(name: str) -> str | None:
    """The value of a declared environment variable, or its default."""
    default, _ = ENVIRONMENT[name]
    return os.environ.get(name, default)
