"""Kernels are kept between processes: compiled once, found again, by many at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, sys
import torch, seqparc
from seqparc.codegen import build
compiled, compiling = [], build._compile
build._compile = lambda *given: (compiled.append(1), compiling(*given))[1]
torch.manual_seed(0)
rnn = seqparc.compile(torch.nn.GRUCell(3, 5))
x = torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(1))
y, _ = rnn(x)
y.sum().backward()
heavy = [m for m in ("sympy", "networkx", "numpy.ma", "importlib.readers", "rich", "torch._dynamo") if m in sys.modules]
print(json.dumps({"sum": float(y.sum()), "compiled": len(compiled), "heavy": heavy, "backend": rnn.stats.backend}))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "SEQPARC_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def test_no_start_imports_much_and_a_warm_one_compiles_nothing(tmp_path: Path) -> None:
    cold, warm = finish(start(tmp_path)), finish(start(tmp_path))
    assert cold["compiled"] == 2 and warm["compiled"] == 0
    assert cold["heavy"] == warm["heavy"] == []
    assert warm["sum"] == cold["sum"] and warm["backend"] == "c"


def test_processes_that_start_together_share_the_work(tmp_path: Path) -> None:
    together = [finish(p) for p in [start(tmp_path) for _ in range(3)]]
    assert len({r["sum"] for r in together}) == 1
    assert sum(r["compiled"] for r in together) == 2 == len(list(tmp_path.glob("*.so")))
    assert not list(tmp_path.glob("build-*")) and not list(tmp_path.glob("write-*"))
