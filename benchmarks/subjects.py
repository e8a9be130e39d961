"""The systems that are compared: name -> what runs a case, on the same weights and the same x."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import baselines
import jaxscan
import numbaloops
import torch
from cases import Case, ElementwiseGRU
from torch import Tensor, nn

import seqparc

Call = Callable[[], Any]

#: Loops in Python are run over so many steps at most, of the cell and of what torch.compile makes of a step, which is rarely faster and
#: never as fast as of many steps; the times of more are scaled, and the row says so.
STEPS, COMPILED_STEPS = 20_000, 4_096
#: Steps that torch.compile is given at once, forward and with gradients: 32 with gradients take it up to a minute to compile.
CHUNK = (32, 4)


@dataclass
class Subject:
    """One system on one case."""

    name: str
    forward: Call
    both: Call | None  # forward, and the gradients of x and of every parameter
    read: Callable[[Any], Tensor]  # what forward returns -> outputs [batch, steps, numbers]
    compile_s: float | None = None  # of both directions; None where it does not compile, or knows only after the calls
    once: bool = False  # it is so slow that one call of each direction must do
    scale: float = 1.0  # by which the times of a call are multiplied
    note: str = ""
    rnn: seqparc.CompiledRNN | None = None


def first(result: Any) -> Tensor:
    """The outputs of a layer or compiled cell; of a pair of states the first."""
    y = result[0]
    return y if isinstance(y, Tensor) else y[0]


def of_torch(name: str, module: nn.Module, call: Callable[[Tensor], Any], x: Tensor, backward: bool = True, **more: Any) -> Subject:
    """A subject of what is called like a layer and trained by autograd."""
    given, weights = x.clone().requires_grad_(), list(module.parameters())

    def forward() -> Any:
        with torch.no_grad():
            return call(x)

    def both() -> Any:
        y = first(call(given))
        return torch.autograd.grad(y, [given, *weights], torch.ones_like(y))

    return Subject(name, forward, both if backward else None, first, **more)


# -- loops over the cell in Python -----------------------------------------------------------------------------------


def _over(step: Callable[[Tensor, Any], Any], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    rows = []
    for x_t in x.unbind(1):
        state = step(x_t, state)
        rows.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(rows, 1), state


def _zeros(cell: Any, batch: int) -> Any:
    h, c = (torch.zeros(batch, cell.hidden_size) for _ in range(2))
    return (h, c) if isinstance(cell, nn.LSTMCell) else h


def _looped(name: str, cell: nn.Module, step: Callable[[Tensor, Any], Any], x: Tensor, most: int) -> tuple[Subject, float]:
    """A loop of Python, over the first steps only where there are too many; and the seconds that two steps take the first time."""

    def call(x: Tensor) -> tuple[Tensor, Any]:
        return _over(step, x, _zeros(cell, len(x)))

    short, steps = of_torch(name, cell, call, x[:, :2]), min(x.shape[1], most)
    assert short.both is not None
    begin = time.perf_counter()
    short.forward(), short.both()
    seconds = time.perf_counter() - begin
    note = f"{steps:,} of the steps, scaled" if steps < x.shape[1] else ""
    return of_torch(name, cell, call, x[:, :steps], once=True, scale=x.shape[1] / steps, note=note), seconds


def _eager(name: str, case: Case, cell: Any, x: Tensor) -> Subject:
    return _looped(name, cell, cell, x, STEPS)[0]


def _compiled_step(name: str, case: Case, cell: Any, x: Tensor) -> Subject:
    """One step of the cell by torch.compile, in a loop."""
    made, made.compile_s = _looped(name, cell, compiled(cell), x, COMPILED_STEPS)
    return made


def _compiled_chunk(name: str, case: Case, cell: Any, x: Tensor) -> Subject:
    """Many steps of the cell at once by torch.compile, in a loop."""
    chunk = compiled(functools.partial(_over, cell))

    def call(x: Tensor) -> tuple[Tensor, Any]:
        grad, state, rows = torch.is_grad_enabled(), _zeros(cell, len(x)), []
        for s in state if isinstance(state, tuple) else (state,):
            s.requires_grad_(grad)  # as those of later chunks do: else the first would be compiled for apart
        for part in x.split(CHUNK[grad], 1):
            y, state = chunk(part, state)
            rows.append(y)
        return torch.cat(rows, 1), state

    note = f"{CHUNK[False]} steps at once, {CHUNK[True]} with gradients"
    whole, given = of_torch(name, cell, call, x, note=note), x.clone().requires_grad_()
    begin = time.perf_counter()
    with torch.no_grad():
        call(x[:, : 2 * CHUNK[False]])
    torch.autograd.grad(call(given[:, : 2 * CHUNK[True]])[0].sum(), given)
    whole.compile_s = time.perf_counter() - begin
    return whole


@functools.cache
def _warm() -> None:
    """torch.compile begins with an empty cache, and what it imports and prepares the first time in a process counts for no case."""
    folder = tempfile.mkdtemp(prefix="torchinductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    x = torch.zeros(2, requires_grad=True)
    torch.compile(lambda x: x.sin().cos())(x).sum().backward()


def compiled(f: Any) -> Any:
    """By torch.compile, in one graph, for these shapes."""
    _warm()
    return torch.compile(f, fullgraph=True, dynamic=False)


# -- layers and kernels ----------------------------------------------------------------------------------------------


def _layer(name: str, case: Case, cell: Any, x: Tensor) -> Subject | None:
    if case.builtin is None:
        return None
    layer = case.builtin(cell)
    return of_torch(getattr(layer, "label", name), layer, layer, x)


HAND: dict[type, Callable[[Any, Tensor], Tensor]] = {
    ElementwiseGRU: lambda cell, x: baselines.elementwise_gru(x, cell.u.detach(), torch.zeros(len(x), cell.hidden_size))[0],
    nn.RNNCell: baselines.dense, nn.GRUCell: baselines.dense, nn.LSTMCell: baselines.dense,
}  # fmt: skip


def _hand(name: str, case: Case, cell: Any, x: Tensor) -> Subject | None:
    loop = HAND.get(type(cell))
    if loop is None:
        return None
    begin = time.perf_counter()
    loop(cell, x[:, :1].contiguous())
    return of_torch(name, cell, lambda x: (loop(cell, x),), x, backward=False, compile_s=time.perf_counter() - begin)


def _jax(name: str, case: Case, cell: Any, x: Tensor) -> Subject | None:
    made = jaxscan.scan(cell, x)
    return None if made is None else Subject(name, made.forward, made.both, made.read, made.compile_s, note=made.note)


def _numba(name: str, case: Case, cell: Any, x: Tensor) -> Subject | None:
    made = numbaloops.loop(cell, x)
    return None if made is None else Subject(name, made.forward, None, torch.from_numpy, made.compile_s)


def _ours(strategy: str, name: str, case: Case, cell: Any, x: Tensor) -> Subject:
    rnn = seqparc.compile(cell, options={"strategy": strategy})
    return of_torch(name, rnn, rnn, x, rnn=rnn)


#: Name -> (name, case, cell, x) -> the subject, or None where it cannot run the case or is not installed.
Make = Callable[[str, Case, Any, Tensor], Subject | None]
SYSTEMS: dict[str, Make] = {
    "eager loop": _eager,
    "torch.compile, step": _compiled_step,
    "torch.compile, chunk": _compiled_chunk,
    "torch built-in": _layer,
    "jax.lax.scan": _jax,
    "numba": _numba,
    "C loop": _hand,
    "seqparc sequential": functools.partial(_ours, "sequential"),
    "seqparc": functools.partial(_ours, "auto"),
}
#: What takes so long to compile that a quick look leaves it out.
SLOW = ("torch.compile, step", "torch.compile, chunk")
