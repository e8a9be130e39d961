"""The same cells as hand-written loops in numba, where it is installed: forward only, everything fused, a tanh of its own.

What an elementwise cell reads in a step lies in one array of a size known when it is compiled: LLVM then sees that nothing overlaps, and
vectorises. Loops over several arrays took 1.3 to 4 times as long; products by np.dot, which calls BLAS, twice as long as those here.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import ElementwiseGRU
from torch import Tensor, nn

F = np.float32
HALF, LIMIT = F(0.5), F(7.90531110763549805)
#: tanh(x) = x p(x²) / q(x²) up to LIMIT, where it is 1: the coefficients that Eigen and XLA use.
P = tuple(map(F, (4.89352455891786e-3, 6.37261928875436e-4, 1.48572235717979e-5, 5.12229709037114e-8, -8.60467152213735e-11,
                  2.00018790482477e-13, -2.76076847742355e-16)))  # fmt: skip
Q = tuple(map(F, (4.89352518554385e-3, 2.26843463243900e-3, 1.18534705686654e-4, 1.19825839466702e-6)))


@dataclass(frozen=True)
class Loop:
    forward: Callable[[], Any]
    compile_s: float


def loop(cell: Any, x: Tensor) -> Loop | None:
    """The cell over x [batch, steps, inputs] from zeros; None where numba is not installed or the cell is none of these."""
    if importlib.util.find_spec("numba") is None or type(cell) not in (ElementwiseGRU, *GATES):
        return None
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    d, batch, threads = cell.hidden_size, len(x), torch.get_num_threads()
    if isinstance(cell, ElementwiseGRU):
        tiles = next(n for n in range(1, d + 1) if d % n == 0 and (n * batch >= threads or d // n <= 16 or n == d))
        run, weights = _elementwise(d // tiles, tiles, batch * tiles > 1), [cell.u]
    else:
        run = _dense(GATES[type(cell)], x.shape[2], d, batch > 1)
        weights = [cell.weight_ih.t(), cell.weight_hh.t(), cell.bias_ih, cell.bias_hh]
    given = [np.ascontiguousarray(w.detach().numpy()) for w in weights]
    inputs = x.numpy()

    def forward() -> Any:
        y = np.empty((*inputs.shape[:2], d), F)
        run(inputs, *given, y)
        return y

    begin = time.perf_counter()
    run(np.ascontiguousarray(inputs[:, :2]), *given, np.empty((batch, 2, d), F))
    return Loop(forward, time.perf_counter() - begin)


@functools.cache
def _tools() -> tuple[Any, Any, Any]:
    """How loops are compiled, tanh and the logistic function."""
    import numba

    jit = functools.partial(numba.njit, fastmath=True, error_model="numpy")
    p0, p1, p2, p3, p4, p5, p6 = P
    q0, q1, q2, q3 = Q

    @jit
    def tanh(x: Any) -> Any:
        x = min(max(x, -LIMIT), LIMIT)
        s = x * x
        t = s * s
        top = (p0 + p1 * s) + t * (p2 + p3 * s) + t * t * ((p4 + p5 * s) + t * p6)
        return x * top / ((q0 + q1 * s) + t * (q2 + q3 * s))

    @jit
    def sigmoid(x: Any) -> Any:
        return HALF + HALF * tanh(HALF * x)

    return jit, tanh, sigmoid


def _elementwise(width: int, tiles: int, parallel: bool) -> Any:
    """A loop over tiles of so many channels."""
    import numba

    jit, tanh, sigmoid = _tools()

    @jit(parallel=parallel)
    def run(x: Any, u: Any, y: Any) -> None:
        d = width * tiles
        for p in numba.prange(x.shape[0] * tiles):
            b, c = p // tiles, p % tiles * width
            s = np.zeros((7, width), F)  # the state, the weights of three gates, their inputs
            for g in range(3):
                for i in range(width):
                    s[1 + g, i] = u[g, c + i]
            for t in range(x.shape[1]):
                for g in range(3):
                    for i in range(width):
                        s[4 + g, i] = x[b, t, g * d + c + i]
                for i in range(width):
                    h = s[0, i]
                    z, r = sigmoid(s[4, i] + s[1, i] * h), sigmoid(s[5, i] + s[2, i] * h)
                    n = tanh(s[6, i] + s[3, i] * (r * h))
                    s[0, i] = n + z * (h - n)
                for i in range(width):
                    y[b, t, c + i] = s[0, i]

    return run


# What dense cells of d units make of a, the sums of x, and b, those of h: the next h and, of an LSTM, c.


def _rnn(d: int) -> Any:
    jit, tanh, _ = _tools()

    @jit
    def gates(h: Any, c: Any, a: Any, b: Any) -> None:
        for i in range(d):
            h[i] = tanh(a[i] + b[i])

    return gates


def _gru(d: int) -> Any:
    jit, tanh, sigmoid = _tools()

    @jit
    def gates(h: Any, c: Any, a: Any, b: Any) -> None:
        for i in range(d):
            r, z = sigmoid(a[i] + b[i]), sigmoid(a[d + i] + b[d + i])
            n = tanh(a[2 * d + i] + r * b[2 * d + i])
            h[i] = n + z * (h[i] - n)

    return gates


def _lstm(d: int) -> Any:
    jit, tanh, sigmoid = _tools()

    @jit
    def gates(h: Any, c: Any, a: Any, b: Any) -> None:
        for i in range(d):
            enter, forget = sigmoid(a[i] + b[i]), sigmoid(a[d + i] + b[d + i])
            n, out = tanh(a[2 * d + i] + b[2 * d + i]), sigmoid(a[3 * d + i] + b[3 * d + i])
            c[i] = forget * c[i] + enter * n
            h[i] = out * tanh(c[i])

    return gates


GATES: dict[type, tuple[Callable[[int], Any], int]] = {nn.RNNCell: (_rnn, 1), nn.GRUCell: (_gru, 3), nn.LSTMCell: (_lstm, 4)}


def _dense(kind: tuple[Callable[[int], Any], int], inputs: int, d: int, parallel: bool) -> Any:
    """A loop for one size: inputs and d in whole eights, which are added to the sums together."""
    import numba

    assert inputs % 8 == d % 8 == 0
    jit, _, _ = _tools()
    gates, wide = kind[0](d), kind[1] * d

    @jit(forceinline=True)
    def product(to: Any, bias: Any, v: Any, w: Any, count: int) -> None:
        for j in range(wide):
            to[j] = bias[j]
        for k in range(0, count, 8):
            v0, v1, v2, v3, v4, v5, v6, v7 = v[k], v[k + 1], v[k + 2], v[k + 3], v[k + 4], v[k + 5], v[k + 6], v[k + 7]
            for j in range(wide):
                low = (v0 * w[k, j] + v1 * w[k + 1, j]) + (v2 * w[k + 2, j] + v3 * w[k + 3, j])
                to[j] += low + ((v4 * w[k + 4, j] + v5 * w[k + 5, j]) + (v6 * w[k + 6, j] + v7 * w[k + 7, j]))

    @jit(parallel=parallel)
    def run(x: Any, wx: Any, wh: Any, bx: Any, bh: Any, y: Any) -> None:
        for n in numba.prange(x.shape[0]):
            h, c, a, b = np.zeros(d, F), np.zeros(d, F), np.zeros(wide, F), np.zeros(wide, F)
            for t in range(x.shape[1]):
                product(a, bx, x[n, t], wx, inputs)
                product(b, bh, h, wh, d)
                gates(h, c, a, b)
                for i in range(d):
                    y[n, t, i] = h[i]

    return run
