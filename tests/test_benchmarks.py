"""The hand-written baselines are right, and the benchmarks run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import baselines  # noqa: E402
import cases  # noqa: E402
import gpu  # noqa: E402
import robustness  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("d", [1, 7, 8, 12, 64, 72])
def test_elementwise_baseline(d: int, batch: int) -> None:
    cell = cases.ElementwiseGRU(d)
    x, h = torch.randn(batch, 50, 3 * d), torch.randn(batch, d)
    y, last = baselines.elementwise_gru(x, cell.u.detach(), h)
    rows = []
    with torch.no_grad():
        for t in range(50):
            h = cell(x[:, t], h)
            rows.append(h)
    torch.testing.assert_close(y, torch.stack(rows, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, h, rtol=1e-5, atol=1e-6)


def test_dense_baseline() -> None:
    cell = torch.nn.GRUCell(8, 32)
    x, h = torch.randn(1, 50, 8), torch.randn(1, 32)
    with torch.no_grad():
        y, last = baselines.dense_gru(cell, x, h)
        right, _ = cases.same_weights(torch.nn.GRU)(cell)(x, h[None])
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, right[:, -1], rtol=1e-5, atol=1e-6)


def test_it_runs(tmp_path: Path) -> None:
    where = tmp_path / "page.md"
    assert run.main(["--quick", "--only", "elementwise GRU 1", "--out", str(tmp_path), "--page", str(where)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert {r["system"] for r in found["rows"]} == {"eager loop", "C loop", "seqparc sequential", "seqparc"}
    assert all(r["largest_error"] < 1e-5 and r["fwd"]["median"] > 0 for r in found["rows"])
    assert [t["bound"] for t in found["targets"]] == [f"at most {bound}" for bound in ("2", "2", "0.25", "0.7", "3.5")]
    assert all(0 < r["floor"][what]["ms"] < r[what]["median"] for r in found["rows"] for what in ("fwd", "fwd+bwd") if what in r)
    assert "## elementwise GRU 1, batch × time × inputs 1 × 200 × 3" in where.read_text() and "C loop" in where.read_text()
    assert all(t["measured"] > 0 for t in found["targets"])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_benchmark_measures_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], Any], *about: float) -> float:
        call()
        return 1.0

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for clock in ("wall", "through", "replayed"):
        monkeypatch.setattr(gpu, clock, once)
    for case in (
        gpu.Case("elementwise", lambda: gpu.ElementwiseGRU(3), (2, 20, 9)),
        gpu.Case("dense", lambda: torch.nn.GRUCell(2, 4), (1, 20, 2), gpu.GRU),
        gpu.Case("half", lambda: gpu.BlockGRU(2, 3).bfloat16(), (1, 20, 18)),
    ):
        rows = gpu.speed(case, 1.0, compiled=False)
        assert [r["system"].split(" (")[0] for r in rows if r["system"] != "cuDNN"] == [
            "eager loop", "seqparc newton", "seqparc sequential", "seqparc auto",
        ]  # fmt: skip
        assert len(rows) == 4 + (case.builtin is not None)
        for row in rows:
            assert "failed" not in row, row
            assert row.get("error", 0.0) < (0.05 if row["dtype"] == "bfloat16" else 1e-5), row


def test_scaling_runs(tmp_path: Path) -> None:
    picture = tmp_path / "copy.png"
    assert scaling.main(["--quick", "--only", "batch", "--out", str(tmp_path), "--picture", str(picture)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [(r["cell"], r["value"]) for r in found["rows"]] == [(c, v) for c in ("elementwise GRU 16", "GRU 32") for v in (1, 4, 16, 64)]
    for row in found["rows"]:
        assert 0 < row["floor"]["fwd"] < row["seqparc"]["fwd"] and ("torch's layer" in row) == (row["cell"] == "GRU 32")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cost_that_grows_is_not_flat() -> None:
    measured = ((10, 9.0), (10_000, 1.0), (20_000, 1.2))
    rows = [{"varied": "steps", "cell": "c", "value": v, "seqparc": {"fwd": t, "fwd+bwd": 1.0}} for v, t in measured]
    assert [line.rpartition(": ")[2] for line in scaling.verdicts(rows)] == ["not flat", "flat"]


def test_hard_dynamics_run(tmp_path: Path) -> None:
    where = tmp_path / "page.md"
    status = robustness.main(["--quick", "--only", "integrator", "--repeats", "1", "--out", str(tmp_path), "--page", str(where)])
    found = json.loads((tmp_path / "robustness.json").read_text())
    assert len(found["rows"]) == 2 and status == bool(found["missed"])  # times of so short runs say nothing
    for row in found["rows"]:
        assert row["nan_alike"] and row["errors"]["apart"] < 1e-5 and row["fwd"]["settled"] > 0 and row["newton"]["passes"] >= 1
    assert where.read_text().count("integrator") >= 2


def test_what_hard_dynamics_must_keep_is_judged() -> None:
    row: dict[str, Any] = {
        "fwd": {"settled": 1.0, "together": 1.1}, "fwd+bwd": {"settled": 1.2, "together": 1.2},
        "errors": {"seqparc": 1e-6, "loop": 1e-6}, "nan_alike": True,
    }  # fmt: skip
    assert robustness.verdicts(row) == []
    row["fwd"]["settled"], row["errors"]["seqparc"], row["nan_alike"] = 1.4, float("inf"), False
    row["fwd+bwd"]["together"] = 1.5
    found = [v.split()[:2] for v in robustness.verdicts(row)]
    assert found == [["fwd,", "settled:"], ["fwd+bwd,", "together:"], ["error", "inf,"], ["NaN", "or"]]
