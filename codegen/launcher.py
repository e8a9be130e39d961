"""Launches of a Triton kernel. Past the first of its kind one goes to the compiled kernel itself: finding out what to compile takes longer
than many a kernel runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

#: What a product and a sum become together must not depend on Triton's version.
OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether Triton kernels run as Python, by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Launcher:
    """A kernel whose code depends on nothing but its constants, the types of its pointers and which of them are None."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.made: dict[Any, Any] = {}

    def __call__(self, programs: int, args: Sequence[Any], constants: dict[str, Any], warps: int) -> None:
        """Launch so many programs, on the device of the first argument. `constants` are the last parameters, in order."""
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(programs, args, constants, warps)
        kinds = tuple([a if a is None else a.dtype if isinstance(a, torch.Tensor) else 0 for a in args])
        key = (kinds, *constants.values(), warps, device)
        compiled = self.made.get(key)
        if compiled is None:
            self.made[key] = self.function[(programs,)](*args, **constants, num_warps=warps, **OPTIONS)
        else:
            compiled[(programs, 1, 1)](*args, *constants.values())
