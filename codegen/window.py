"""Windows: W steps of a narrow stream at a time, where the lanes of a vector are chunks.

A step of such a program reads its few numbers in as many places as a vector has lanes, and each lane's next step is what lies beside
them. So every W steps the rows of memory that hold the next W are loaded whole and turned, W x W numbers at a time, and what the
steps write is turned back and stored alike: half the instructions of reading and writing number by number.
"""

from __future__ import annotations

import numpy as np

from seqparc import ir
from seqparc.ir import Program

#: Most numbers of a step: a tile's windows should stay in the first cache.
MOST = 8

HELPERS = """
// Where numbers of step k lie in a window of W steps, n each. With time running backwards (a negative stride) so do the steps.
INLINE int64_t in_window(int64_t k, int64_t time, int64_t n) { return (time < 0 ? W - 1 - k % W : k % W) * n; }

// To be called every W steps: the numbers of the next W, loaded in rows where they lie side by side and no lane ends before.
APART void load_window(const real* x, int64_t time, const int64_t* o, const int64_t n, int64_t k, int64_t shortest, int64_t longest,
                       vf (*to)[U]) {
  if (k + W <= shortest && (time == n || time == -n)) load_rows(x + (time < 0 ? k + W - 1 : k) * time, o, n * W, to);
  else for (int64_t j = k; j < k + W && j < longest; j++) for (int64_t i = 0; i < n; i++)
    EACH(to[in_window(j, time, n) + i][u] = sp_gather(x + i + j * time, o + u * W));
}

// To be called every W steps and after the last: the numbers of the steps since, stored likewise.
APART void store_window(real* y, int64_t time, const int64_t* o, const int64_t n, int64_t k, int64_t shortest, int64_t longest,
                        const int64_t* length, vf (*from)[U]) {
  const int last = k % W == W - 1;
  const int64_t first = k - k % W;
  if (last && k < shortest && (time == n || time == -n)) store_rows(y + (time < 0 ? k : first) * time, o, n * W, from);
  else for (int64_t j = first; j <= k; j++) for (int64_t i = 0; i < n; i++)
    EACH(put_live(y + i + j * time, o + u * W, from[in_window(j, time, n) + i][u], length + u * W, j));
}
"""


def windows(program: Program, scalar: bool) -> dict[str, int]:
    """{x or y with its slot: numbers per step} of the streams that are read and the outputs that are written by windows."""
    if not scalar or program.lanes != 1:
        return {}
    read = {v.slot for v in ir.leaves(program.outputs, "stream")}
    found = {f"x{s}": n for s, n in enumerate(program.stream_sizes) if s in read}
    for slot, n in enumerate(program.emit_sizes):  # all of a row or nothing: a window is stored whole
        written = [s.index.array.reshape(-1) for s in program.emits if s.slot == slot]
        if written and np.array_equal(np.sort(np.concatenate(written)), np.arange(n)):
            found[f"y{slot}"] = n
    return {name: n for name, n in found.items() if n <= MOST}
