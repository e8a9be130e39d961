"""Autocast, and x of other dtypes than the parameters: what comes out is of the loop's dtypes, and the loop's numbers to their rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import seqparc
from tests.living import gradients
from tests.test_own_gradient import Rough
from tests.test_surface import Gated

pytestmark = pytest.mark.usefixtures("quick")


class Plain(nn.Module):
    """Its state comes out of layers, so of autocast's dtype, whatever it starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 5
        self.w, self.u = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.w(x) + self.u(h))


class Two(nn.Module):
    """One state of autocast's dtype and one that is kept in float32; the output is a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.read = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def init_state(self, batch: int) -> dict[str, Tensor]:
        return {"fast": torch.zeros(batch, 5), "slow": torch.zeros(batch, 5)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        fast = torch.tanh(self.w(x) + self.u(state["fast"]))
        slow = 0.9 * state["slow"] + 0.1 * fast.float()
        return self.read(slow), {"fast": fast, "slow": slow}


class Rounded(Plain):
    """A gradient of its own."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return Rough.apply(self.w(x) + self.u(h))  # type: ignore[no-any-return]


def loop(cell: Any, x: Tensor, state: Any) -> Any:
    """The plain loop as anybody writes it."""
    rows = []
    for t in range(x.shape[1]):
        result = cell(x[:, t], state)
        out, state = result if isinstance(cell, Two) else (result, result)
        rows.append(out)
    return tree_map(lambda *row: torch.stack(row, 1), *rows), state


def start(cell: Any, *, ones: bool) -> Any:
    made = cell.init_state(2) if isinstance(cell, Two) else tuple(torch.zeros(2, 5) for _ in range(1 + isinstance(cell, nn.LSTMCell)))
    made = made if isinstance(cell, (Two, nn.LSTMCell)) else made[0]
    return tree_map(lambda s: s + 0.5 * ones, made)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain, "two": Two, "GRU": lambda: nn.GRUCell(3, 5), "LSTM": lambda: nn.LSTMCell(3, 5), "own gradient": Rounded
}  # fmt: skip


def agree(mine: Any, right: Any, dtype: torch.dtype, wanted: list[Tensor]) -> None:
    """Same dtypes; results to a few units of the lower dtype, gradients to some more."""
    unit = torch.finfo(dtype).eps
    for a, b in zip(tree_leaves(mine), tree_leaves(right), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2 * unit * max(1.0, float(b.abs().max())))
    for a, b in zip(gradients(mine, wanted), gradients(right, wanted), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=8 * unit * float(b.abs().max()))


@pytest.mark.parametrize("name", CELLS)
def test_a_loop_under_autocast(name: str) -> None:
    """From a state or from the initial one, in either order of modes, of the dtypes that autocast may have."""
    cell = CELLS[name]()
    backend = "c" if name in ("plain", "GRU") else "torch"
    rnn, x = seqparc.compile(cell, backend=backend), torch.randn(2, 16, 3).requires_grad_()
    wanted = [x, *cell.parameters()]
    for dtype, given in ((torch.bfloat16, False), (torch.float16, False), (None, False), (torch.bfloat16, True)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            state = start(cell, ones=given)
            right = loop(cell, x, state)
            mine = rnn(x, state) if given else rnn(x)
        agree(mine, right, dtype or torch.float32, wanted)
    assert rnn.stats.backend == backend


@pytest.mark.parametrize("name", ["plain", "two"])
def test_lengths_and_resets_under_autocast(name: str) -> None:
    cell = CELLS[name]()
    rnn, x = seqparc.compile(cell, backend="torch"), torch.randn(2, 12, 3)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[1, 5] = True
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, last = rnn(x, lengths=[0, 12], reset=reset)
        first, second = (loop(cell, part, start(cell, ones=False)) for part in (x[:, :5], x[:, 5:]))
    right = torch.cat((first[0][1], second[0][1])), tree_map(lambda s: s[1], second[1])
    for a, b in zip(tree_leaves((y, last)), tree_leaves(right), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a[1], b, rtol=0, atol=2**-6)
        assert not a[0].any()


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_layers_under_autocast(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch computes them from their own operations; a library's layer may cast all of it."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer, x = make(3, 5, batch_first=True), torch.randn(2, 12, 3).requires_grad_()
    compiled = seqparc.compile(layer, backend="torch")
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            mine, right = compiled(given), layer(given)
        agree(mine, right, torch.bfloat16, [x, *layer.parameters()])


class Fickle(nn.Module):
    """Its state is of another dtype at every step."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return (0.5 * h + x).to(torch.float32 if h.dtype is torch.bfloat16 else torch.bfloat16)


def test_a_state_that_has_no_dtype_is_refused() -> None:
    rnn = seqparc.compile(Fickle(), state=torch.zeros(4))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(seqparc.StateError, match="keeps changing its dtypes"):
        rnn(torch.randn(2, 9, 4))


WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("of_x", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_of_another_dtype(dtype: torch.dtype, of_x: torch.dtype) -> None:
    """A cell that promotes is run as it is; one that does not is an error, as where torch says so."""
    cell, x = Gated(5).to(dtype), torch.randn(2, 20, 5).to(of_x).requires_grad_()
    rnn, gru = seqparc.compile(cell, backend="torch"), seqparc.compile(nn.GRUCell(5, 5).to(dtype))
    if torch.promote_types(dtype, of_x) is dtype:
        mine, right = rnn(x), loop(cell, x, torch.zeros(2, 5, dtype=dtype))
        torch.testing.assert_close(mine, right)
        agree(mine, right, min(dtype, of_x, key=lambda d: torch.finfo(d).bits), [x, *cell.parameters()])
    else:
        with pytest.raises(seqparc.ShapeError, match=f"x is {of_x}, the cell's parameters are {dtype}"):
            rnn(x)
    if of_x is not dtype:
        with pytest.raises(seqparc.ShapeError, match="convert one with"):
            gru(x)
        with pytest.raises(ValueError, match="does not match weight dtype"):
            seqparc.compile(nn.GRU(5, 5).to(dtype))(x)


class Unknown(Plain):
    """With an operation that is called as it is, in all chunks at once."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        v = self.w(x) + self.u(h)
        return torch.linalg.qr(v.float()[:, :, None] * torch.ones(5) + torch.eye(5))[1].diagonal(0, -1, -2).tanh()


def test_a_cell_that_is_called_itself_is_called_under_autocast() -> None:
    rnn, x = seqparc.compile(Unknown()), torch.randn(2, 12, 3).requires_grad_()
    wanted = [x, *rnn.parameters()]
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            right = loop(rnn.cell, x, torch.zeros(2, 5))
            with pytest.warns(seqparc.SeqparcWarning, match="by calls of the cell"):
                mine = rnn(x)
        torch.testing.assert_close(mine, right)  # the very casts of the loop
        agree(mine, right, torch.bfloat16, wanted)
