"""The same cells by jax.lax.scan, jitted, where jax is installed: what depends on x alone is made before the scan, for all steps at once,
and of several unrollings the best is taken, for each direction.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import ElementwiseGRU
from torch import Tensor, nn

#: Steps that are tried as one round of the loop.
UNROLLS = (1, 4, 16)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Scan:
    """Calls that return when the results are there, and what was found out on the way."""

    forward: Call
    both: Call
    compile_s: float  # of the two that were taken
    note: str

    @staticmethod
    def read(y: Any) -> Tensor:
        return torch.from_numpy(np.array(y))


# A cell is (what is made of x [steps, batch, inputs] and the weights before, the step: weights, state, that -> state).


def _elementwise(w: Any, h: Any, x: Any) -> Any:
    from jax import nn as jnn
    from jax import numpy as jnp

    z, r, n = jnp.split(x, 3, -1)
    z, r = jnn.sigmoid(z + w["u"][0] * h), jnn.sigmoid(r + w["u"][1] * h)
    n = jnp.tanh(n + w["u"][2] * (r * h))
    return n + z * (h - n)


def _product(w: Any, x: Any) -> Any:
    return x @ w["weight_ih"].T + w["bias_ih"]


def _rnn(w: Any, h: Any, a: Any) -> Any:
    from jax import numpy as jnp

    return jnp.tanh(a + h @ w["weight_hh"].T + w["bias_hh"])


def _gru(w: Any, h: Any, a: Any) -> Any:
    from jax import nn as jnn
    from jax import numpy as jnp

    (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(h @ w["weight_hh"].T + w["bias_hh"], 3, -1)
    r, z = jnn.sigmoid(ar + br), jnn.sigmoid(az + bz)
    n = jnp.tanh(an + r * bn)
    return n + z * (h - n)


def _lstm(w: Any, state: Any, a: Any) -> Any:
    from jax import nn as jnn
    from jax import numpy as jnp

    h, c = state
    i, f, g, o = jnp.split(a + h @ w["weight_hh"].T + w["bias_hh"], 4, -1)
    c = jnn.sigmoid(f) * c + jnn.sigmoid(i) * jnp.tanh(g)
    return jnn.sigmoid(o) * jnp.tanh(c), c


CELLS: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {
    ElementwiseGRU: (lambda w, x: x, _elementwise),
    nn.RNNCell: (_product, _rnn),
    nn.GRUCell: (_product, _gru),
    nn.LSTMCell: (_product, _lstm),
}


def scan(cell: Any, x: Tensor) -> Scan | None:
    """The cell over x [batch, steps, inputs] from zeros; None where jax is not installed or the cell is none of these."""
    if type(cell) not in CELLS or importlib.util.find_spec("jax") is None:
        return None
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # the threads of XLA on a processor, if it has not begun yet
    import jax
    from jax import numpy as jnp

    before, step = CELLS[type(cell)]
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in cell.named_parameters()}
    given = jnp.asarray(x.numpy())
    h = jnp.zeros((len(x), cell.hidden_size))
    start = (h, h) if isinstance(cell, nn.LSTMCell) else h

    def run(weights: Any, x: Any, unroll: int) -> Any:
        def body(state: Any, a: Any) -> Any:
            state = step(weights, state, a)
            return state, state[0] if isinstance(state, tuple) else state

        return jax.lax.scan(body, start, before(weights, x.swapaxes(0, 1)), unroll=unroll)[1].swapaxes(0, 1)

    def both(weights: Any, x: Any, unroll: int) -> Any:
        y, back = jax.vjp(functools.partial(run, unroll=unroll), weights, x)
        return back(jnp.ones_like(y))

    found = [_best(f, weights, given) for f in (run, both)]
    note = f"unroll {found[0][0]}, {found[1][0]} with gradients"
    return Scan(found[0][1], found[1][1], sum(seconds for _, _, seconds in found), note)


def _best(f: Callable[..., Any], weights: Any, x: Any) -> tuple[int, Call, float]:
    """Of all unrollings the one that is fastest in the better of two calls: it, its call, and the seconds that it took to compile."""
    import jax

    tried = []
    for unroll in UNROLLS:
        begin = time.perf_counter()
        made = jax.jit(functools.partial(f, unroll=unroll)).lower(weights, x).compile()
        compiled = time.perf_counter() - begin
        call = functools.partial(_wait, made, weights, x)
        times: list[float] = []
        while len(times) < 2 and sum(times) < 1:  # seconds
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        tried.append((min(times), unroll, call, compiled))
    _, unroll, call, compiled = min(tried, key=lambda t: t[0])
    return unroll, call, compiled


def _wait(made: Any, weights: Any, x: Any) -> Any:
    import jax

    return jax.block_until_ready(made(weights, x))
