"""The hand-written baselines are right, and the benchmarks run."""

from __future__ import annotations

import importlib.util
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
import choice  # noqa: E402
import gpu  # noqa: E402
import jaxscan  # noqa: E402
import numbaloops  # noqa: E402
import page  # noqa: E402
import resident  # noqa: E402
import robustness  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import subjects  # noqa: E402
import targets  # noqa: E402

import seqparc  # noqa: E402


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


DENSE = [(torch.nn.RNNCell, torch.nn.RNN), (torch.nn.GRUCell, torch.nn.GRU), (torch.nn.LSTMCell, torch.nn.LSTM)]
dense = pytest.mark.parametrize(("kind", "layer"), DENSE, ids=["rnn", "gru", "lstm"])


@dense
@pytest.mark.parametrize(("batch", "units"), [(1, 16), (3, 32), (8, 32)])
def test_dense_baseline(kind: Any, layer: Any, batch: int, units: int) -> None:
    cell, x = kind(8, units), torch.randn(batch, 50, 8)
    with torch.no_grad():
        right, _ = cases.same_weights(layer)(cell)(x)
        torch.testing.assert_close(baselines.dense(cell, x), right, rtol=1e-5, atol=1e-6)


ELEMENTWISE = [lambda d=d: cases.ElementwiseGRU(d) for d in (1, 8, 64)]
PEERED = [*ELEMENTWISE, *(lambda kind=kind: kind(8, 16) for kind, _ in DENSE)]


def given(make: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
    cell = make()
    return cell, torch.randn(2, 40, getattr(cell, "input_size", 3 * cell.hidden_size))


@pytest.mark.parametrize("make", PEERED, ids=["one", "eight", "tiles", "rnn", "gru", "lstm"])
def test_numba_loops_are_right(make: Callable[[], Any]) -> None:
    pytest.importorskip("numba")
    cell, x = given(make)
    made = numbaloops.loop(cell, x)
    right = subjects.first(seqparc.compile(cell).sequential(x))
    assert made is not None and made.compile_s > 0
    torch.testing.assert_close(torch.from_numpy(made.forward()), right, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("make", PEERED[1:], ids=["eight", "tiles", "rnn", "gru", "lstm"])
def test_jax_scans_are_right(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    monkeypatch.setattr(jaxscan, "UNROLLS", (3,))
    cell, x = given(make)
    made = jaxscan.scan(cell, x)
    assert made is not None and made.compile_s > 0
    right = subjects.first(seqparc.compile(cell).sequential(x.requires_grad_()))
    torch.testing.assert_close(made.read(made.forward()), right, rtol=1e-5, atol=2e-6)
    of_weights, of_x = made.both()
    names, weights = zip(*cell.named_parameters(), strict=True)
    grads = torch.autograd.grad(right.sum(), [x, *weights])
    for mine, theirs in zip((of_x, *(of_weights[n] for n in names)), grads, strict=True):
        torch.testing.assert_close(made.read(mine), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("system", subjects.SLOW)
@pytest.mark.parametrize("make", [PEERED[1], PEERED[5]], ids=["elementwise", "lstm"])
def test_what_torch_compiles_is_the_cell(system: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "compiled", lambda f: f)  # compilers take a minute; how steps are put together is ours
    monkeypatch.setattr(subjects, "CHUNK", (7, 3))
    monkeypatch.setattr(subjects, "COMPILED_STEPS", 30)
    cell, x = given(make)
    subject = subjects.SYSTEMS[system](system, cases.Case("", make, tuple(x.shape)), cell, x)
    right = subjects.first(seqparc.compile(cell).sequential(x))
    assert subject is not None and subject.both is not None and subject.compile_s is not None
    step = system == "torch.compile, step"
    assert (subject.scale, subject.once) == ((40 / 30, True) if step else (1, False))
    assert ("30 of the steps, scaled" in subject.note) == step
    y = subject.read(subject.forward())
    torch.testing.assert_close(y, right[:, :30] if step else right, rtol=1e-5, atol=1e-6)
    assert [g.shape for g in subject.both()] == [y.shape[:2] + x.shape[2:], *(p.shape for p in cell.parameters())]


def test_a_peak_is_of_the_call_alone() -> None:
    def take() -> float:
        return float(torch.ones(8 << 20).sum())  # 32 MiB, given back

    held = torch.ones(16 << 20)
    for _ in range(2):
        most, result = resident.peak(take)
        assert result == 8 << 20 and (most is None or 30 < most / 2**20 < 40)
    assert float(held[0]) == 1


def test_it_runs(tmp_path: Path) -> None:
    where, short = tmp_path / "page.md", tmp_path / "README.md"
    short.write_text(f"before\n{page.MARKS[0]}\nold\n{page.MARKS[1]}\nafter\n")
    arguments = ["--quick", "--only", "elementwise GRU 1", "--out", str(tmp_path / "out"), "--page", str(where), "--readme", str(short)]
    assert run.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    peers = {name for module, name in (("jax", "jax.lax.scan"), ("numba", "numba")) if importlib.util.find_spec(module)}
    assert {r["system"] for r in found["rows"]} == {"eager loop", "C loop", "seqparc sequential", "seqparc"} | peers
    assert all(r["largest_error"] < 1e-5 and r["fwd"]["median"] > 0 for r in found["rows"])
    assert [t["bound"] for t in found["targets"]] == [f"at most {bound}" for bound in ("2", "2", "2.5", "0.34", "0.96")]
    assert [t["met"] is None for t in found["targets"]] == [t["measured"] is None for t in found["targets"]]
    assert [t["target"] for t in found["targets"] if t["met"] is None] == [
        f"elementwise GRU 1: {what}" for what in ("fwd over numba", "fwd+bwd over numba fwd") if "numba" not in peers
    ]
    assert all(0 < r["floor"][what]["ms"] < r[what]["median"] for r in found["rows"] for what in ("fwd", "fwd+bwd") if what in r)
    text = where.read_text()
    assert "## elementwise GRU 1, batch × time × inputs 1 × 200 × 3" in text and "C loop" in text
    assert text.count("| not measured |") == (0 if "numba" in peers else 2)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")  # beside the page
    before, table, after = short.read_text().partition(page.MARKS[0])[0], short.read_text(), short.read_text().partition(page.MARKS[1])[2]
    assert (before, after) == ("before\n", "\nafter\n") and "old" not in table and "| elementwise GRU 1, 1 × 200 × 3, forward | " in table
    assert numbers(table) and not unlike(table, text)


def numbers(table: str) -> dict[tuple[str, str, str], float]:
    """Case, column and direction -> milliseconds, of the README's table."""
    heads: list[str] = []
    found, case = {}, ""
    for line in table.partition(page.MARKS[0])[2].partition(page.MARKS[1])[0].splitlines():
        if line.startswith("| "):
            cells = [c.strip().strip("*") for c in line.strip("|").split("|")]
            heads = heads or cells
            case = cells[0].removesuffix(", forward") if cells[0].endswith(", forward") else case
            what = "fwd" if cells[0].endswith(", forward") else "fwd+bwd"
            found |= {(case, head, what): float(c) for head, c in zip(heads[1:-1], cells[1:-1], strict=True) if c and cells is not heads}
    return found


def unlike(table: str, text: str) -> list[tuple[str, str, str]]:
    """Which of the README's numbers the page does not have."""
    measured: dict[tuple[str, str, str], float] = {}
    case = ""
    heads: list[str] = []
    for line in text.splitlines():
        if " batch × time × inputs " in line:
            case = line.removeprefix("## ").replace("batch × time × inputs ", "")
        cells = [c.strip().strip("*") for c in line.strip("|").split("|")]
        if cells[0] == "system":
            heads = cells
        elif case and len(cells) == len(heads) and set(cells[1]) != {"-", ":"}:
            row = dict(zip(heads, cells, strict=False))  # of two columns with one name the later
            for what, head in (("fwd", "forward, ms"), ("fwd+bwd", "with gradients, ms")):
                if row[head]:
                    measured[case, cells[0].partition(" (")[0], what] = float(row[head])
    found = []
    for (case, head, what), value in numbers(table).items():
        names = page.COLUMNS.get(head) or page.COLUMNS[f"**{head}**"]
        if value != min((measured.get((case, name, what), float("inf")) for name in names), default=None):
            found.append((case, head, what))
    return found


def test_the_readme_says_what_the_page_says() -> None:
    root = BENCHMARKS.parent
    table, text = (root / "README.md").read_text(), (root / "docs" / "performance.md").read_text()
    assert len(numbers(table)) >= 4 * len(cases.CASES)  # the eager loop and seqparc, in both directions
    assert unlike(table, text) == []
    assert unlike(table.replace(" 2700 ", " 2701 "), text) or " 2700 " not in table


def test_a_readme_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no <!-- "):
        page.marked("text", "table")


def test_what_the_zoo_gains_is_judged(tmp_path: Path) -> None:
    where = tmp_path / "zoo.md"
    line = "| a | 1 × 8 | dense | smooth | {} | 3.1 s | {}× (0.825 ms) | {} |\n"
    lines = (("c", "50", "1,126× (5.23 ms)"), ("c", "1,200", ""), ("c", "90", "90× (1 ms)"), ("torch", "1", "1× (1 ms)"))
    where.write_text("loop over 4,096 steps\n" + "".join(line.format(*cells) for cells in lines))
    found = targets.zoo(where)
    assert [(v["measured"], v["met"]) for v in found] == [(90, False), (608, True)]
    assert "3 cells, 4,096 steps: fwd faster than eager loop, median (50 to 1,200)" in found[0]["target"]
    assert len(targets.zoo(BENCHMARKS.parent / "docs" / "zoo.md")) == 2


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
    where = tmp_path / "page.md"
    assert run.main(["--quick", "--scaling", "--only", "threads", "--out", str(tmp_path / "out"), "--page", str(where)]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["scaling"]
    assert [(r["cell"], r["value"]) for r in found] == [(c, v) for c in ("elementwise GRU 64", "GRU 32") for v in (1, 2)]
    for row in found:
        assert 0 < row["floor"]["fwd"] < row["seqparc"]["fwd"] and ("torch's layer" in row) == (row["cell"] == "GRU 32")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG") and "](scaling.png)" in where.read_text()


def test_scaling_runs_alone(tmp_path: Path) -> None:
    assert scaling.main(["--quick", "--only", "threads", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert [r["value"] for r in json.loads((tmp_path / "scaling.json").read_text())["rows"]] == [1, 1]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_choice_is_held_against_a_search(tmp_path: Path) -> None:
    assert choice.main(["--quick", "--only", "minGRU", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "choice.json").read_text())["rows"]
    # One chunk, and 2, 4, 8 (and 16, 32) with every warm-up that they have room for: this cell forgets so fast that all of them converge.
    assert [(r["T"], r["searched"]) for r in rows] == [(64, 1 + 4 + 3 + 2), (256, 1 + 6 + 5 + 4 + 3 + 2)]
    assert choice.over({"chosen_s": 1.5, "best_s": 1.0}) == 0.5


def test_a_cost_that_grows_is_not_flat() -> None:
    measured = ((10, 9.0), (10_000, 1.0), (20_000, 1.2))
    rows = [{"varied": "steps", "cell": "c", "value": v, "seqparc": {"fwd": t, "fwd+bwd": 1.0}} for v, t in measured]
    assert [v["met"] for v in scaling.verdicts(rows)] == [False, True]


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
