"""What the GPU kernels of every cell use, against what they used before. `python -m tests.test_offline` writes the table anew."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import seqparc
from seqparc.__main__ import main
from seqparc.codegen import gpuscan, offline, resources
from seqparc.codegen.launcher import OPTIONS, interpreted
from seqparc.ir import Program
from seqparc.runtime.engine import Engine
from tests.cells import CELLS

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code")

TABLE = Path(__file__).parent / "golden" / "registers.json"
DIRECTIONS, TARGETS = ("forward", "backward"), ("sm_80", "sm_90")
#: Cells whose kernels take Triton long: scalar programs of several numbers a lane, over whose many reads and writes it is slow.
SLOW = ("RNN relu", "sLSTM", "block GRU", "affine", "sparse")
#: Bytes spilled by (cell, direction, target): nothing may be, and what is, is here to be seen. Those there are lie outside the loop's
#: usual way: in what ptxas adds for shuffles in a warp whose threads have parted, and before the loop.
EXPECTED_SPILLS = {(cell, way, "sm_80"): 8 for cell, way in (("layer norm GRU", "forward"), ("GRU", "backward"), ("LSTM", "backward"))}


@functools.cache
def programs(cell: str) -> dict[str, Program]:
    """By direction, as they are on a GPU."""
    torch.manual_seed(0)
    engine = seqparc.compile(CELLS[cell].make(), backend="triton").engine(torch.zeros(2, 5, CELLS[cell].inputs))
    assert isinstance(engine, Engine)
    return offline.programs(engine.plan)


def report(cell: str, direction: str, target: str) -> offline.KernelReport:
    (found,) = offline.inspect(programs(cell)[direction], torch.float32, target)
    return found


def row(found: offline.KernelReport) -> dict[str, Any]:
    """What the table holds of a kernel; instructions are per step."""
    counts = {kind: round(n, 2) for kind, n in found.instructions_per_step.items() if n}
    return {"registers": found.registers, "spills": found.spills, "shared": found.shared, "steps": found.steps_per_pass, **counts}


def matrix() -> Iterator[tuple[str, str, str]]:
    return ((cell, direction, target) for cell in CELLS for direction in DIRECTIONS for target in TARGETS)


def nightly(cell: str, target: str) -> bool:
    return cell in SLOW or target != "sm_90"


@pytest.mark.parametrize(
    ("cell", "direction", "target"), [pytest.param(*key, marks=[pytest.mark.nightly] * nightly(key[0], key[2])) for key in matrix()]
)
def test_a_kernel_uses_what_it_did(cell: str, direction: str, target: str) -> None:
    found = report(cell, direction, target)
    assert found.spills == EXPECTED_SPILLS.get((cell, direction, target), 0), found.problems
    assert found.resident_warps >= found.warps and found.steps_per_pass >= 1 and found.steps_per_pass % 1 == 0
    assert len(found.problems) == bool(found.spills)
    table = json.loads(TABLE.read_text())
    if triton.__version__ != table["triton"]:
        pytest.skip(f"the table is of triton {table['triton']}, this is {triton.__version__}")
    was = table["kernels"][f"{cell}, {direction}, {target}"]
    assert row(found) == was, "it has changed; if it should, run python -m tests.test_offline and read the diff"


@pytest.mark.parametrize("cell", ["elementwise GRU", "GRU"])
def test_kernels_compile_for_amd(cell: str) -> None:
    found = report(cell, "forward", "gfx942")
    assert found.problems == () and found.registers > 0 and found.steps_per_pass % 1 == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_scan_over_chunks_keeps_its_maps_in_registers(n: int) -> None:
    run = gpuscan._kernel(n, False).function
    signature = {"a": "*fp64", "r": "*fp64", "d": "*fp64", "count": "i32", "numbers": "i64"}
    constants = {"CHUNKS": gpuscan.TILES[n] // 32, "NUMBERS": 32}
    for target in TARGETS:
        used = resources.measure(resources.compile_for(run, signature, constants, target, 4, OPTIONS), target)
        assert used.spills == 0 and 0 < used.registers <= 255


def test_traffic_counts_what_a_step_reads_and_writes() -> None:
    p = programs("elementwise GRU")["forward"]
    assert offline.traffic(p, 4) == 4 * (3 + 1)  # three gates in, the state out
    assert offline.traffic(p, 8) == 8 * (3 + 1)


def cell() -> seqparc.CompiledRNN:
    return seqparc.compile(CELLS["elementwise GRU"].make(), backend="torch", name="a small GRU")


COMMAND = ["emit", "tests.test_offline:cell", "--input", "2,5,21", "--target"]


def test_shell_prints_kernels_and_what_they_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "sm_90"]) == 0
    out = capsys.readouterr().out
    for direction in DIRECTIONS:
        assert f"# a small GRU, {direction}, triton backend" in out and f"# {direction} on sm_90, float32, sweep:" in out
    assert out.count("def sweep(") == out.count("# bound: ") == 2
    assert "registers a thread" in out and "warps resident" in out and "bytes moved" in out
    compile(out, "out", "exec")  # the report is comments to the code


def test_shell_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["backend"], f["direction"], f["target"]) for f in found] == [
        ("a small GRU", "triton", direction, "sm_90") for direction in DIRECTIONS
    ]
    for f in found:
        assert "def sweep(" in f["source"] and f["registers"] > 0 and f["spills"] == 0 and f["shared"] >= 0
        assert f["instructions_per_step"]["fma"] > 0 and f["seconds_per_element"] > 0 and f["limit"]


def test_shell_names_an_unknown_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "sm_1"]) == 2
    assert "sm_1" in capsys.readouterr().err


def test_explain_tells_of_the_gpu_kernel_only_where_there_is_one() -> None:
    x = torch.zeros(2, 5, 21)
    make = CELLS["elementwise GRU"].make
    told = dict(seqparc.compile(make(), backend="triton").explain(x).sections)["GPU kernel"]
    assert told[0] == "forward on sm_90, sweep:" and "registers" in told[1] and "bound" in told[-1]
    assert "GPU kernel" not in dict(seqparc.compile(make()).explain(x).sections)


def _row(key: tuple[str, str, str]) -> dict[str, Any]:
    return row(report(*key))


if __name__ == "__main__":
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = [json.dumps(", ".join(key)) + ": " + json.dumps(made) for key, made in zip(matrix(), pool.map(_row, matrix()), strict=True)]
    TABLE.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n' + ",\n".join(rows) + "\n}}\n")
