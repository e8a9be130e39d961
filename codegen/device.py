"""The GPU that kernels run on, and how generated modules and index arrays get to it."""

from __future__ import annotations

import hashlib
import linecache
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqparc import store
from seqparc.codegen.launcher import interpreted
from seqparc.errors import ToolchainError
from seqparc.locks import Lock

_loading = Lock()
#: Lanes of one number that a multiprocessor is to be given.
RESIDENT = 2048


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_chip(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return 227 * 1024
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def on_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """An array, flat, where kernels read it."""
    return torch.from_numpy(np.array(array).reshape(-1)).to(device, dtype)


def check(device: torch.device) -> None:
    """Raises `ToolchainError` where Triton's kernels do not run."""
    if device.type != "cuda" and not interpreted():
        raise ToolchainError(f"Triton kernels run on a GPU, x is on {device}; TRITON_INTERPRET=1 runs them as Python, very slowly")


def load(text: str) -> ModuleType:
    """The module of a generated text.

    Triton wants to read a kernel's lines: they are where Python looks up those of any function, and in a file beside for people. What
    runs is the text, never what is found in a file.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ToolchainError("Triton is not installed; GPU kernels need it: pip install triton") from error
    name = f"seqparc_generated_{hashlib.sha256(text.encode()).hexdigest()[:24]}{'_interpreted' if interpreted() else ''}"
    with _loading():
        if name not in sys.modules:
            file = f"{name}.py"
            try:
                path = store.folder() / file
                store.write(path, text.encode())
                file = str(path)
            except OSError as error:
                store.unkept(error)
            linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
            module = ModuleType(name)
            module.__file__ = file
            sys.modules[name] = module
            try:
                exec(compile(text, file, "exec"), module.__dict__)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
