"""No kernel reads or writes outside its tensors: every tensor lies against a page that may not be touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import itertools
import ctypes, mmap, sys
import numpy as np
import torch
from seqparc.codegen.launch import CKernel
from seqparc.spans import Spans
from tests.test_passes import plan

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []


def guarded(*shape, at_end):
    "A tensor of zeros, its last (or first) byte next to a page without access."
    size = 8 * int(np.prod(shape))
    pages = -(-size // PAGE)
    room = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    whole = torch.frombuffer(room, dtype=torch.uint8)
    first = PAGE + (pages * PAGE - size if at_end else 0)
    for page in (0, pages + 1):
        assert libc.mprotect(address + page * PAGE, PAGE, 0) == 0
    kept.append(room)
    return whole[first : first + size].view(torch.float64).view(shape)


steps = 23
p = plan(sys.argv[1])
for program in (p.program, p.adjoint().program):
    kernel = CKernel(program, torch.float64)
    n, written = sum(program.state_sizes), {s.slot for s in program.emits}
    params = kernel.prepare([torch.rand(s, dtype=torch.float64) for s in program.param_sizes], [])[0]
    no_emits, no_sums = [None] * len(program.emit_sizes), [None] * len(program.sum_sizes)
    for at_end, few in itertools.product((False, True), (False, True)[: 1 + (kernel.compiled.few is not None)]):
        kernel.few = lambda lanes: few
        for backwards in (False, True):
            for chunks, batch, warmup in ((1, 1, 0), (3, 1, 4), (5, 2, 9), (23, 1, 2), (4, 3, 23)):
                edges = np.arange(chunks + 1) * steps // chunks
                t0, length = edges[:-1].astype(np.int64), np.diff(edges).astype(np.int64)
                states = [guarded(chunks, batch, n, at_end=at_end) for _ in range(4)]
                streams = [guarded(batch, steps, s, at_end=at_end) for s in program.stream_sizes]
                emits = [guarded(batch, steps, s, at_end=at_end) if i in written else None for i, s in enumerate(program.emit_sizes)]
                sums = [guarded(chunks, batch, s, at_end=at_end) for s in program.sum_sizes]
                lead = np.minimum(t0, warmup)
                kernel.sweep(Spans(t0, length, lead), states[0], streams, params, emits, sums, backwards, states[1], states[2])
                kernel.gap(states[0], states[3], states[2], 0.0, 1.0)
                kernel.sweep(Spans(t0, length, lead).before, states[0], streams, params, no_emits, no_sums, backwards, states[1])
                kernel.sweep(Spans(t0, length), states[0][0] if at_end else states[0][-1], streams, params, emits, sums, backwards)
                some = np.unique([0, chunks - 1])
                kernel.sweep(Spans(t0[some], length[some]), states[0][: len(some)], streams, params, emits, no_sums, backwards)
print("untouched")
"""


@pytest.mark.parametrize("name", ["elementwise GRU", "layer norm GRU", "GRU", "two levels", "RNN relu"])
def test_kernels_stay_inside(name: str) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", SCRIPT, name], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "untouched" in done.stdout, done.stderr[-2000:]
