"""What `explain` says: the Jacobian in matrix form against autograd, tables, HTML, LaTeX, pictures, and where a call's time goes."""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqparc
from seqparc import ir
from seqparc.codegen import build
from seqparc.explain import _entries
from seqparc.explanation import Explanation
from seqparc.formula import formula
from seqparc.passes.matrices import Form, Matrix, NoFormError, matrix_form
from seqparc.runtime.interpreter import TorchKernel
from seqparc.runtime.run import Values, streams_of
from tests.cells import CELLS


class TwoInARow(nn.Module):
    """A hidden layer inside the recurrence."""

    def __init__(self, inputs: int, n: int, width: int = 5) -> None:
        super().__init__()
        self.hidden_size = n
        self.up, self.down = nn.Linear(n, width), nn.Linear(width, n)
        self.w = nn.Linear(inputs, n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + self.down(torch.tanh(self.up(h))))


class Joined(nn.Module):
    """One weight for input and state together, a maximum over the state, and a product of two parts of it."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__()
        self.hidden_size = n
        self.w = nn.Linear(inputs + n, n)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = torch.sin(self.w(torch.cat((x, h), -1))) + 0.1 * h.amax(-1, keepdim=True)
        return h * h.flip(-1) / (1 + h.square().sum(-1, keepdim=True))


class Read(nn.Module):
    """Two leaves of state and an output of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch, 4), torch.zeros(batch, 4)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = self.cell(x, state)
        return self.out(h), (h, c)


MORE: dict[str, tuple[Callable[[], Any], int]] = {
    "two in a row": (lambda: TwoInARow(3, 4), 3), "joined": (lambda: Joined(3, 4), 3), "GRU 64": (lambda: nn.GRUCell(4, 64), 4),
}  # fmt: skip


def dense(m: Matrix, values: dict[ir.Value, Tensor]) -> Tensor:
    """A matrix with its numbers."""
    at = torch.from_numpy(m.entries.array.astype(np.int64))
    return torch.zeros(m.shape, dtype=torch.float64).index_put((at[:, 0], at[:, 1]), values[m.value][at[:, 2]], accumulate=True)


def numbers(form: Form, rnn: seqparc.CompiledRNN, x: Tensor, start: list[Tensor]) -> Tensor:
    """The matrix form with numbers for its vectors, by the interpreter: ∂(next state)/∂(state) at x[0, 0]."""
    plan = rnn.engine(x).plan  # type: ignore[union-attr]
    terms = [t for block in form.blocks.values() for t in block]
    wanted = list(dict.fromkeys(v for t in terms for v in (t.left, *(v for m, d in t.chain for v in (m.value, d)))))
    stores = tuple(ir.Store(k, ir.Index(np.arange(v.size)[None]), v) for k, v in enumerate(wanted))
    kernel = TorchKernel(replace(plan.core, emits=stores, sums=()), torch.float64)
    made = Values(rnn.understand(x)[0], lambda name: plan.attributes[name]())
    weights = [w.detach().reshape(-1) for w in made.of(plan.weights)]
    fixed = {v: kernel.pick(weights[v.slot], v.index) for v in kernel.order if isinstance(v, ir.Leaf) and v.kind == "param"}
    streams = [s.detach()[:, :1].transpose(0, 1) for s in streams_of(plan, made)]
    flat = torch.cat([s.reshape(1, 1, -1) for s in start], -1)
    values = {v: t[0, 0, 0].expand(v.size) for v, t in kernel.evaluate(flat, streams, fixed).items()}
    at = np.concatenate([[0], np.cumsum(form.sizes)])
    jacobian = torch.zeros(int(at[-1]), int(at[-1]), dtype=torch.float64)
    for (i, j), block in form.blocks.items():
        for t in block:
            product = torch.diag(values[t.left])
            for m, d in t.chain:
                product = product @ dense(m, values) @ torch.diag(values[d])
            jacobian[at[i] : at[i + 1], at[j] : at[j + 1]] += product
    return jacobian


@pytest.mark.parametrize("name", [*CELLS, *MORE])
def test_the_matrix_form_is_the_jacobian(name: str) -> None:
    """On random numbers, against autograd through the cell itself."""
    make, inputs = MORE[name] if name in MORE else (CELLS[name].make, CELLS[name].inputs)
    rnn = seqparc.compile(make().double())
    x = torch.randn(1, 2, inputs, dtype=torch.float64)
    _, convention, zeros = rnn.understand(x)
    start = [torch.rand_like(s) + 0.1 for s in zeros]
    form = matrix_form(rnn.engine(x).plan.core)  # type: ignore[union-attr]

    def step(*state: Tensor) -> Tensor:
        return torch.cat([s.reshape(-1) for s in convention.call(rnn.cell, [x[:, 0]], list(state))[1]])

    columns = torch.autograd.functional.jacobian(step, tuple(start))
    truth = torch.cat([c.reshape(sum(form.sizes), -1) for c in columns], 1)
    torch.testing.assert_close(numbers(form, rnn, x, start), truth, rtol=1e-11, atol=1e-12)


def said(cell: Any, inputs: int) -> tuple[str, ...]:
    rnn = seqparc.compile(cell)
    return formula(rnn.engine(torch.zeros(1, 2, inputs)).plan, cell).text()  # type: ignore[union-attr]


def test_the_matrix_form_reads_as_one_would_write_it() -> None:
    assert said(nn.RNNCell(3, 5), 3)[0] == "J = diag(1 - g1^2) W1"
    assert said(CELLS["affine"].make(), 3) == ("J = W1", "W1 = a.weight, 6 × 6")
    two = said(TwoInARow(3, 4), 3)
    assert two[0] == "J = diag(1 - g1^2) W1 diag(1 - g2^2) W2"
    assert two[-2:] == ("W1 = down.weight, 4 × 5", "W2 = up.weight, 5 × 4")
    gru = said(nn.GRUCell(3, 10), 3)
    assert gru[0] == "J = diag(g1) + diag(g3*(1 - g1)*(1 - g2^2)) W1 + diag(a1*(1 - g1)) W2 + diag(g1*(1 - g1)*(-g2 + s)) W3"
    assert "W1 = weight_hh[20:30], 10 × 10" in gru
    assert any(re.fullmatch(r"g2 = tanh\(.*g3\*\(\(W1 s\) \+ bias_hh\[20:30\]\)\)", line) for line in gru)
    blocks = said(CELLS["block GRU"].make(), 72)  # with the names that its lines give, and its parameter u told from the input
    assert blocks[0].endswith("+ diag(z)") and "W1 = cell.u[0], 24 × 24, 8 blocks of 3 × 3 on its diagonal" in blocks
    assert said(nn.LSTMCell(3, 4), 3)[0].startswith("J = J00, J01; J10, J11")


def test_a_jacobian_that_nobody_would_read_is_not_written() -> None:
    class Deep(nn.Module):
        hidden_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            for layer in self.layers:
                h = h + torch.tanh(layer(h))
            return torch.tanh(h + x)

    rnn = seqparc.compile(Deep())
    plan = rnn.engine(torch.zeros(1, 2, 2)).plan  # type: ignore[union-attr]
    with pytest.raises(NoFormError, match="more than 48 ways"):
        matrix_form(plan.core)
    assert "no matrix form" in formula(plan, rnn.cell).text()[0]


def test_complex_states_are_pairs(quick: None) -> None:
    rnn = seqparc.compile(lambda x, h: (0.8 + 0.3j) * h + x, state=torch.zeros(2, dtype=torch.complex64))
    told = rnn.explain(torch.randn(2, 30, 2, dtype=torch.complex64))
    assert told.pattern.shape == (4, 4) and told.formula.text()[0].startswith("J = ") and list(told.timeline.parts) == ["forward"]


# -- the forms it comes in -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> Any:
    """Of a cell with chunks, a readout and an awkward name, called before; its kernels are not optimised, which is quicker."""
    name = "<b>& \\alpha $x$ [red]</b>"
    rnn = seqparc.compile(Read(), name=name, options={"strategy": "shooting", "chunks": 4, "warmup": 2})
    x = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O2" else flag for flag in build.FLAGS))
        rnn(x)[0].sum().backward()
        before = rnn.stats
        made = rnn.explain(x)
    assert rnn.stats == before  # measuring is nothing that the cell's engine did
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rnn.parameters())
    return made


def balanced(latex: str) -> bool:
    """Braces close in order, and so do \\left and \\right and environments."""
    depth = 0
    for sign in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if sign == "{" else -1
        if depth < 0:
            return False
    begun, ended = (re.findall(rf"\\{word}{{(\w+\*?)}}", latex) for word in ("begin", "end"))
    return not depth and latex.count(r"\left") == latex.count(r"\right") and sorted(begun) == sorted(ended)


KNOWN = set("""begin end left right frac partial operatorname mathrm mathbb mathsf text times in sigma tanh sin cos sqrt exp log begin end
    max min left right""".split())  # fmt: skip


def test_latex_is_sound(told: Any) -> None:
    found = [told.to_latex()]
    for name, inputs in (("elementwise GRU", 21), ("two levels", 3), ("layer norm GRU", 3), ("sLSTM", 20)):
        cell = CELLS[name].make()
        plan = seqparc.compile(cell).engine(torch.zeros(1, 1, inputs)).plan  # type: ignore[union-attr]
        form = formula(plan, cell)
        found.append(Explanation(name, (), plan.structure.pattern, tuple(_entries(plan)), told.stats, formula=form).to_latex())
    for latex in found:
        assert balanced(latex) and latex.isascii(), latex
        assert set(re.findall(r"\\([a-zA-Z]+)", latex)) <= KNOWN, set(re.findall(r"\\([a-zA-Z]+)", latex)) - KNOWN
    first = "\\begin{align*}\nJ = \\frac{\\partial s'}{\\partial s} &= \\begin{pmatrix} J_{00} & J_{01} \\\\ J_{10} & J_{11}"
    assert found[0].startswith(first)
    assert "s'_{0}" in found[1] and "tanh" in found[1]
    assert not balanced("}{") and not balanced(r"\left(")
    mathtext = pytest.importorskip("matplotlib.mathtext")
    parser = mathtext.MathTextParser("path")
    lines = [line for latex in found[:2] for line in latex.split("\n")[1:-1] if "pmatrix" not in line and len(line) < 100]
    for line in lines:
        parser.parse("$" + line.removesuffix(r" \\").replace("&", "") + "$")
    assert len(lines) > 8


def test_html_has_no_scripts_and_no_names_as_markup(told: Any) -> None:
    shown = told._repr_html_()
    assert "&lt;b&gt;&amp; \\alpha $x$ [red]&lt;/b&gt;" in shown and "<b>" not in shown
    assert not re.search(r"<script|<link|http|@import|\bon\w+=", shown)
    assert not re.search(r"(?<![-\w])color:(?!inherit)", shown)  # text in the page's own colour, on light and dark
    for tag in ("table", "tr", "td", "th", "pre", "caption"):
        assert len(re.findall(rf"<{tag}[ >]", shown)) == shown.count(f"</{tag}>")


def test_a_page_is_a_whole_document(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = told.page()  # without matplotlib there is no picture in it
    assert page.startswith("<!doctype html>") and told._repr_html_() in page and "<title>&lt;b&gt;" in page and "<img" not in page
    assert "charset='utf-8'" in page and "light dark" in page


def test_a_terminal_has_tables_and_a_file_has_text(told: Any) -> None:
    from rich.console import Console

    plain = str(told)
    assert "\x1b" not in plain and "[red]" in plain and "time of a call" in plain and "J01 = diag(" in plain
    console = Console(width=140, force_terminal=True, record=True)
    with console.capture() as capture:
        console.print(told)
    coloured = capture.get()
    assert "\x1b" in coloured and "█" in coloured and "[red]" in coloured


def test_the_time_of_a_call_is_what_its_parts_take(told: Any) -> None:
    times = told.timeline
    assert set(times.parts) == {"forward", "backward"} and 3 <= times.runs <= 7 and (times.batch, times.steps, times.whole) == (2, 200, 200)
    for direction, parts in times.parts.items():
        middle, least, most = times.total[direction]
        assert 0 < least <= middle <= most and all(t >= 0 for t in parts.values())
        assert sum(parts.values()) == pytest.approx(middle, rel=1e-6)
        assert parts["kernel"] > 0
    assert "readout" in times.parts["forward"] and "weights' gradients, memory" in times.parts["backward"]
    lines = dict(told.sections)["time of a call"]
    assert any(line.startswith("  kernel: ") and line.endswith("%") for line in lines)
    assert told.as_dict()["seconds"]["parts"]["forward"]["kernel"] == times.parts["forward"]["kernel"]


def test_a_cell_that_was_not_called_is_run_for_the_explanation(quick: None) -> None:
    rnn = seqparc.compile(CELLS["elementwise GRU"].make())
    with torch.no_grad():
        told = rnn.explain(torch.randn(1, 50, 21))
    assert rnn.stats.backend == "" and not rnn.kernels() and list(told.timeline.parts) == ["forward"]
    assert told.stats.backend == "c" and "not called yet" in str(told)
    assert "not measured" in dict(rnn.explain(torch.randn(0, 5, 21)).sections)["time of a call"][0]


def test_the_picture_says_what_it_shows(told: Any, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    told.plot(path := tmp_path / "told.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    coded = re.search(r"data:image/svg\+xml;base64,([\w+/=]+)", told.page())
    assert coded is not None
    drawn = base64.b64decode(coded[1]).decode()
    assert drawn.startswith("<?xml") and "<svg" in drawn and "<script" not in drawn
    for words in ("State Jacobian: 40 of 64 entries", "time [steps]", "tolerance", "time [ms], median of", "readout"):
        assert words in drawn  # as comments beside the letters' shapes
    rows = told.rows["forward"]
    assert [r.first for r in rows] == [0, 50, 100, 150] and [r.lead for r in rows] == [0, 2, 2, 2] and {r.length for r in rows} == {50}
    with pytest.raises(seqparc.SeqparcError, match=r"\.png or \.svg"):
        told.plot(tmp_path / "told.gif")


def test_a_picture_without_matplotlib_says_what_to_do(told: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(seqparc.SeqparcError, match=r"seqparc\[demo\]"):
        told.plot(tmp_path / "told.png")
