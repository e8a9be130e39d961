"""The GPU that kernels run on, and how generated modules and index arrays get to it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqparc import store
from seqparc.codegen.launcher import interpreted
from seqparc.errors import ToolchainError

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


def load(text: str) -> tuple[ModuleType, Path]:
    """The module of a generated text, which Triton wants to read from a file, and where that lies."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ToolchainError("Triton is not installed; GPU kernels need it: pip install triton") from error
    name = f"seqparc_generated_{hashlib.sha256(text.encode()).hexdigest()[:24]}{'_interpreted' if interpreted() else ''}"
    path = store.folder() / f"{name}.py"
    if name not in sys.modules:
        if not path.exists() or path.read_text() != text:
            made = path.with_suffix(f".{os.getpid()}")
            made.write_text(text)
            os.replace(made, path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name], path
