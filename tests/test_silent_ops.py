"""Operations whose numbers or gradients once differed from the loop's without a word, each in its own dtypes against the plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import seqparc
from seqparc.errors import SeqparcWarning

pytestmark = pytest.mark.usefixtures("quick")

Step = Callable[[Any, Any], Any]
INT = torch.int64


def results(run: Any, x: Any, state: Any, grad: bool) -> list[Tensor]:
    """y, last, and the gradients by x and the start state."""
    x, state = tree_map(lambda t: t.clone().requires_grad_(grad and t.is_floating_point()), (x, state))
    found = tree_leaves(run(x, state))
    wanted = [t for t in tree_leaves((x, state)) if t.requires_grad]
    if wanted:
        total = sum((v * torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).reshape(v.shape)).sum() for v in found if v.requires_grad)
        grads = torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]
        found += [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
    return found


def agrees(
    step: Step, x: Any, state: Any, *, grad: bool = True, says: str | None = None, grads: float = 1e-5, backend: str = "torch"
) -> seqparc.CompiledRNN:
    """Compiled and looped over: integers and dtypes the same, other numbers to their rounding; `says`: the warning that there is."""
    rnn = seqparc.compile(step, state=state, signature="x, state -> state", backend=backend)
    start = tree_map(lambda s: s.expand(tree_leaves(x)[0].shape[0], *s.shape).clone(), state)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SeqparcWarning)
        mine = results(rnn, x, start, grad)
    said = [str(w.message) for w in told if issubclass(w.category, SeqparcWarning)]
    assert (any(says in s for s in said) if says is not None else not said), said
    right = results(rnn.sequential, x, start, grad)
    values = 2 * len(tree_leaves(state))
    for i, (a, b) in enumerate(zip(mine, right, strict=True)):
        unit = grads if i >= values else 1e-12 if b.dtype is torch.float64 else 1e-6
        exact = not b.is_floating_point()
        torch.testing.assert_close(a, b, rtol=0 if exact else unit, atol=0 if exact else unit, equal_nan=True)
    return rnn


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


TRUTHS: dict[str, Step] = {
    "a sum": lambda x, b: b + x,
    "a sum with a number": lambda x, b: x & (b + True),
    "a product": lambda x, b: b * x,
    "a count": lambda x, b: (b.sum(-1, keepdim=True) + (b + x)) > 2,
    "a sum as a truth value": lambda x, b: b.sum(-1, keepdim=True, dtype=torch.bool) + x,
    "in place": lambda x, b: b.clone().add_(x),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_truth_values(name: str) -> None:
    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        b = TRUTHS[name](x > 0, state[0])
        return b, 0.5 * state[1] + (b + (x > 0)).to(x.dtype)

    agrees(step, some(2, 6, 4), (torch.zeros(4, dtype=torch.bool), torch.zeros(4)))


def _threshold(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    v = torch.where(x > 0, x, state[0])
    return v, state[1] + (v >= 0.7)


def _lost(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return state[0] + x, state[1] + (state[0] + x == state[0])


@pytest.mark.parametrize("step, x, start", [(_threshold, 0.7, 0.0), (_lost, 1e-9, 1.0)])
def test_float32_beside_float64(step: Step, x: float, start: float) -> None:
    agrees(step, torch.full((1, 9, 1), x), (torch.full((1,), start), torch.zeros(1, dtype=torch.float64)), backend="c")


def test_a_number_of_16_bits_and_a_threshold() -> None:
    def step(x: Tensor, c: Tensor) -> Tensor:
        return c + (x >= 0.7)

    agrees(step, torch.full((1, 9, 1), 0.7, dtype=torch.bfloat16), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_that_is_asked_for(dtype: torch.dtype) -> None:
    """The gradient goes through it as through nothing; autograd rounds that too."""
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    x = torch.cat((some(1, 6, 3), torch.tensor([[[1e5, 1e-7, 3e-5], [-1e5, float("nan"), 6e-8]]])), 1).to(wide)
    rnn = agrees(lambda x, h: (0.5 * h).to(dtype).to(wide) * 0.5 + x.to(dtype), x, torch.zeros(3, dtype=wide), grad=False, backend="c")
    h = torch.zeros(1, 3, dtype=wide, requires_grad=True)
    grads = [torch.autograd.grad(run(x[:, :6], h)[0].sum(), h)[0] for run in (rnn, rnn.sequential)]
    torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps, atol=0)


COUNTS: dict[str, tuple[Step, Tensor, Any, str | None]] = {
    "beyond 53 bits": (lambda x, c: c + x, torch.full((1, 5, 1), 2**60 + 1), torch.zeros(1, dtype=INT), "as the plain loop"),
    "products": (lambda x, c: (c * 1103515245 + 12345 + x) % 2**31, torch.zeros(1, 5, 1, dtype=INT), torch.zeros(1, dtype=INT), "53 bits"),
    "opaque": (lambda x, c: (c + x) ^ c, torch.full((1, 5, 1), 2**60 + 1), torch.zeros(1, dtype=INT), "53 bits"),
    "made of floats": (lambda x, h: 0.5 * h + x + ((h * 1000).long() * 1000003 % 7).float(), some(2, 6, 4), torch.zeros(4), None),
    "beside floats": (
        lambda x, s: (torch.tanh(s[0] + x), s[1] + 1), some(2, 6, 4), (torch.zeros(4), torch.full((1,), 2**24)), None
    ),
    "of 8 bits": (lambda x, c: c + x, torch.full((1, 6, 4), 50, dtype=torch.int8), torch.zeros(4, dtype=torch.int8), None),
    "without a sign": (lambda x, c: c - x, torch.full((1, 6, 4), 50, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), None),
    "of 32 bits": (lambda x, c: c * 3 + x, torch.full((1, 40, 4), 50, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), None),
    "the lowest": (lambda x, c: -c.abs() + x, torch.zeros(1, 3, 1, dtype=torch.int8), torch.full((1,), -128, dtype=torch.int8), None),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_integers(name: str) -> None:
    step, x, state, says = COUNTS[name]
    agrees(step, x, state, says=says)


def test_a_count_that_grows_large_later() -> None:
    rnn = seqparc.compile(lambda x, s: (torch.tanh(s[0] + x), s[1] + 1), state=(torch.zeros(2), torch.zeros(1, dtype=INT)), backend="torch")
    x = some(1, 9, 2)
    for start in (0, 2**22 - 4, 2**24 - 4, 2**53 - 4):
        state = torch.zeros(1, 2), torch.full((1, 1), start)
        with pytest.warns(SeqparcWarning, match="plain loop.*53 bits") if start > 2**50 else warnings.catch_warnings():
            torch.testing.assert_close(rnn(x, state), rnn.sequential(x, state))


def _written(dtype: torch.dtype, part: bool) -> Step:
    def step(x: Tensor, h: Tensor) -> Tensor:
        kept = torch.zeros(h.shape, dtype=dtype)
        if part:
            kept[:, 1:3] = 3 * h[:, :2]
        else:
            kept.copy_(3 * h + x)
        return 0.1 * h + 0.1 * kept + x

    return step


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("dtype", [INT, torch.bool, torch.uint8])
def test_a_write_into_another_dtype(dtype: torch.dtype, part: bool) -> None:
    agrees(_written(dtype, part), some(2, 6, 4).abs(), torch.full((4,), 3.0), grad=False)


def _refilled(x: Tensor, h: Tensor) -> Tensor:
    mask = torch.zeros(4)
    before = h * mask
    mask.fill_(2.0)
    return torch.tanh(before + h * 0.5 * mask + x)


def _counted(x: Tensor, h: Tensor) -> Tensor:
    by = torch.arange(4.0)
    before = h * by
    by[1:] += 1
    return torch.tanh(0.1 * before + 0.1 * h * by + x)


@pytest.mark.parametrize("step", [_refilled, _counted])
def test_a_constant_that_changes_in_place(step: Step) -> None:
    agrees(step, some(2, 6, 4), torch.ones(4), grad=False)


ENDS = torch.tensor([3.0, -3.0, 0.0, 6.0]).expand(1, 3, 4)
DIVISORS = torch.tensor([0.1, 0.2, -0.1, 0.7]).expand(1, 3, 4)
NOTHING = torch.zeros(1, 3, 4)
STEPS: dict[str, tuple[Step, Tensor]] = {
    "lerp by less than a half": (lambda x, h: torch.lerp(h * 1e4, x, 0.3), some(2, 4, 4)),
    "lerp by a half": (lambda x, h: torch.lerp(h * 1e4, x, 0.5), some(2, 4, 4)),
    "lerp by one": (lambda x, h: torch.lerp(h * 1e8, x, 1.0), some(2, 4, 4)),
    "lerp by tensors": (lambda x, h: torch.lerp(h * 1e4, x, torch.tensor([0.2, 0.5, 0.8, 1.0])), some(2, 4, 4)),
    "hardsigmoid": (lambda x, h: F.hardsigmoid(0 * h + x) + 0.1 * h, ENDS),
    "remainder": (lambda x, h: torch.remainder(0 * h + 1, x) + 0.1 * h, DIVISORS),
    "floor of a quotient by nothing": (lambda x, h: torch.div(h, x, rounding_mode="floor") + 0.1 * h, NOTHING),
    "atan2 of nothing": (lambda x, h: torch.atan2(0 * h, x) + 0.1 * h, NOTHING),
    "clamp by no number": (lambda x, h: torch.clamp(0.5 * h, max=torch.where(x > 0, x, torch.nan)), some(2, 4, 4)),
    "cosine of what is smaller than its eps": (
        lambda x, h: 0.5 * h + x * F.cosine_similarity(h, x, dim=-1, eps=2.0).unsqueeze(-1), some(2, 4, 4)
    ),
    "mish": (lambda x, h: F.mish(0.5 * h + x), 30 * some(2, 4, 4)),
    "hypot of nothing": (lambda x, h: torch.hypot(0 * h, x) + 0.1 * h, NOTHING),
    "modulus of nothing": (lambda x, h: torch.complex(0 * h, x).abs() + 0.1 * h, NOTHING),
    "angle of nothing": (lambda x, h: torch.complex(0 * h, x).angle() + 0.1 * h, NOTHING),
    "sign of nothing": (lambda x, h: torch.view_as_real(torch.complex(0 * h, x).sgn()).sum(-1) + 0.1 * h, NOTHING),
}


@pytest.mark.parametrize("name", STEPS)
def test_values_and_gradients(name: str) -> None:
    step, x = STEPS[name]
    agrees(step, x, torch.ones(4), grads=1e-4)


def test_the_variance_of_too_few() -> None:
    with pytest.warns(UserWarning, match="degrees of freedom"):
        agrees(lambda x, h: 0.5 * h + x + h.var(-1, correction=5, keepdim=True), some(2, 4, 4), torch.zeros(4), grad=False)


def test_numbers_that_integers_are_given() -> None:
    x = torch.tensor([[[1], [-1], [0]]])
    agrees(lambda x, c: torch.full_like(c, 2.7) + (c + x).masked_fill(x > 0, 0.7), x, torch.zeros(1, dtype=INT))


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "padded with ones": lambda m, w: F.pad(m, (0, 1), value=1.0) * w,
    "padded with nothing": lambda m, w: F.pad(m, (0, 1)) * w,
    "one for all": lambda m, w: m[1:2] / w.exp(),
    "one a column": lambda m, w: F.pad(m, (0, 1)) / w.exp(),
}


@pytest.mark.parametrize("name", MASKS)
def test_zeros_of_a_mask(name: str) -> None:
    mask, w = torch.tensor([0.0, 1.0, 0.0]), some(4, 4)
    agrees(lambda x, h: torch.tanh(h @ MASKS[name](mask, w) + x), some(2, 4, 4), torch.zeros(4))
