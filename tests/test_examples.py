"""The demo runs, learns and draws; what it ships is recorded data with a source and a licence."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = EXAMPLES / "data"


@pytest.fixture(scope="module")
def ecg() -> ModuleType:
    """The demo as a module; it is a script, in no package."""
    spec = importlib.util.spec_from_file_location("examples_ecg", EXAMPLES / "ecg.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


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
