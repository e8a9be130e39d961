"""The least time a run can take on this processor: what its arithmetic and its memory traffic need at the rates that were measured here.

A floor, not a prediction: everything is counted as if it ran at full speed on every thread, and as if a product and a sum always went
together. What a kernel takes beyond that is latency, loop control, moving lanes about, chunks that run again, and Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import time
from dataclasses import asdict, dataclass

import torch

from seqparc import ir, store
from seqparc.codegen import openmp
from seqparc.codegen.build import compiler, load, machine
from seqparc.ir import Program
from seqparc.ops import OPS

#: Operations that cost so many additions and more are functions, counted apart.
FUNCTION = 8
#: A rate is the best of so many tries: what disturbs only makes them slower.
TRIES = 12
#: Rounds of a try, about a millisecond.
ROUNDS = {"multiply": 20_000, "function": 500, "copy": 1, "start": 200}

#: Every function does n rounds on all threads; what they take is timed from outside.
_SOURCE = """\
#define SP_DOUBLE {double}
{simd}
// From cache to cache: twelve chains of multiply-adds, as many as hide the latency of one on two units.
void seqparc_multiply(int64_t n, int threads, real* from, real* to) {{
  #pragma omp parallel num_threads(threads)
  {{
    vf a[12], x = sp_load(from), y = sp_load(from + W);
    SP_UNROLL for (int i = 0; i < 12; i++) a[i] = sp_load(from + i * W);
    for (int64_t k = 0; k < n; k++) SP_UNROLL for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
    #pragma omp critical
    SP_UNROLL for (int i = 0; i < 12; i++) sp_store(to + i * W, a[i]);
  }}
}}

// 1,024 numbers from cache to cache, half of them through exp, half through tanh.
void seqparc_function(int64_t n, int threads, real* from, real* to) {{
  #pragma omp parallel num_threads(threads)
  {{
    real out[1024];
    for (int64_t k = 0; k < n; k++) {{
      for (int64_t i = 0; i < 512; i += W) {{
        sp_store(out + i, sp_exp(sp_load(from + i)));
        sp_store(out + 512 + i, sp_tanh(sp_load(from + 512 + i)));
      }}
      __asm__ volatile("" : : "r"(out) : "memory");
    }}
    #pragma omp critical
    to[0] = out[0] + out[1023];
  }}
}}

// 8 MiB by every thread, which is past most caches.
void seqparc_copy(int64_t n, int threads, real* from, real* to) {{
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < threads; part++)
    for (int64_t k = 0; k < n; k++) __builtin_memcpy((char*)to + part * (8 << 20), (char*)from + part * (8 << 20), 8 << 20);
}}

// Threads that are started, and wait for each other, for nothing.
void seqparc_start(int64_t n, int threads, real* from, real* to) {{
  for (int64_t k = 0; k < n; k++) {{
    #pragma omp parallel num_threads(threads)
    __asm__ volatile("" : : : "memory");
  }}
}}

int seqparc_width(void) {{ return W; }}
"""


@dataclass(frozen=True)
class Rates:
    """What this processor does with all threads: multiply-adds, functions (half exp, half tanh) and bytes read or written a second; and the
    seconds that starting the threads takes.
    """

    multiply: float
    function: float
    bytes: float
    start: float


@dataclass(frozen=True)
class Work:
    """What a step of one sample needs: multiply-adds, functions, and numbers that are read and written."""

    multiply: float
    function: float
    numbers: float


@dataclass(frozen=True)
class Floor:
    """Seconds that a run takes at least, and what takes most of them."""

    seconds: float
    unit: str


@functools.lru_cache(16)
def rates(dtype: torch.dtype, threads: int) -> Rates:
    """Measured once a process, in a tenth of a second. The best that was ever seen on this machine counts, and is remembered: other work
    beside it makes everything slower.
    """
    about, now = f"{compiler()} {machine()} {dtype} {threads}", _measured(dtype, threads)
    before = store.recall("rates", about)
    if before is not None:
        now = Rates(
            max(now.multiply, before["multiply"]), max(now.function, before["function"]), max(now.bytes, before["bytes"]),
            min(now.start, before["start"]),
        )  # fmt: skip
    store.keep("rates", about, asdict(now))
    return now


def _measured(dtype: torch.dtype, threads: int) -> Rates:
    simd = importlib.resources.files("seqparc.codegen").joinpath("simd.h").read_text("utf-8")
    library = load(_SOURCE.format(double=int(dtype is torch.float64), simd=simd), symbols=tuple(f"seqparc_{name}" for name in ROUNDS))
    openmp.runs_on(library)
    given, made = (torch.linspace(-2, 2, threads << 20, dtype=torch.float64).to(dtype).repeat(8 // dtype.itemsize) for _ in range(2))

    def best(name: str, team: int) -> float:
        """Rounds a second of all threads of a team together."""
        function = getattr(library, f"seqparc_{name}")
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p], None
        times = []
        for _ in range(TRIES):
            begin = time.perf_counter()
            function(ROUNDS[name], team, given.data_ptr(), made.data_ptr())
            times.append(time.perf_counter() - begin)
        return team * ROUNDS[name] / min(times)

    # Threads that wait for one that has no core are slower together than alone, and say nothing about the processor.
    multiply, function, copy = (max(best(name, team) for team in {1, threads}) for name in ("multiply", "function", "copy"))
    return Rates(12 * library.seqparc_width() * multiply, 1024 * function, 2 * (8 << 20) * copy, threads / best("start", threads))


def work(program: Program) -> Work:
    """Counted from a program. A cheap operation is half a multiply-add: at best every product has a sum beside it."""
    multiply = function = 0.0
    for v in ir.topological(program.outputs):
        match v:
            case ir.Map(op=op) if OPS[op].cost >= FUNCTION:
                function += v.size
            case ir.Map(op=op):
                multiply += v.size * OPS[op].cost / 2
            case ir.Contract(ia=ia):
                multiply += int((ia.array >= 0).sum())
            case ir.Reduce(index=index):
                multiply += index.array.size / 2
    read = {slot for v in ir.leaves(program.outputs, "stream") for slot in [v.slot]}
    written = {s.slot for s in program.emits}
    numbers = sum(program.stream_sizes[s] for s in read) + sum(program.emit_sizes[s] for s in written)
    return Work(program.lanes * multiply, program.lanes * function, numbers)


def floor(program: Program, dtype: torch.dtype, batch: int, steps: int, threads: int, more: float = 0.0) -> Floor:
    """Of a run of a program over all its steps. Arithmetic of either kind takes turns on the same units; memory is read beside it.

    more: multiply-adds a step and sample that are done outside the kernel.
    """
    rate, need, times = rates(dtype, threads), work(program), batch * steps
    seconds = {
        "multiply-adds": times * (need.multiply + more) / rate.multiply, "functions": times * need.function / rate.function,
        "memory": times * need.numbers * dtype.itemsize / rate.bytes,
    }  # fmt: skip
    whole = max(seconds["multiply-adds"] + seconds["functions"], seconds["memory"])
    return Floor(whole, max(seconds, key=lambda unit: seconds[unit]))
