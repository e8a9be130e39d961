"""Bad input, missing tools, spoilt files: each has its error or its announced fallback, and never a wrong number."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import store
from seqparc.codegen import build
from seqparc.errors import SeqparcWarning

HERE = Path(__file__).name


class Plain(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Parameter(torch.linspace(-0.8, 0.8, n))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w * h + x)


def same_as_loop(rnn: seqparc.CompiledRNN, x: Tensor, grad: bool = False) -> None:
    y, right = rnn(x)[0], rnn.sequential(x)[0]
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6, equal_nan=True)
    if grad:
        mine, theirs = (torch.autograd.grad(v.sum(), list(rnn.parameters())) for v in (y, right))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# -- cells -----------------------------------------------------------------------------------------------------------


def test_a_state_that_changes_shape() -> None:
    rnn = seqparc.compile(lambda x, h: torch.cat((h, x), -1), state=torch.zeros(3))
    with pytest.raises(seqparc.StateError, match=r"comes out as float32\[\d+, 6\]"):
        rnn(torch.zeros(2, 5, 3))


def test_a_state_that_changes_dtype() -> None:
    rnn = seqparc.compile(lambda x, h: (h + x).double(), state=torch.zeros(3))
    with pytest.raises(seqparc.StateError, match="float64"):
        rnn(torch.zeros(2, 5, 3))


def test_a_state_that_cannot_be_found() -> None:
    rnn = seqparc.compile(lambda x, h: torch.tanh(h + x))
    with pytest.raises(seqparc.StateError, match="four ways"):
        rnn(torch.zeros(2, 5, 3))


def test_a_decision_made_from_a_value_names_the_line() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        if h.sum() > 0:
            return h * 0.5 + x
        return x

    with pytest.raises(seqparc.TraceError, match=rf"{HERE}:\d+.*torch.where"):
        seqparc.compile(cell, state=torch.zeros(3))(torch.zeros(2, 5, 3))


def test_a_number_taken_out_of_a_tensor() -> None:
    with pytest.raises(seqparc.TraceError, match=HERE):
        seqparc.compile(lambda x, h: h * float(x.mean()), state=torch.zeros(3))(torch.zeros(2, 5, 3))


def test_an_unknown_operation_goes_to_the_torch_backend_and_says_so() -> None:
    rnn = seqparc.compile(lambda x, h: 0.5 * torch.special.bessel_j0(h) + x, state=torch.zeros(3))
    x = torch.randn(2, 6, 3)
    with pytest.warns(SeqparcWarning, match=rf"{HERE}:\d+.*bessel_j0"):
        y, _ = rnn(x)
    assert torch.allclose(y, rnn.sequential(x)[0], atol=1e-6)
    assert rnn.stats.backend == "torch" and "bessel_j0" in str(rnn.explain())
    rnn(x)  # and says it once


def test_an_unknown_operation_before_the_core_is_no_matter() -> None:
    rnn = seqparc.compile(lambda x, h: 0.5 * torch.tanh(h) + torch.special.bessel_j0(x), state=torch.zeros(3))
    same_as_loop(rnn, torch.randn(2, 6, 3))
    assert rnn.stats.backend == "c"


class Counting(nn.Module):
    """Changes a buffer of its own at every step."""

    hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.steps += 1
        return torch.tanh(h + x) * self.steps


def test_a_buffer_changed_in_place() -> None:
    cell = Counting()
    with pytest.raises(seqparc.TraceError, match=rf"{HERE}:\d+ changes the parameter or buffer steps in place"):
        seqparc.compile(cell)(torch.zeros(2, 5, 3))
    assert cell.steps == 0  # and the attempt left it as it was


def test_fresh_tensors_may_be_written_in_place() -> None:
    def cell(x: Tensor, h: Tensor) -> Tensor:
        new = torch.zeros_like(h)
        new[:, 0] = 0.5 * h[:, 1] + x[:, 0]
        new[:, 1:] = torch.tanh(h[:, :-1]) + x[:, 1:]
        new[:, 1].mul_(0.5)
        return new

    same_as_loop(seqparc.compile(cell, state=torch.zeros(3)), torch.randn(2, 20, 3))


def test_samples_that_see_each_other() -> None:
    with pytest.raises(seqparc.SeqparcError, match=r"one sample of the batch|let"):
        seqparc.compile(lambda x, h: torch.tanh(h - h.mean(0)) + x, state=torch.zeros(3))(torch.randn(2, 5, 3))


def test_random_numbers_run_as_the_loop_and_say_so() -> None:
    rnn = seqparc.compile(lambda x, h: torch.tanh(h + x + 0.1 * torch.bernoulli(torch.sigmoid(h))), state=torch.zeros(3))
    with pytest.warns(SeqparcWarning, match=rf"{HERE}:\d+: random numbers that depend on more than a shape"):
        rnn(torch.zeros(2, 5, 3))
    assert rnn.stats.backend == "eager"


# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 0, 4), (5,)], ids=["no steps", "nothing", "no time axis"])
def test_shapes_without_a_run(shape: tuple[int, ...]) -> None:
    with pytest.raises(seqparc.ShapeError):
        seqparc.compile(Plain())(torch.zeros(shape))


def test_leaves_that_disagree_about_time() -> None:
    rnn = seqparc.compile(lambda x, h: torch.tanh(h + x[0] + x[1]), state=torch.zeros(3))
    with pytest.raises(seqparc.ShapeError, match="disagree"):
        rnn((torch.zeros(2, 5, 3), torch.zeros(2, 6, 3)))
    rnn((torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)))
    with pytest.raises(seqparc.ShapeError, match="disagree"):  # also once it knows such calls
        rnn((torch.zeros(2, 5, 3), torch.zeros(2, 6, 3)))


def test_wrong_dtype_and_device() -> None:
    rnn = seqparc.compile(Plain())
    with pytest.raises(seqparc.ShapeError, match=r"float64.*\.to\(dtype\)"):
        rnn(torch.zeros(2, 5, 4, dtype=torch.float64))
    with pytest.raises(seqparc.ShapeError, match="meta"):
        rnn(torch.zeros(2, 5, 4, device="meta"))
    with pytest.raises(seqparc.ShapeError, match="meta"):
        rnn(torch.zeros(2, 5, 4), torch.zeros(2, 4, device="meta"))


def test_a_state_of_another_batch() -> None:
    with pytest.raises(seqparc.StateError, match="batch 2"):
        seqparc.compile(Plain())(torch.zeros(2, 5, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("strategy", ["sequential", "shooting", "newton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["c", "torch"])
def test_a_bad_row_stays_in_its_row(bad: float, strategy: str, backend: str) -> None:
    for cell in (Plain(), nn.GRUCell(4, 12)):
        rnn = seqparc.compile(cell, backend=backend, options={"strategy": strategy})
        x = torch.randn(3, 50, 4)
        x[1, 20, 2] = bad
        y, eager = rnn(x)[0], rnn.sequential(x)[0]
        assert torch.equal(y.isnan(), eager.isnan())
        assert bool(y[[0, 2]].isfinite().all())
        torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="unknown option 'speed'"):
        seqparc.compile(Plain(), options={"speed": 1})
    for wrong in ({"strategy": "fast"}, {"chunks": 0}, {"backend": "fortran"}, {"atol": -1.0}):
        with pytest.raises(ValueError, match="Options"):
            seqparc.compile(Plain(), options=wrong)
    with pytest.raises(seqparc.SignatureError, match="int"):
        seqparc.compile(3)


def test_divergence_can_be_an_error_or_a_warning() -> None:
    def logistic(x: Tensor, h: Tensor) -> Tensor:
        return 3.9 * h * (1 - h) + 0 * x

    x, h = torch.zeros(1, 400, 2), torch.full((1, 2), 0.3)
    options = {"strategy": "shooting", "chunks": 40, "update": "none"}
    with pytest.raises(seqparc.ConvergenceError, match="sequential") as caught:
        seqparc.compile(logistic, options={**options, "on_divergence": "raise"})(x, h)
    assert caught.value.gap > 1e-3 and caught.value.best is not None
    rnn = seqparc.compile(logistic, options={**options, "on_divergence": "warn"})
    with pytest.warns(SeqparcWarning, match="finished sequentially"):
        y, _ = rnn(x, h)
    alone = seqparc.compile(logistic, options={"strategy": "sequential"})
    assert torch.equal(y, alone(x, h)[0])  # the sequential kernel finished it, bit for bit
    assert not rnn.stats.converged and rnn.stats.fallback


# -- the toolchain and the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "c"])
@pytest.mark.parametrize("missing", [{"PATH": ""}, {"CC": "no-such-compiler"}], ids=["empty PATH", "CC that is not there"])
def test_no_compiler_is_announced(missing: dict[str, str], backend: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in missing.items():
        monkeypatch.setenv(name, value)
    if "PATH" in missing:
        monkeypatch.delenv("CC", raising=False)
    rnn = seqparc.compile(Plain(), backend=backend)
    x = torch.randn(2, 20, 4)
    with pytest.warns(SeqparcWarning, match="compiler"):
        rnn(x)
    same_as_loop(rnn, x, grad=True)
    assert rnn.stats.backend == "torch"


def test_a_compiler_that_fails_shows_what_it_said(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "failing-cc"
    script.write_text("#!/bin/sh\necho 'the moon is full' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    rnn = seqparc.compile(Plain())
    x = torch.randn(2, 20, 4)
    with pytest.warns(SeqparcWarning, match="the moon is full"):
        rnn(x)
    same_as_loop(rnn, x, grad=True)


def test_a_compiler_that_makes_rubbish(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "rubbish-cc"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; [ $# = 0 ] && exit 0; done\necho rubbish > "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    rnn = seqparc.compile(Plain())
    x = torch.randn(2, 20, 4)
    with pytest.warns(SeqparcWarning, match="cannot be loaded"):
        rnn(x)
    same_as_loop(rnn, x, grad=True)


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang here")
def test_clang_will_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "clang")
    rnn = seqparc.compile(Plain())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no OpenMP library", category=SeqparcWarning)
        same_as_loop(rnn, torch.randn(2, 200, 4), grad=True)
    assert rnn.stats.backend == "c"


def test_the_cache_is_private_and_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 20, 4)
    with torch.no_grad():  # else the backward kernel is begun as well
        seqparc.compile(Plain())(x)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    objects = sorted(p.name for p in fresh.glob("*.so"))
    assert len(objects) == 1 and not list(fresh.glob("build-*"))
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("compiled again"))
    with torch.no_grad():
        same_as_loop(seqparc.compile(Plain()), x)


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        path.write_bytes(bytes([*data[:-100], *(b ^ 255 for b in data[-100:])]))
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_spoilt_object_is_made_again(how: str, fresh: Path) -> None:
    # In a process of its own: one that is loaded stays loaded.
    code = f"""
import torch, seqparc
from tests.{Path(__file__).stem} import Plain, same_as_loop
torch.manual_seed(0)
rnn = seqparc.compile(Plain())
with torch.no_grad():
    same_as_loop(rnn, torch.randn(2, 20, 4))
assert rnn.stats.backend == 'c'
"""
    command, root = [sys.executable, "-W", "error", "-c", code], Path(__file__).parent.parent
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert done.returncode == 0, done.stderr
        (found,) = fresh.glob("*.so")
        spoil(found, how)


@pytest.mark.parametrize("what", ["compiler", "rates"])
def test_a_spoilt_fact_is_found_again(what: str, fresh: Path) -> None:
    assert store.remembered(what, "key", lambda: [1, 2]) == [1, 2]
    (path,) = fresh.glob(f"{what}-*.json")
    assert store.remembered(what, "key", lambda: pytest.fail("made again")) == [1, 2]
    path.write_text("[1,")
    assert store.remembered(what, "key", lambda: [3]) == [3]


def unusable(folder: Path, how: str) -> None:
    if how == "a file":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
        folder.chmod(0o777 if how == "open to all" else 0o500)


@pytest.mark.parametrize("how", ["a file", "open to all", "read-only"])
def test_a_cache_that_cannot_be_used_is_announced(how: str, fresh: Path) -> None:
    if how == "read-only" and os.getuid() == 0:
        pytest.skip("root may write anywhere")
    unusable(fresh, how)
    rnn = seqparc.compile(Plain())
    x = torch.randn(2, 20, 4)
    with pytest.warns(SeqparcWarning, match="SEQPARC_CACHE"):
        rnn(x)
    same_as_loop(rnn, x)
    assert rnn.stats.backend == "c"
    assert how == "a file" or not list(fresh.iterdir())


def test_a_read_only_cache_as_another_user(fresh: Path, tmp_path: Path) -> None:
    """Root may write to a read-only folder, so the refusal is made to happen."""
    unusable(fresh, "read-only")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.tempfile, "TemporaryFile", refuse)
        rnn = seqparc.compile(Plain())
        with pytest.warns(SeqparcWarning, match="Permission denied"):
            rnn(torch.randn(2, 20, 4))
    assert not list(fresh.iterdir())
