"""The public names: compile as call and decorator, step, sequential, validate, explain, kernels, stats, copies, the shell."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc.__main__ import main


class Gated(nn.Module):
    """An elementwise gated cell."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Parameter(torch.linspace(-0.8, 0.8, 2 * n).reshape(2, n))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = torch.sigmoid(self.w[0] * h + x)
        return z * h + (1 - z) * torch.tanh(self.w[1] * h - x)


def compiled_gated() -> seqparc.CompiledRNN:
    """For the command line tests."""
    return seqparc.compile(Gated())  # type: ignore[no-any-return]


def logistic(x: Tensor, h: Tensor) -> Tensor:
    """A chaotic map: no float32 run stays near the float64 one."""
    return 3.9 * h * (1 - h) + x


def sequence(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_step_by_step_is_the_whole_run() -> None:
    rnn = seqparc.compile(Gated())
    x = sequence(2, 20, 6)
    y, last = rnn(x)
    state, rows = None, []
    for t in range(20):
        row, state = rnn.step(x[:, t], state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), y)
    torch.testing.assert_close(state, last)
    eager, eager_last = rnn.sequential(x)
    torch.testing.assert_close(y, eager)
    torch.testing.assert_close(last, eager_last)


def test_decorator_on_a_function_and_on_a_class() -> None:
    @seqparc.compile
    def leaky(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(0.9 * h + x)

    Fast = seqparc.compile(Gated)
    x = sequence(1, 30, 6)
    y, _ = leaky(x, torch.zeros(1, 6))
    torch.testing.assert_close(y, leaky.sequential(x, torch.zeros(1, 6))[0])
    rnn = Fast(6)
    assert isinstance(rnn, seqparc.CompiledRNN) and isinstance(rnn.cell, Gated)
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0])


def test_the_parameters_stay_the_users() -> None:
    cell = Gated()
    rnn = seqparc.compile(cell)
    assert rnn.cell is cell
    x = sequence(2, 40, 6)
    rnn(x)
    assert list(rnn.state_dict()) == ["cell.w"]
    assert next(rnn.parameters()) is cell.w
    x = sequence(2, 40, 6)
    before = rnn(x)[0]
    with torch.no_grad():
        cell.w.mul_(0.5)
    after = rnn(x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, rnn.sequential(x)[0])


class Stepped(nn.Module):
    """A cell whose step is not its forward; it has dropout, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.dropout, self.gain = nn.Parameter(torch.rand(6)), nn.Dropout(0.5), 0.5

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w * h + self.gain * self.dropout(x))


def test_a_method_brings_its_modules_parameters() -> None:
    cell = Stepped()
    rnn = seqparc.compile(cell.step, state=torch.zeros(6))
    assert rnn.cell == cell.step
    assert list(rnn.state_dict()) == ["cell.w"] and next(rnn.parameters()) is cell.w
    x = sequence(2, 40, 6)
    y = rnn.eval()(x)[0]
    assert not cell.dropout.training
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(twin(x)[0], y)
        with torch.no_grad():
            next(twin.parameters()).zero_()
        torch.testing.assert_close(twin(x)[0], twin.sequential(x)[0])
        assert torch.equal(rnn(x)[0], y)


@pytest.mark.parametrize("how", ["method", "function", "partial"])
def test_modes_and_numbers_of_modules_that_a_function_uses_count(how: str) -> None:
    module = Stepped()

    def through(x: Tensor, h: Tensor) -> Tensor:
        return module.step(x, h)

    def given(x: Tensor, h: Tensor, m: Stepped) -> Tensor:
        return m.step(x, h)

    cell = {"method": module.step, "function": through, "partial": functools.partial(given, m=module)}[how]
    rnn = seqparc.compile(cell, state=torch.zeros(6))
    x, seen = sequence(2, 40, 6), []
    for change in (lambda: None, module.eval, lambda: setattr(module, "gain", 2.0), module.train):
        change()
        torch.manual_seed(1)
        seen.append(rnn(x)[0])
        torch.manual_seed(1)
        torch.testing.assert_close(seen[-1], rnn.sequential(x)[0])
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stand_alone(how) -> None:  # type: ignore[no-untyped-def]
    rnn = seqparc.compile(Gated())
    x = sequence(2, 40, 6)
    y = rnn(x)[0]
    twin = how(rnn)
    assert torch.equal(twin(x)[0], y)
    with torch.no_grad():
        twin.cell.w.zero_()
    assert torch.equal(rnn(x)[0], y) and not torch.equal(twin(x)[0], y)


def test_a_replaced_parameter_and_a_rebound_variable_count() -> None:
    cell = Gated()
    rnn = seqparc.compile(cell)
    x = sequence(2, 40, 6)
    rnn(x)
    cell.w = nn.Parameter(torch.rand(2, 6))
    torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0])
    scale = torch.tensor(0.5)

    def scaled(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(scale * h + x)

    rnn = seqparc.compile(scaled, state=torch.zeros(6))
    rnn(x)
    for scale in (torch.tensor(-0.3), torch.linspace(-1, 1, 6)):  # noqa: B007  the last has another shape
        torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0])


def test_to_another_dtype_compiles_anew() -> None:
    rnn = seqparc.compile(Gated())
    x = sequence(1, 50, 6)
    rnn(x)
    rnn.double()
    y, _ = rnn(x.double())
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, rnn.sequential(x.double())[0], rtol=1e-13, atol=1e-13)


def test_training_lowers_the_loss_as_the_plain_loop_does() -> None:
    x, goal = sequence(2, 60, 6), sequence(2, 60, 6).tanh()
    losses = {}
    for run in ("compiled", "eager"):
        rnn = seqparc.compile(Gated())
        optimiser = torch.optim.Adam(rnn.parameters(), 0.05)
        losses[run] = []
        for _ in range(5):
            optimiser.zero_grad()
            y, _ = rnn(x) if run == "compiled" else rnn.sequential(x)
            loss = (y - goal).square().mean()
            loss.backward()
            optimiser.step()
            losses[run].append(loss.item())
    assert losses["compiled"][-1] < losses["compiled"][0]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)


def test_validate_measures_and_reports() -> None:
    rnn = seqparc.compile(Gated())
    report = rnn.validate(sequence(2, 300, 6))
    assert report.ok
    assert [r.name for r in report.rows] == ["y", "last", "gradient of x", "gradient of state", "gradient of w"]
    assert all(0 < r.loop < 1e-5 and r.largest <= r.bound for r in report.rows)
    assert all(r.apart <= r.largest + r.loop + 1e-12 and r.ratio == r.largest / r.loop for r in report.rows)
    y, *others = report.rows
    assert len(y.quarters) == 4 and max(q for q, _ in y.quarters) == y.largest and max(q for _, q in y.quarters) == y.loop
    assert not any(r.quarters for r in others) and "by quarters of time" in str(report)
    text = str(report)
    assert "gradient of w" in text and "forward: c" in text and "backward: c" in text
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    assert [r.name for r in rnn.validate(sequence(2, 30, 6), grad=False).rows] == ["y", "last"]


def test_validate_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = seqparc.compile(Gated())
    x = sequence(2, 100, 6)
    assert rnn.validate(x).ok
    honest = rnn.forward

    def off(*args, **kwargs):  # type: ignore[no-untyped-def]
        y, last = honest(*args, **kwargs)
        return y * (1 + 3e-5), last

    monkeypatch.setattr(rnn, "forward", off)
    report = rnn.validate(x)
    assert not report.ok
    assert {r.name for r in report.rows if not r.ok} >= {"y", "gradient of w"}
    assert "WRONG" in str(report)


def test_validate_reaches_parameters_the_cell_closes_over() -> None:
    w = nn.Parameter(torch.tensor(0.7))
    rnn = seqparc.compile(lambda x, h: torch.tanh(w * h + x), state=torch.zeros(3))
    report = rnn.validate(sequence(2, 100, 3))
    assert report.ok
    assert report.rows[-1].name == "gradient of w"


def test_validate_asks_no_more_of_chaos_than_the_plain_loop_gives() -> None:
    report = seqparc.compile(logistic).validate(torch.zeros(1, 200, 2), state=torch.full((1, 2), 0.3), grad=False)
    assert report.rows[0].loop > 1e-3  # the plain loop itself is lost
    assert report.ok


def test_explain_says_what_was_proved(tmp_path: Path) -> None:
    rnn = seqparc.compile(Gated())
    with pytest.raises(seqparc.SeqparcError, match="explain"):
        rnn.explain()
    told = rnn.explain(sequence(2, 30, 6))
    text = str(told)
    assert "diagonal: 6 of 36" in text and "6 lanes per sample, 1 state number" in text and "test_surface.py" in text
    assert "tanh" in told.to_latex()
    assert told._repr_html_().startswith("<table")
    rnn(sequence(2, 30, 6))
    assert "forward: " in str(rnn.explain())
    json.dumps(rnn.explain().as_dict())


def test_explain_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rnn = seqparc.compile(Gated(), options={"strategy": "shooting", "chunks": 4})
    rnn(sequence(2, 100, 6))
    rnn.explain().plot(tmp_path / "told.png")
    assert (tmp_path / "told.png").read_bytes().startswith(b"\x89PNG")


def test_kernels_are_there_to_read() -> None:
    rnn = seqparc.compile(Gated())
    with pytest.raises(seqparc.SeqparcError, match="none yet"):
        rnn.source("c")
    rnn(sequence(2, 30, 6))[0].sum().backward()
    assert set(rnn.kernels()) == {("c", "forward"), ("c", "backward")}
    assert "test_surface.py" in rnn.source("c", "forward")
    assert rnn.kernels()["c", "backward"] == rnn.source("c", "backward")


def test_stats_tell_what_was_done() -> None:
    rnn = seqparc.compile(Gated(), options=seqparc.Options(strategy="shooting", chunks=5))
    rnn(sequence(1, 500, 6).requires_grad_())[0].sum().backward()
    s = rnn.stats
    assert (s.backend, s.strategy, s.chunks, s.chunk_length) == ("c", "shooting", 5, 100)
    assert s.passes == len(s.gaps) >= 1 and s.converged and s.fallback is None and s.compile_seconds > 0
    assert s.backward is not None and s.backward.chunks == 5


@pytest.mark.parametrize("command", ["explain", "validate", "emit"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_shell(command: str, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [command, "tests.test_surface:compiled_gated", "--input", "2,40,6", *(["--json"] if as_json else [])]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)
    else:
        assert {"explain": "diagonal", "validate": "plain loop's own", "emit": "seqparc_run"}[command] in out


def test_shell_doctor_and_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "c backend        ok" in capsys.readouterr().out
    assert main(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] > 0


@pytest.mark.parametrize("target", ["nothing", "no_such_module:cell", "tests.test_surface:absent", "torch.nn:GRUCell"])
def test_shell_names_what_is_wrong(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target, "--input", "1,2,3"]) == 2
    assert target.split(":")[0].split(".")[-1] in capsys.readouterr().err
