"""The command line: help, pages and pictures, what a machine lacks, and measurements."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import seqparc
from seqparc import bench, doctor
from seqparc.__main__ import main
from seqparc.codegen import build
from seqparc.errors import ToolchainError
from seqparc.explanation import Explanation

TARGET = "tests.test_cli:make"


def make() -> Any:
    """An elementwise cell with one weight."""
    cell = torch.nn.RNNCell(3, 4)
    return seqparc.compile(cell, name="a small RNN")


def logistic() -> Any:
    """A cell without parameters."""
    return seqparc.compile(lambda x, h: torch.tanh(0.5 * h + x), state=torch.zeros(3), name="no parameters")


@pytest.mark.parametrize("command", ["explain", "validate", "bench", "emit", "doctor", "cache"])
def test_help_has_examples_and_says_what_the_exit_status_means(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and f"seqparc {command}" in shown.split("examples:")[1] and "exit status: 0" in shown and "--json" in shown


def test_help_lists_the_commands_and_what_is_asked_for_wrongly_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in ("explain", "validate", "bench", "emit", "doctor", "cache"))
    with pytest.raises(SystemExit) as left:
        main(["nonsense"])
    assert left.value.code == 2
    for wrong, word in (
        (["validate", TARGET, "--input", "5"], "batch and the number of steps"), (["validate", TARGET, "--input", "2,x"], "not a shape"),
        (["bench", TARGET, "--input", "1,5,3", "--runs", "0"], "--runs"),
    ):  # fmt: skip
        assert main(wrong) == 2 and word in capsys.readouterr().err


def test_explain_writes_a_page_and_a_picture_and_prints_latex(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Explanation, "plot", lambda self, path: path.write_text("<svg/>"))  # pictures have tests of their own
    page, picture = tmp_path / "told.html", tmp_path / "told.svg"
    assert main(["explain", TARGET, "--input", "1,40,3", "--html", str(page), "--plot", str(picture), "--latex"]) == 0
    out, written = capsys.readouterr().out, page.read_text("utf-8")
    assert out.startswith("\\begin{align*}") and "W_{1}" in out
    assert written.startswith("<!doctype html>") and "a small RNN" in written and picture.read_text() == "<svg/>"
    for wrong, word in (("--html", "none/told.html"), ("--plot", "told.gif")):
        assert main(["explain", TARGET, "--input", "1,40,3", wrong, str(tmp_path / word)]) == 2
        assert word.split("/")[0] in capsys.readouterr().err


# -- doctor --------------------------------------------------------------------------------------------------------------


def lacking(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == status
    found = json.loads(capsys.readouterr().out)["missing"]
    assert all(set(lack) == {"what", "cost", "do"} and all(lack.values()) for lack in found)
    return {lack["what"]: lack for lack in found}


def test_doctor_says_what_is_missing_what_it_costs_and_what_to_do(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("triton", "matplotlib") else real(name))
    monkeypatch.setattr(doctor, "TORCH", (99, 0))
    monkeypatch.setattr(doctor, "_OPENMP", "int seqparc_openmp(void) { return 0; }")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda of: {0}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = lacking(capsys, 0)
    assert list(found) == ["torch 99.0", "second core", "OpenMP", "CUDA", "Triton", "matplotlib"]
    assert "seqparc[demo]" in found["matplotlib"]["do"] and "torch>=99.0" in found["torch 99.0"]["do"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.split("missing:\n")[1].splitlines()
    assert len(lines) == 6 and lines[1].startswith("  second core: chunks share one")


def test_doctor_without_a_compiler_and_without_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fresh: Path
) -> None:
    def none() -> Any:
        raise ToolchainError("no C compiler was found")

    monkeypatch.setattr(build, "compiler", none)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQPARC_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made there
    found = lacking(capsys, 1)
    assert "gcc or clang" in found["C compiler"]["do"] and "every process compiles anew" in found["cache folder"]["cost"]


@pytest.mark.parametrize(("version", "old"), [("2.10.1", True), ("2.11.0+cpu", False), ("3.0", False), ("1.13", True), ("main", False)])
def test_versions_are_compared_as_numbers(version: str, old: bool) -> None:
    assert doctor.older(version, (2, 11)) is old


# -- bench ---------------------------------------------------------------------------------------------------------------


def test_bench_measures_and_says_what(quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FIRST", 8)
    monkeypatch.setattr(bench, "LONGEST", 1e-9)  # so the loop is shortened
    command = ["bench", TARGET, "--input", "2,40,3", "--runs", "3", "--seconds", "0.01", "--no-compile-times", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["times"]) == [bench.LOOP, bench.SEQUENTIAL, bench.AUTO] and found["ok"] and found["compiled"] == {}
    for name, row in found["times"].items():
        for t in row.values():
            assert 0 < t["least"] <= t["median"] <= t["most"] and t["runs"] == 3 and t["whole"] == 40
            assert (t["steps"], t["extrapolated"]) == ((8, True) if name == bench.LOOP else (40, False))
            assert t["all"] == pytest.approx(t["median"] * 40 / t["steps"])
    assert all(0 <= e["values"] < 1e-6 and 0 <= e["gradients"] < 1e-5 for e in found["errors"].values()) and found["checked"] == 8


def test_bench_says_in_words_what_it_measured(quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "compile_times", lambda target, shapes: {"compiling with an empty cache": 2.0})
    assert main(["bench", "tests.test_cli:logistic", "--input", "1,20,3", "--runs", "1", "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "compiling with an empty cache: 2.00 s" in out and "no parameters: batch, time, … = 1, 20, 3" in out
    assert "plain loop" in out and "within what rounding allows" in out and "gradients" in out
    assert "*" not in out  # the loop ran over all steps


def test_a_first_call_makes_the_kernels(quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["", "tests.test_cli:logistic", "1,500,3"])
    bench.first_call()
    assert 0 < json.loads(capsys.readouterr().out) < 600


@pytest.mark.nightly
def test_bench_compiles_in_processes_of_their_own() -> None:
    cold, warm = bench.compile_times(TARGET, ["1,20,3"]).values()
    assert 0 < warm < cold
    with pytest.raises(seqparc.SeqparcError, match="could not compile"):
        bench.compile_times("tests.test_cli:absent", ["1,20,3"])
