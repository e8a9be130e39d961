"""seqparc: any recurrent cell written in plain PyTorch, run in parallel over time, with the answers of the plain loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from seqparc import ode as ode
from seqparc.codegen import openmp as openmp  # is there before anything forks
from seqparc.compiler import check, compile_plan
from seqparc.convention import called
from seqparc.errors import (
    ConvergenceError,
    InternalError,
    SeqparcError,
    SeqparcWarning,
    ShapeError,
    SignatureError,
    StateError,
    ToolchainError,
    TraceError,
    UnsupportedOpError,
)
from seqparc.options import Options
from seqparc.owngrad import Vjp
from seqparc.passes.strategy import choose
from seqparc.plan import Stats
from seqparc.runtime.layers import LAYERS, CompiledLayer, compiled_layer
from seqparc.runtime.layers import convert as _convert
from seqparc.runtime.module import TOOLS, CompiledRNN
from seqparc.version import __version__


def _explain(*args: Any) -> Any:
    from seqparc.explain import explain  # brings what only people's eyes need: SymPy, rich

    return explain(*args)


def _validate(*args: Any) -> Any:
    from seqparc.validate import validate

    return validate(*args)


def _backends(options: Options, device: torch.device) -> list[tuple[str, Any]]:
    """Backends to try, in order."""
    from seqparc.codegen.launch import CKernel
    from seqparc.runtime.cuts import THREADS
    from seqparc.runtime.interpreter import TorchKernel

    asked = options.backend
    if asked == "c" and device.type != "cpu":
        raise ShapeError(f"backend='c' runs on the CPU, x is on {device}")

    def triton(program: Any, dtype: torch.dtype, where: torch.device) -> Any:
        from seqparc.codegen import stepwise

        return stepwise.kernel(program, dtype, where, options.precision)

    threads = THREADS if options.deterministic else None
    made = {"c": lambda program, dtype, where: CKernel(program, dtype, threads), "triton": triton, "torch": TorchKernel}
    first = asked if asked != "auto" else {"cpu": "c", "cuda": "triton"}.get(device.type, "torch")
    return [(name, made[name]) for name in dict.fromkeys((first, "torch"))]


def compile(
    cell: Any, *, state: Any = None, signature: str | None = None, backend: str = "auto", options: Any = None, name: str | None = None
) -> Any:
    """Compile a recurrent cell: `rnn = seqparc.compile(cell)`, then `y, last = rnn(x)` with x [batch, time, ...].

    cell       an nn.Module or a function of one step: cell(x_t, state) or cell(state, x_t), returning the new state or
               (out, new state). On an nn.Module *class*, as a decorator: its instances are then compiled. An nn.RNN, nn.GRU or
               nn.LSTM gives the same layer, called the same way, that runs compiled and shares its parameters
    state      the initial state: an example for one sample, or a callable batch -> state; found out if left away
    signature  how the cell is called, like "x, state -> out, state"; found out if left away
    backend    "c", "torch", or "auto" by device
    options    a seqparc.Options or a dict of its fields
    name       for messages

    The cell and its parameters stay the user's. Tracing happens at the first call for a set of shapes and dtypes; the batch
    size and the number of steps are never part of that. Raises SignatureError, StateError or TraceError where the cell
    cannot be understood; a cell with an operation seqparc does not know runs as the plain loop, with a warning.

    >>> rnn = seqparc.compile(torch.nn.GRUCell(2, 3))
    >>> y, last = rnn(torch.zeros(4, 100, 2))
    >>> y.shape, last.shape
    (torch.Size([4, 100, 3]), torch.Size([4, 3]))
    """
    chosen = _chosen(backend, options)
    if isinstance(cell, type) and issubclass(cell, nn.Module):
        made = cell

        def construct(*args: Any, **kwargs: Any) -> CompiledRNN:
            return compile(made(*args, **kwargs), state=state, signature=signature, options=chosen, name=name or made.__name__)  # type: ignore[no-any-return]

        construct.__name__, construct.__doc__ = made.__name__, made.__doc__
        return construct
    if isinstance(cell, CompiledLayer):
        return cell
    if type(cell) in LAYERS:
        if state is not None or signature is not None:
            raise SignatureError(f"{called(cell)} is called as torch calls it; state= and signature= are for cells")
        return compiled_layer(cell, chosen, in_place=False)
    if not callable(cell):
        raise SignatureError(f"a cell is an nn.Module or a function of one step, not {type(cell).__name__}")
    return CompiledRNN(cell, state=state, signature=signature, options=chosen, name=name)


def convert(model: nn.Module, *, backend: str = "auto", options: Any = None) -> list[str]:
    """Compile every nn.RNN, nn.GRU and nn.LSTM inside a model, in place; returns what was done, a line each.

    The modules stay what they are, with their parameters, their state_dict and their place in the model; only their class becomes
    a subclass that runs compiled. Subclasses of the user's own, whose forward may do more, are left alone.
    """
    return _convert(model, _chosen(backend, options))


def _chosen(backend: str, options: Any) -> Options:
    chosen = Options.of(options)
    return chosen if backend == "auto" else replace(chosen, backend=backend)  # type: ignore[arg-type]


TOOLS.update(
    compile_plan=compile_plan, check=check, adjoint_step=Vjp, backends=_backends, choose=choose, explain=_explain, validate=_validate
)

__all__ = [
    "CompiledRNN",
    "ConvergenceError",
    "InternalError",
    "Options",
    "SeqparcError",
    "SeqparcWarning",
    "ShapeError",
    "SignatureError",
    "StateError",
    "Stats",
    "ToolchainError",
    "TraceError",
    "UnsupportedOpError",
    "__version__",
    "compile",
    "convert",
    "ode",
]  # fmt: skip
