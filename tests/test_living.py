"""Compiled modules in the rest of PyTorch: checkpoints, hooks, modes, parametrisations, changes between calls, copies, empty batches."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import seqparc
from tests.living import MODULES, close, eager, gradients, made, same

every = pytest.mark.parametrize("name", MODULES)

pytestmark = pytest.mark.usefixtures("quick")


# -- what surrounds a call -------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_checkpoints(name: str, how: str) -> None:
    """The first call compiles and the recomputation does not: what compiling saves for its own gradients is not the call's."""
    module, x = made(name)
    more: dict[str, Any] = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    x.requires_grad_()
    mine, right = checkpoint(module, x, **more)[0], eager(module)(x)[0]
    close(mine, right)
    mine.square().sum().backward()
    close([t.grad for t in (x, *module.parameters())], torch.autograd.grad(right.square().sum(), [x, *module.parameters()]))


def test_hooks_on_saved_tensors_see_the_calls_own_and_no_others() -> None:
    module, x = made("GRU")
    counts, log = [], []
    for _ in range(2):  # the first call compiles
        log.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (log.append(1), t.clone())[1], lambda t: t):
            y = module(x)[0]
        counts.append(len(log))
    assert counts[0] == counts[1] > 0
    close(gradients(y, list(module.parameters())), gradients(module.sequential(x)[0], list(module.parameters())))


@every
def test_hooks_on_the_module_and_its_parameters(name: str) -> None:
    module, x = made(name)
    log: list[str] = []
    shapes: list[Any] = []
    module.register_forward_pre_hook(lambda *_: log.append("before"))
    module.register_forward_hook(lambda *_: log.append("after"))
    module.register_full_backward_pre_hook(lambda *_: log.append("backward"))
    module.register_full_backward_hook(lambda _, given, out: shapes.append([None if g is None else g.shape for g in (*given, *out)]))
    first = next(module.parameters())
    first.register_hook(lambda g: log.append("gradient") or 2 * g)
    first.register_post_accumulate_grad_hook(lambda _: log.append("accumulated"))
    x.requires_grad_()
    y = module(x)[0]
    y.register_hook(lambda _: log.append("y"))
    y.square().sum().backward()
    assert log == ["before", "after", "y", "backward", "gradient", "accumulated"]
    assert shapes[0][:2] == [x.shape, y.shape]
    close(first.grad, torch.autograd.grad(eager(module)(x)[0].square().sum(), first)[0])  # doubled by the hook too


@every
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_inference_mode(name: str, first: bool) -> None:
    module, x = made(name)
    if not first:
        module(x)
    with torch.inference_mode():
        y, born = module(x)[0], torch.randn_like(x)
        assert y.is_inference() and not y.requires_grad
        close(y, eager(module)(x)[0])
    with torch.no_grad():
        close(module(born), eager(module)(born))
    same(module, x)  # what was compiled then is compiled, and has gradients
    steps = module._compiled.values() if isinstance(module, nn.RNNBase) else [module]
    assert all(not isinstance(e, str) and not e.plan.own_gradient for s in steps for e in s._engines.values())
    with torch.inference_mode():
        module = copy.deepcopy(module)  # tensors that were made in it
    with torch.no_grad():
        close(module(x), eager(module)(x))


@every
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("how", ["meta", "fake x", "fake model"])
def test_shapes_come_out_of_tensors_without_numbers(name: str, how: str, first: bool) -> None:
    module, x = made(name)
    right = eager(module)(x)
    if not first:
        module(x)
    with contextlib.nullcontext() if how == "meta" else FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if mode is None:
            module.to("meta")
            x = torch.empty_like(x, device="meta")
        else:
            x = mode.from_tensor(x)
            module = made(name)[0] if how == "fake model" else module
        results = module(x.requires_grad_())
        gradients(results, [x, *module.parameters()])
    for a, b in zip(tree_leaves(results), tree_leaves(right), strict=True):
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, True)
        assert a.is_meta if how == "meta" else type(a).__name__ == "FakeTensor"
    if how == "fake x":
        same(module, torch.randn(x.shape))


class Masked(nn.Module):
    """A constant decides about its structure."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        self.u = nn.Parameter(torch.rand(4, 4))
        self.register_buffer("mask", torch.eye(4))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + h @ (self.u * self.mask))


def test_nothing_is_concluded_from_numbers_that_are_made_up() -> None:
    with torch.device("meta"):
        rnn = seqparc.compile(Masked())
    assert rnn(torch.empty(2, 9, 4, device="meta"))[0].shape == (2, 9, 4)
    rnn.to_empty(device="cpu").cell.load_state_dict(Masked().state_dict())
    same(rnn, torch.randn(2, 9, 4))
    assert rnn.explain().as_dict()["pattern"] == torch.eye(4).int().tolist()


def test_modes_that_look_change_nothing() -> None:
    module, x = made("GRU")
    for _ in range(2):
        with FlopCounterMode(display=False) as flops:  # brings hooks on every module
            module(x)[0].square().sum().backward()
        assert flops.get_total_flops() > 0
        close([p.grad for p in module.parameters()], torch.autograd.grad(module.sequential(x)[0].square().sum(), module.parameters()))
        module.zero_grad()
    assert module.stats.backend == "c" and module.stats.backward is not None
    with torch.autograd.detect_anomaly(check_nan=True):
        same(module, x)


@every
def test_recorded_graphs_hold_the_recurrence(name: str) -> None:
    module, x = made(name, 2, 12)
    other = torch.randn_like(x)
    graph = make_fx(lambda x: module(x)[0])(x)
    assert any("seqparc.solve" in str(n.target) for n in graph.graph.nodes)
    close(graph(other), module(other)[0])


def test_a_default_device_or_dtype_is_the_cells_affair() -> None:
    for change, back in ((torch.set_default_device, "cpu"), (torch.set_default_dtype, torch.float32)):
        module, x = made("GRU")
        change("meta" if back == "cpu" else torch.float64)
        try:
            y = module(x)[0]
        finally:
            change(back)
        close(y, module.sequential(x)[0])

    def noise(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h + x + torch.linspace(0, 1, 4))  # of the default dtype

    rnn, x = seqparc.compile(noise, backend="torch"), torch.randn(2, 9, 4, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            close(rnn(x, torch.zeros(2, 4, dtype=x.dtype)), rnn.sequential(x, torch.zeros(2, 4, dtype=x.dtype)))
        finally:
            torch.set_default_dtype(torch.float32)


# -- copies, dtypes, empty batches -----------------------------------------------------------------------------------


def saved(module: Any) -> Any:
    held = io.BytesIO()
    torch.save(module, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@every
def test_copies(name: str) -> None:
    module, x = made(name, backend="torch")
    y = module(x)
    for copied in (copy.deepcopy(module), saved(module), copy.copy(module)):
        close(copied(x), y)
        same(copied, x)
    twin = copy.deepcopy(module)
    for p in twin.parameters():
        nn.init.zeros_(p)
    close(module(x), y)
    same(module.double(), x.double())


@every
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_batch_of_nothing(name: str, first: bool) -> None:
    module, x = made(name, backend="torch")
    if not first:
        module(x)
    x = x[:0].requires_grad_()
    mine, right = module(x), eager(module)(x)
    close(mine, right)
    close(gradients(mine, [x, *module.parameters()]), gradients(right, [x, *module.parameters()]))
    if isinstance(module, seqparc.CompiledRNN):
        none = {"lengths": torch.zeros(0, dtype=torch.int64), "reset": torch.zeros(0, x.shape[1], dtype=torch.bool)}
        close(module(x, right[1].detach(), **none), right)
    with pytest.raises(seqparc.ShapeError if isinstance(module, seqparc.CompiledRNN) else RuntimeError, match="sequence"):
        module(x.new_zeros(2, 0, x.shape[2]))


def test_a_batch_of_nothing_begins_as_the_cell_says() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h0 = nn.Parameter(torch.rand(4))

        def init_state(self, batch: int) -> Tensor:
            return self.h0.expand(batch, 4)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(x + h)

    rnn = seqparc.compile(Learned(), backend="torch")
    y, last = rnn(torch.randn(0, 9, 4))
    assert y.shape == (0, 9, 4) and last.shape == (0, 4)
    (y.sum() + last.sum()).backward()
    assert torch.equal(rnn.cell.h0.grad, torch.zeros(4))


def test_parameters_that_are_not_there_yet() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size = 4
            self.into = nn.LazyLinear(4)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.into(x) + h)

    rnn, x = seqparc.compile(Lazy(), backend="torch"), torch.randn(2, 9, 3)
    with pytest.raises(seqparc.ShapeError, match="not initialised yet; call the cell itself once"):
        rnn(x)
    rnn.cell(x[:, 0], torch.zeros(2, 4))
    same(rnn, x)


@pytest.mark.parametrize("name", ["LSTM layer"])
def test_compiled_autograd(name: str) -> None:
    """Of an eager call: what Dynamo traces of its backward is the operator, not the compiler."""
    torch._dynamo.reset()
    module, x = made(name)
    y = module(x.requires_grad_())[0]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.square().sum().backward()
    close([t.grad for t in (x, *module.parameters())], torch.autograd.grad(eager(module)(x)[0].square().sum(), [x, *module.parameters()]))
