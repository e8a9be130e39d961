"""Calls that go as earlier ones went: the answers of the plain loop, whatever changes in between."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import seqparc
from seqparc.codegen.launch import CKernel
from seqparc.kept import Prepared
from seqparc.runtime.routine import AGAIN, ALIKE

from . import replays
from .replays import Scaled, same, settled


def _data(cell: Scaled) -> None:
    cell.u.weight.data.mul_(-1)  # which moves no version of the parameter's


def _other(cell: Scaled) -> None:
    cell.u.weight = nn.Parameter(torch.randn(4, 4))


def _equal(cell: Scaled) -> None:
    old = cell.u.bias
    cell.u.bias = nn.Parameter(old.detach().clone())  # the same numbers elsewhere
    with torch.no_grad():
        old.add_(9)


def _one(cell: Scaled) -> None:
    cell.w.weight.data[0, 0] += 1


def _setting(cell: Scaled) -> None:
    cell.gain = 0.1


def _submodule(cell: Scaled) -> None:
    cell.u = nn.Linear(4, 4)


def _buffer(cell: Scaled) -> None:
    cell.floor.fill_(0.4)


def _narrower(cell: Scaled) -> None:
    cell.out.data = cell.out.data[:1]


def _closed(cell: Scaled) -> None:
    replays.SHIFT = replays.SHIFT + 0.5


def _hook(cell: Scaled) -> None:
    cell.u.register_forward_hook(lambda m, args, out: -out)


CHANGES: dict[str, Callable[[Scaled], Any]] = {
    "data": _data, "other": _other, "equal": _equal, "one": _one, "setting": _setting, "submodule": _submodule, "buffer": _buffer,
    "eval": lambda cell: cell.eval(), "narrower": _narrower, "closed": _closed, "hook": _hook, "double": lambda cell: None,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [2, 5])
def test_what_changes_counts_from_the_next_call_on(change: str, steps: int, replayed: list[bool]) -> None:
    torch.manual_seed(0)
    cell, x = Scaled(), torch.randn(2, steps, 3)
    rnn = settled(cell, x)
    same(rnn, x)
    assert replayed[-1]
    before = rnn(x)[0].detach()
    CHANGES[change](cell)
    if change == "double":
        cell.double()
        x = x.double()
    for _ in range(3):  # the first finds out, and those after it are replays again
        same(rnn, x)
    if change not in ("equal", "double"):
        assert not torch.equal(rnn(x)[0], before)


@pytest.mark.parametrize("cell, inputs", [(nn.GRUCell(3, 5), 3), (nn.LSTMCell(3, 20), 3), (nn.RNNCell(30, 4), 30)])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_other_numbers_in_the_same_shapes(cell: nn.Module, inputs: int, steps: int, replayed: list[bool]) -> None:
    x = torch.randn(2, steps, inputs)
    rnn = settled(cell, x)
    with torch.no_grad():
        _, last = rnn(x)
        for _ in range(ALIKE + 2):
            rnn(x, last)
        kept = torch.utils._pytree.tree_leaves(rnn(x)[0])[0]
        copy = kept.clone()
    for _ in range(3):
        x, state = torch.randn_like(x), torch.utils._pytree.tree_map(torch.randn_like, last)
        same(rnn, x)
        same(rnn, x, state)
    assert replayed[-1] and torch.equal(kept, copy)  # a result is nobody else's memory
    same(rnn, torch.randn(inputs, steps, 2).transpose(0, 2))  # as it lies otherwise


@pytest.mark.clocked
def test_chunks_are_replayed_and_their_gap_is_looked_at(replayed: list[bool]) -> None:
    cell = nn.GRUCell(3, 16)
    x = torch.randn(1, 20_000, 3)
    rnn = settled(cell, x, options={"strategy": "shooting", "chunks": 16, "warmup": 64})
    same(rnn, x)
    assert replayed[-1] and rnn.stats.chunks == 16 and rnn.stats.passes == 1 and rnn.stats.gap > 0
    with torch.no_grad():
        cell.bias_hh[16:32] += 4.5  # remembers for much longer than the warm-up
    same(rnn, x)
    assert not replayed[-1] and rnn.stats.passes > 1


def test_each_counts_and_now_and_then_one_is_watched(replayed: list[bool]) -> None:
    x = torch.randn(1, 3, 3)
    rnn = settled(nn.GRUCell(3, 4), x)
    before = rnn.stats.history.calls
    with torch.no_grad():
        for _ in range(2 * AGAIN):
            rnn(x)
    assert rnn.stats.history.calls - before == 2 * AGAIN and rnn.stats.steps == 3
    assert 1 <= replayed.count(False) <= 4


def test_under_modes_it_is_not_replayed(replayed: list[bool]) -> None:
    class Seen(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 3, 3)
    rnn = settled(nn.GRUCell(3, 4), x)
    replayed.clear()
    with torch.no_grad(), Seen() as mode:
        rnn(x)
    assert mode.count and not any(replayed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _ = rnn(x)
        right, _ = rnn.sequential(x)
    assert y.dtype == right.dtype and not any(replayed)


def test_a_start_that_is_made_anew_is_made_anew(replayed: list[bool]) -> None:
    made = []
    cell = nn.GRUCell(3, 4)
    x = torch.randn(2, 3, 3)

    def start(batch: int) -> Tensor:
        made.append(torch.full((batch, 4), float(len(made))))
        return made[-1]

    rnn = settled(cell, x, state=start)
    count = len(made)
    with torch.no_grad():
        y, _ = rnn(x)
    assert len(made) == count + 1
    torch.testing.assert_close(y, rnn.sequential(x, made[count])[0])


def test_step_goes_on_from_step_to_step(replayed: list[bool]) -> None:
    cell, x = nn.LSTMCell(3, 6), torch.randn(2, 12, 3)
    rnn = seqparc.compile(cell)
    with torch.no_grad():
        right, _ = rnn.sequential(x)
        state = None
        for t in range(12):
            y, state = rnn.step(x[:, t], state)
            torch.testing.assert_close(torch.utils._pytree.tree_leaves(y)[0], torch.utils._pytree.tree_leaves(right)[0][:, t])
    assert replayed[-1]


class Leaky(nn.Module):
    """What it reads at every step is x as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 20
        self.u, self.scale = nn.Parameter(torch.linspace(-0.9, 0.9, 20)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.tanh(x + self.u * h)


def ways_to_lie() -> dict[str, Callable[[Tensor], Tensor]]:
    """From x [2, 9, 20] to the same numbers, or others of the same shape, as they may come."""
    return {
        "bfloat16": lambda x: x.bfloat16(), "float16": lambda x: x.half(), "integers": lambda x: (3 * x).to(torch.int32),
        "numbers apart": lambda x: torch.stack((x, x), -1)[..., 0], "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "numbers first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0), "one for all": lambda x: x[:1].expand(2, -1, -1),
        "every other": lambda x: torch.cat((x, x), 1)[:, ::2], "backwards a sample": lambda x: x.flip(0),
    }  # fmt: skip


@pytest.mark.parametrize("way", ways_to_lie())
@pytest.mark.parametrize("first", [True, False])
def test_x_may_lie_as_it_likes(way: str, first: bool, replayed: list[bool]) -> None:
    """Also where the first call that is replayed is of such an x, and where it comes after others."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 20)
    odd = ways_to_lie()[way](x)
    rnn = settled(Leaky(), odd if first else x)
    for given in (odd, x, odd, odd):
        with torch.no_grad():
            mine, right = rnn(given)[0], rnn.sequential(given)[0]
        torch.testing.assert_close(mine, right, atol=2e-6, rtol=2e-6)
    assert any(replayed) != (first and way == "integers")  # integers are looked at in every call


def test_an_equal_number_of_another_kind_is_another(replayed: list[bool]) -> None:
    cell, x = Leaky(), torch.randn(2, 4, 20)
    rnn = settled(cell, x)
    cell.scale = nn.Parameter(torch.ones(1))
    same(rnn, x)
    with torch.no_grad():
        cell.scale.fill_(0.5)
    same(rnn, x)
    cell.label = _Unequal()
    same(rnn, x)
    cell.label = _Unequal()
    same(rnn, x)


class _Unequal:
    """Something of a user's that will not be compared."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise KeyError(other)


def test_weights_are_kept_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = CKernel.prepare

    def prepare(self: CKernel, params: Any, streams: Any) -> Any:
        made.extend([] if isinstance(params, Prepared) else [params])
        return real(self, params, streams)

    monkeypatch.setattr(CKernel, "prepare", prepare)
    rnn = seqparc.compile(nn.GRUCell(3, 16))
    with torch.no_grad():
        for steps in range(1, 6):
            for _ in range(ALIKE + 4):
                rnn(torch.randn(1, steps, 3))
        made.clear()
        for steps in range(1, 6):
            rnn(torch.randn(1, steps, 3))
        assert not made
        rnn.cell.bias_hh.add_(1)
        for steps in range(1, 6):
            rnn(torch.randn(1, steps, 3))
    assert len(made) == 1


def test_transforms_of_a_settled_call_are_those_of_the_loop() -> None:
    """Numbers in the place of parameters, gradients and batches of them: none is mistaken for the call that is known."""
    torch.manual_seed(0)
    rnn, x = seqparc.compile(nn.GRUCell(3, 4).double()), torch.randn(2, 5, 3, dtype=torch.float64)
    for _ in range(ALIKE + 4):
        rnn(x)
    other = {k: 1.1 * v.detach() for k, v in rnn.named_parameters()}
    both = {k: torch.stack([v, v / 2]) for k, v in other.items()}

    def loss(module: Any, parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    found = torch.func.grad(functools.partial(loss, rnn))(other, x)
    many = torch.func.vmap(functools.partial(loss, rnn), (0, None))(both, x)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.copy_(other[name])
    right = torch.autograd.grad(rnn.sequential(x)[0].square().sum(), list(rnn.parameters()))
    for mine, theirs in zip(found.values(), right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many[0], rnn.sequential(x)[0].square().sum(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.copy_(both[name][1])
    torch.testing.assert_close(many[1], rnn.sequential(x)[0].square().sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_given_start_counts_as_it_is_now(gradients: bool, replayed: list[bool]) -> None:
    """Also where it is spread over a batch, or is several tensors."""
    for cell, start, n in ((nn.GRUCell(3, 4), torch.zeros(4), 1), (nn.LSTMCell(3, 4), (torch.zeros(4), torch.zeros(4)), 2)):
        rnn, x = seqparc.compile(cell, state=start), torch.randn(5, 3, 3)
        with torch.set_grad_enabled(gradients):
            for _ in range(ALIKE + 4):
                rnn(x)
            assert replayed[-1]
            for t in start if n == 2 else (start,):
                t.fill_(0.5)
            torch.testing.assert_close(rnn(x)[0], rnn.sequential(x)[0])


def test_nothing_of_a_call_is_kept_by_its_replay(replayed: list[bool]) -> None:
    rnn, x, h = seqparc.compile(nn.GRUCell(3, 4)), torch.randn(1, 3, 3), torch.zeros(1, 4)
    for _ in range(ALIKE + 6):
        before = weakref.ref(h)
        h = rnn(x, h)[1].detach()
    assert replayed[-1] and before() is None
