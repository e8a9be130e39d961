"""Equality and speed on a GPU: `python benchmarks/gpu.py`. Prints tables, writes benchmarks/out/gpu.json.

First every cell of the tests in float32 and float64 against float64 on the torch backend; then the cases below against the eager loop,
cuDNN, our own other strategies, and pararnn-torch where it is installed. "wall" is one call with the device waited for, "through" a call
in a row of many, "graph" a replay of a CUDA graph that holds the call. Needs nothing but torch, Triton and what seqparc imports.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("SEQPARC_CACHE", tempfile.mkdtemp(prefix="seqparc-"))
ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import peers  # noqa: E402
import torch  # noqa: E402
from cases import Case, ElementwiseGRU, same_weights  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import seqparc  # noqa: E402
from seqparc.runtime.reference import loop  # noqa: E402
from tests.cells import CELLS, SLSTM, BlockGRU  # noqa: E402

DEVICE = "cuda"
#: Steps of the eager loop that are timed, and then counted up to the whole length.
EAGER = 500
#: Steps over which the outputs are compared with the plain loop in float64.
COMPARED = 1000

GRU = same_weights(nn.GRU)
CASES = (
    Case("elementwise GRU 256", lambda: ElementwiseGRU(256), (8, 2048, 768)),
    Case("elementwise GRU 256, long", lambda: ElementwiseGRU(256), (8, 16384, 768)),
    Case("elementwise GRU 64", lambda: ElementwiseGRU(64), (1, 131072, 192)),
    Case("elementwise GRU 1", lambda: ElementwiseGRU(1), (1, 1000000, 3)),
    Case("dense GRU 32", lambda: nn.GRUCell(8, 32), (1, 17984, 8), GRU),
    Case("dense GRU 1, batch 16", lambda: nn.GRUCell(8, 1), (16, 10000, 8), GRU),
    Case("dense GRU 8, batch 16", lambda: nn.GRUCell(8, 8), (16, 10000, 8), GRU),
    Case("dense GRU 32, batch 16", lambda: nn.GRUCell(8, 32), (16, 10000, 8), GRU),
    Case("dense GRU 64, batch 16", lambda: nn.GRUCell(8, 64), (16, 2048, 8), GRU),
    Case("sLSTM 256", lambda: SLSTM(256), (8, 2048, 1024)),
    Case("sLSTM 256, long", lambda: SLSTM(256), (8, 16384, 1024)),
    Case("sLSTM 64", lambda: SLSTM(64), (1, 131072, 256)),
    Case("sLSTM 1", lambda: SLSTM(1), (1, 1000000, 4)),
    Case("block GRU 8 of 64, bfloat16", lambda: BlockGRU(8, 64).bfloat16(), (16, 512, 1536)),
)


def first(y: Any) -> Tensor:
    return seqparc.tree.flatten(y)[0][0]


def equality(name: str) -> list[dict[str, Any]]:
    """One cell in both dtypes and two strategies; in a process of its own, since compiling takes seconds."""
    warnings.simplefilter("error", seqparc.SeqparcWarning)  # so that nothing falls back
    rows = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        cell = CELLS[name].make().to(DEVICE).to(dtype)
        exact = CELLS[name].make().to(DEVICE).double()
        exact.load_state_dict({k: v.double() for k, v in cell.state_dict().items()})
        x = torch.randn(3, 260, CELLS[name].inputs, device=DEVICE, dtype=dtype)

        def run(rnn: Any, cell: nn.Module, x: Tensor) -> list[Tensor]:
            x = x.requires_grad_()
            y = first(rnn(x)[0])
            grads = torch.autograd.grad(y.square().mean(), [x, *cell.parameters()], allow_unused=True)
            return [y.detach(), *(g for g in grads if g is not None)]

        def apart(found: list[Tensor], right: list[Tensor]) -> float:
            return max(float((p.double() - q).abs().max() / (q.abs().max() + 1e-30)) for p, q in zip(found, right, strict=True))

        right = run(seqparc.compile(exact, backend="torch", options={"strategy": "sequential"}), exact, x.detach().double())
        loop = seqparc.compile(cell, backend="torch", options={"strategy": "sequential"})
        own = apart(run(loop, cell, x.detach().clone()), right)
        for options in ({"strategy": "sequential"}, {"strategy": "shooting", "chunks": 5, "warmup": 16}):
            row: dict[str, Any] = {"cell": name, "dtype": str(dtype)[6:], "strategy": options["strategy"], "own_error": own}
            try:
                rnn = seqparc.compile(cell, options=options)
                row["error"] = apart(run(rnn, cell, x.detach().clone()), right)
                back = rnn.stats.backward
                row |= {"backends": [rnn.stats.backend, back.backend], "passes": [rnn.stats.passes, back.passes]}
                most = 1e-10 if dtype is torch.float64 else 4 * own + 1e-6
                row["ok"] = row["error"] <= most and row["backends"] == ["triton", "triton"]
            except Exception as error:
                row |= {"ok": False, "failed": f"{type(error).__name__}: {error}"[-400:]}
            rows.append(row)
    return rows


def wall(call: Callable[[], Any], most: float = 3.0) -> float:
    """Median milliseconds of a call that is waited for."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 30 and (len(times) < 3 or time.perf_counter() - begin < most):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def through(call: Callable[[], Any], each: float = 0.0) -> float:
    """Milliseconds per call of many in a row, by the device's clock; `each`: about how long one takes."""
    times = max(2, min(20, int(1500 / (each + 1e-3))))
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def replayed(call: Callable[[], Any]) -> float:
    """Milliseconds of a replay of a graph that holds the call."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return through(graph.replay)


def speed(case: Case, copy: float, compiled: bool, tuned: bool = False) -> list[dict[str, Any]]:
    """Rows of a case, one per system. `compiled`: the eager loop over torch.compile(cell) too; `tuned`: settings tried out too."""
    torch.manual_seed(0)
    cell = case.make().to(DEVICE)
    dtype = next(cell.parameters()).dtype
    x = torch.randn(case.shape, device=DEVICE, dtype=dtype)
    given = x.clone().requires_grad_()
    with torch.no_grad():
        exact = case.make().to(DEVICE).double()
        exact.load_state_dict({k: v.double() for k, v in cell.state_dict().items()})
        right = first(seqparc.compile(exact).sequential(x[:, :COMPARED].double())[0])
    rows = [_looped("eager loop", cell, cell, case, x)]
    if compiled:
        rows.append(_looped("loop over torch.compile(cell)", cell, torch.compile(cell), case, x))
    systems: list[tuple[str, nn.Module, Callable[[Tensor], Any]]] = []
    if case.builtin is not None:
        layer = case.builtin(cell).to(DEVICE)
        systems.append((getattr(layer, "label", "cuDNN"), layer, layer))
    ways: list[tuple[str, dict[str, Any]]] = [("newton", {"strategy": "newton"}), ("sequential", {"strategy": "sequential"}), ("auto", {})]
    for label, options in ways + [("tuned", {"tune": True})] * tuned:
        rnn = seqparc.compile(cell, options=options)
        systems.append((f"seqparc {label}", rnn, rnn))
    rows += [{"system": label, **_measured(module, call, x, given, right, copy)} for label, module, call in systems]
    return [{"case": case.name, "shape": list(case.shape), "dtype": str(dtype)[6:], **row} for row in rows]


def _looped(label: str, cell: nn.Module, step: Any, case: Case, x: Tensor) -> dict[str, Any]:
    """The plain loop over a step: each costs the same, so a few are timed and counted up."""
    steps = min(EAGER, case.shape[1])
    row: dict[str, Any] = {"system": f"{label} ({steps} steps, scaled)"}
    short = x[:, :steps]
    given = short.clone().requires_grad_()
    _, convention, start = seqparc.compile(cell).understand(short)

    def call(x: Tensor) -> Any:
        return loop(lambda a, b: convention.call(step, a, b), [x], start)

    try:
        with torch.no_grad():
            row["fwd"] = wall(lambda: call(short), 1.0) * case.shape[1] / steps
        row["fwd+bwd"] = wall(lambda: both(call, cell, given), 1.0) * case.shape[1] / steps
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[-400:]
    return row


def both(call: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> None:
    """Forward, and the gradients of x and every parameter."""
    y = first(call(x)[0])
    torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def _measured(module: nn.Module, call: Callable[[Tensor], Any], x: Tensor, given: Tensor, right: Tensor, copy: float) -> dict[str, Any]:
    """One system's row; what goes wrong is in it."""
    row: dict[str, Any] = {}
    try:
        begin = time.perf_counter()
        with torch.no_grad():
            y = first(call(x)[0])
        both(call, module, given)
        torch.cuda.synchronize()
        row["first_call_s"] = time.perf_counter() - begin
        row["error"] = float((y[:, :COMPARED].double() - right).abs().max())
        for _ in range(6):  # what is learnt from run to run is learnt
            with torch.no_grad():
                call(x)
            both(call, module, given)
        ours = isinstance(module, seqparc.CompiledRNN)
        with torch.no_grad():
            row["fwd"] = wall(lambda: call(x))
            row["fwd through"] = through(lambda: call(x), row["fwd"])
            if ours:
                row["fwd graph"] = replayed(lambda: call(x))
        row["fwd+bwd"] = wall(lambda: both(call, module, given))
        row["fwd+bwd through"] = through(lambda: both(call, module, given), row["fwd+bwd"])
        best = min(row[k] for k in ("fwd", "fwd through", "fwd graph") if k in row)
        row["of copy"] = x.element_size() * (x.numel() + y.numel()) / best / 1e6 / copy
        if isinstance(module, seqparc.CompiledRNN):
            for key, s in (("", module.stats), ("backward ", module.stats.backward)):
                if s is not None:
                    row |= {f"{key}chunks": s.chunks, f"{key}warmup": s.warmup, f"{key}passes": s.passes, f"{key}fallback": s.fallback}
            row["backend"] = module.stats.backend
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[-400:]
    return row


def copied() -> float:
    """Bytes read and written per second by a copy of 1 GiB on the device, in GB."""
    room = torch.empty(2**28, device=DEVICE)
    into = torch.empty_like(room)
    return 8 * room.numel() / through(lambda: into.copy_(room)) / 1e6


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as a table; times in milliseconds."""
    found = Table(title=title, title_justify="left")
    keys = list(dict.fromkeys(k for r in rows for k in r if k not in ("case", "shape", "dtype", "cell")))
    for k in keys:
        found.add_column(k)
    for r in rows:
        found.add_row(*(f"{v:.3g}" if isinstance(v := r.get(k, ""), float) else str(v) for k in keys))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=480, help="no case is begun after this")
    parser.add_argument("--skip-equality", action="store_true")
    parser.add_argument("--torch-compile", action="store_true", help="also the loop over torch.compile(cell), which takes long to compile")
    parser.add_argument("--tune", action="store_true", help="also with tiles, warps and chunks tried out, which takes long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU that PyTorch can use; there is none here", file=sys.stderr)
        return 2
    import triton

    begin = time.perf_counter()
    console = Console(width=220)
    copy = copied()
    about = {"card": torch.cuda.get_device_name(), "copy_GB_s": copy, "torch": torch.__version__, "triton": triton.__version__,
             "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    results: dict[str, Any] = {"machine": about, "equality": [], "speed": []}
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))

    if not args.skip_equality:
        with concurrent.futures.ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
            for rows in pool.map(equality, CELLS):
                results["equality"] += rows
        wrong = [r for r in results["equality"] if not r["ok"]]
        console.print(table("equality, all cells: relative errors of outputs and gradients", wrong or results["equality"][:8]))
        console.print(f"{len(results['equality'])} runs, {len(wrong)} wrong, {time.perf_counter() - begin:.0f} s")
        save()
    for case in (*CASES, *peers.cases()):
        if args.only in case.name:
            if time.perf_counter() - begin > args.seconds:
                console.print(f"{case.name}: left out, the time is up")
                continue
            rows = speed(case, copy, args.torch_compile, args.tune)
            results["speed"] += rows
            console.print(table(f"{case.name}: batch, time, inputs = {case.shape}", rows))
            save()
    return 1 if any(not r["ok"] for r in results["equality"]) else 0


if __name__ == "__main__":
    sys.exit(main())
