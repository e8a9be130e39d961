"""The examples run, are right, learn and draw; what they ship is recorded data with a source and a licence."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = EXAMPLES / "data"


def load(name: str) -> ModuleType:
    """An example as a module; it is a script, in no package."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ecg() -> ModuleType:
    return load("ecg")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `python examples/….py` is run: what lies beside it can be imported, and the terminal is wide."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def shown(beside: None, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, list[str]]]:
    """Runs an example at reduced size; the rows of what it prints as tables: {first column: other columns}."""

    def run(name: str) -> dict[str, list[str]]:
        assert load(name).main(["--quick", "--out", str(tmp_path)]) == 0
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines() if line[:1] == "│"]
        return {first: rest for first, *rest in rows}

    return run


def losses(rows: dict[str, list[str]]) -> list[tuple[float, float]]:
    """The plain loop's and the compiled one's, step by step."""
    return [(float(a), float(b)) for name, (a, b) in rows.items() if name.startswith("loss, step")]


def test_long_sequences(shown: Callable[[str], dict[str, list[str]]]) -> None:
    rows = shown("long_sequences")
    assert len({loss for loss, _ in losses(rows)}) == len(losses(rows)) == 3  # it trains
    assert all(abs(a - b) <= 1e-5 for a, b in losses(rows))


def test_long_sequences_tells_when_losses_differ(beside: None, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("long_sequences")
    convert = example.seqparc.convert

    def wrong(model: torch.nn.Module) -> list[str]:
        with torch.no_grad():
            model.gru.weight_ih_l1.mul_(3)
        return convert(model)

    monkeypatch.setattr(example.seqparc, "convert", wrong)
    monkeypatch.setattr(example, "HELD_OUT", 5)
    monkeypatch.setattr(example, "save", lambda *_: None)
    assert example.main(["--quick", "--steps", "1", "--eager-steps", "1", "--plain-loop", "--out", str(tmp_path)]) == 1


def test_the_plain_loop_of_the_long_sequences_is_torchs_layer(beside: None) -> None:
    gru = torch.nn.GRU(6, 5, 2, batch_first=True)
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(load("long_sequences").plain_loop(gru)(x), gru(x)[0])


@pytest.mark.filterwarnings("ignore:Compressor has become sequential")  # the release that is found outlasts so short a sound
def test_compressor(shown: Callable[[str], dict[str, list[str]]]) -> None:
    rows = shown("compressor")
    for name in ("attack (ms)", "release (ms)", "threshold (dB)", "ratio", "make-up (dB)"):
        true, start, found = map(float, rows[name])
        assert abs(found - true) < abs(start - true) / 10, (name, true, start, found)
    assert float(rows["largest difference of the output"][1]) <= 1e-6
    assert float(rows["largest difference of a gradient, relative"][1]) <= 1e-4


def test_spiking(shown: Callable[[str], dict[str, list[str]]]) -> None:
    rows = shown("spiking")
    assert len({loss for loss, _ in losses(rows)}) == len(losses(rows)) == 3
    assert all(abs(a - b) <= 1e-5 for a, b in losses(rows))
    assert int(rows["held-out right, after"][1].rstrip("%")) > int(rows["held-out right, before"][1].rstrip("%"))


def test_convert_lstm(shown: Callable[[str], dict[str, list[str]]]) -> None:
    rows = shown("convert_lstm")
    (packed,) = (rest for name, rest in rows.items() if name.startswith("packed"))
    for outputs, gradients in (rows["all of one length"], packed):
        assert 0 < float(outputs) <= 1e-6
        assert float(gradients) <= 1e-5


def test_inspect_kernels(shown: Callable[[str], dict[str, list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown("inspect_kernels")
    for name, chunks in (("sequential", "1"), ("16 chunks, warmed up", "16"), ("64 chunks, whole Jacobian", "64")):
        assert rows[name][0] == chunks
        assert 0 < float(rows[name][-1]) <= 2e-6


def test_demo(ecg: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert ecg.main(["--quick", "--out", str(tmp_path)]) == 0
    picture = (tmp_path / "ecg.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    printed = capsys.readouterr().out
    loss = {name: float(re.search(rf"loss\* {name}\D+([\d.]+)", printed)[1]) for name in ("if nothing changes", "untrained", "trained")}
    assert loss["trained"] < loss["untrained"]
    assert loss["trained"] < loss["if nothing changes"]


def test_demo_stops_when_the_compiled_cell_is_wrong(ecg: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        ok = False

    monkeypatch.setattr(ecg.seqparc.CompiledRNN, "validate", lambda *_, **__: Wrong())
    monkeypatch.setattr(ecg, "QUICK", 500)
    assert ecg.main(["--quick", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_cell_is_short(ecg: ModuleType) -> None:
    assert len(inspect.getsource(ecg.TiringOscillators.forward).splitlines()) <= 15
    body = [line for line in inspect.getsource(ecg.TiringOscillators).splitlines() if line.strip() and '"""' not in line]
    assert len(body) <= 15


def test_data_is_long_small_and_licensed(ecg: ModuleType) -> None:
    file = DATA / "ecg.csv"
    assert len(file.read_text().split()) - 1 >= 10_000
    assert file.stat().st_size <= 300_000
    assert ecg.load().isfinite().all()
    about = (DATA / "README.md").read_text().split("# pulse.csv")[0]
    for words in ("ecg.csv", "Source", "scipy/misc/ecg.dat", "SciPy 1.9.3", "Licence", "3-clause BSD", "ODC-By 1.0", "360 Hz", "Changed"):
        assert words in about


def test_hamiltonian(shown: Callable[[str], dict[str, list[str]]]) -> None:
    rows = shown("hamiltonian")
    assert len({loss for loss, _ in losses(rows)}) == len(losses(rows)) == 3
    assert all(abs(a - b) <= 1e-5 * a for a, b in losses(rows))
    assert float(rows["loss at the end"][1]) < 0.1 * losses(rows)[0][0]
    assert float(rows["largest difference of the two predictions (rad)"][1]) <= 1e-5
