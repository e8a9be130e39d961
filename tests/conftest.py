"""Every run starts from an empty cache of its own, verifies the IR after every pass, and uses two threads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the run that starts them
    _CACHE = tempfile.TemporaryDirectory(prefix="seqparc-tests-")
    os.environ["SEQPARC_CACHE"] = _CACHE.name
os.environ["SEQPARC_VERIFY"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test says of passes and chunks may not depend on how busy the machine is; tests that are about the clock are marked."""
    if "clocked" not in request.keywords:
        from seqparc.runtime.engine import Engine

        monkeypatch.setattr(Engine, "by_the_clock", False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled without optimisation, in half the time: where a test is about what is computed, and others are about how."""
    from seqparc.codegen import build

    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O2" else flag for flag in build.FLAGS))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in a place that a shell would stumble over, and nothing remembered of another."""
    from seqparc import store

    folder = tmp_path / 'a "cache"; l\'été $HOME #1'
    monkeypatch.setenv("SEQPARC_CACHE", str(folder))
    monkeypatch.setattr(store, "_private", None)
    monkeypatch.setattr(store, "_said", False)
    return folder


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that came so far was answered by a replay."""
    from seqparc.runtime.replay import Replay

    seen: list[bool] = []
    real = Replay.run

    def run(self: Replay, *args: Any) -> Any:
        seen.append((answer := real(self, *args)) is not None)
        return answer

    monkeypatch.setattr(Replay, "run", run)
    return seen
