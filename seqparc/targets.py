"""What the command line names: a cell as `module:object`, and shapes of inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import seqparc
from seqparc.errors import SeqparcError
from seqparc.runtime.module import CompiledRNN


def load(target: str) -> CompiledRNN:
    """The compiled cell that `module:object` names: a cell, a compiled cell, or a zero-argument callable that returns one."""
    name, colon, attribute = target.partition(":")
    if not colon or not name or not attribute:
        raise SeqparcError(f"{target!r} is not of the form module:object")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ImportError as error:
        raise SeqparcError(f"the module {name!r} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SeqparcError(f"{name} has no {attribute!r}; it has {', '.join(n for n in dir(found) if not n.startswith('_'))}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            made = found()
        except TypeError as error:
            if isinstance(found, type):
                raise SeqparcError(f"{target} needs arguments ({error}); name a function without any that returns the cell") from error
            made = found  # it wants arguments: a cell of its own
        found = made if isinstance(made, nn.Module) or callable(made) else found
    return found if isinstance(found, CompiledRNN) else seqparc.compile(found)


def inputs(shapes: Sequence[str], rnn: CompiledRNN) -> Any:
    """Random inputs of the given shapes, in the cell's own dtype; several make a tuple."""
    dtype = next((p.dtype for p in rnn.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())
    generator = torch.Generator().manual_seed(0)
    made = []
    for text in shapes:
        try:
            shape = [int(n) for n in text.split(",")]
        except ValueError:
            raise SeqparcError(f"--input {text!r} is not a shape such as 2,64,6") from None
        if len(shape) < 2 or min(shape) < 1:
            raise SeqparcError(f"--input {text!r} needs the batch and the number of steps first, as in 2,64,6, and nothing that is empty")
        made.append(torch.randn(shape, generator=generator).to(dtype))
    return made[0] if len(made) == 1 else tuple(made)
