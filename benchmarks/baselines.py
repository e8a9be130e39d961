"""The hand-written C loops of baselines.c, callable on torch tensors."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqparc.codegen.build import compiler

FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-w",
)  # fmt: skip


@functools.cache
def library(inputs: int = 0, units: int = 0) -> ctypes.CDLL:
    """The loops, compiled for this machine with the compiler seqparc uses; of dense cells those of one size."""
    header = importlib.resources.files("seqparc.codegen").joinpath("simd.h").read_text()
    sizes = f"#define INPUTS {inputs}\n#define UNITS {units}\n" * bool(units)
    text = "#define SP_DOUBLE 0\n" + sizes + header + Path(__file__).with_name("baselines.c").read_text()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "baselines.c"), Path(folder, "baselines.so")
        source.write_text(text)
        subprocess.run([*compiler()[0], *FLAGS, str(source), "-o", str(made), "-lm"], check=True)
        return ctypes.CDLL(str(made))


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(t.is_contiguous() and t.dtype is torch.float32 for t in tensors)
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def elementwise_gru(x: Tensor, u: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """x [batch, steps, 3 d], u [3, d], h0 [batch, d] -> (y [batch, steps, d], last [batch, d])."""
    batch, steps, wide = x.shape
    y, last = x.new_empty(batch, steps, wide // 3), torch.empty_like(h0)
    sizes = [ctypes.c_int64(n) for n in (batch, steps, wide // 3)]
    library().elementwise_gru(*_pointers(x, u, h0, y, last), *sizes, ctypes.c_int(torch.get_num_threads()))
    return y, last


def dense(cell: Any, x: Tensor) -> Tensor:
    """A cell of torch's over x [batch, steps, inputs] from zeros -> y [batch, steps, units]; these are whole fours and whole vectors."""
    name = {nn.RNNCell: "rnn", nn.GRUCell: "gru", nn.LSTMCell: "lstm"}[type(cell)]
    weights = (cell.weight_ih.t().contiguous(), cell.weight_hh.t().contiguous(), cell.bias_ih, cell.bias_hh)
    batch, steps, inputs = x.shape
    y = x.new_empty(batch, steps, cell.hidden_size)
    sizes = ctypes.c_int64(batch), ctypes.c_int64(steps), ctypes.c_int(torch.get_num_threads())
    getattr(library(inputs, cell.hidden_size), f"dense_{name}")(*_pointers(x, *weights, y), *sizes)
    return y
