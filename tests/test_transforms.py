"""torch.func around compiled cells: other parameters, gradients of gradients of members, Jacobians; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import seqparc
from tests.cells import Sparse
from tests.living import MODULES, close, eager, gradients, made
from tests.test_own_gradient import Rough

pytestmark = pytest.mark.usefixtures("quick")


def own(module: Any) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in module.named_parameters()}


def looped(module: Any, parameters: dict[str, Tensor], *x: Tensor) -> Any:
    """The plain loop of a copy that has other parameters."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(parameters)
    return eager(twin)(*x)


@pytest.mark.parametrize("first", [True, False], ids=["as the first call", "later"])
@pytest.mark.parametrize("name", MODULES)
def test_other_parameters_than_its_own(name: str, first: bool) -> None:
    module, x = made(name)
    if not first:
        module(x)
    leaves = {n: (0.5 * p + 0.1).requires_grad_() for n, p in own(module).items()}
    mine = functional_call(module, {n: 1.5 * p for n, p in leaves.items()}, (x,))
    twin = copy.deepcopy(module)
    twin.load_state_dict({n: 1.5 * p.detach() for n, p in leaves.items()})
    right = eager(twin)(x)
    close(mine, right)
    close(gradients(mine, list(leaves.values())), [1.5 * g for g in gradients(right, list(twin.parameters()))])
    close(module(x), eager(module)(x))  # nothing of it stays


@pytest.mark.parametrize("name", MODULES)
def test_gradients_jacobians_and_members(name: str) -> None:
    """grad, vjp and jacrev; vmap over x with one set of parameters, with gradients of each member, and over sets of parameters."""
    module, x = made(name, 3, 2, 5)
    parameters = own(module)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0]  # type: ignore[no-any-return]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return call(parameters, x).square().sum()

    found = grad(loss)(parameters, x[0])
    right = torch.autograd.grad(eager(module)(x[0])[0].square().sum(), list(module.parameters()))
    close(list(found.values()), right)
    y, pull = vjp(lambda x: module(x)[0], x[0])
    u = x[0].clone().requires_grad_()
    close(pull(torch.ones_like(y)), torch.autograd.grad(eager(module)(u)[0].sum(), u))
    small = x[0, :1, :3]
    close(jacrev(lambda x: module(x)[0])(small), torch.autograd.functional.jacobian(lambda x: eager(module)(x)[0], small))

    close(vmap(lambda x: module(x)[0])(x), torch.stack([eager(module)(v)[0] for v in x]))
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    alone = [torch.autograd.grad(eager(module)(v)[0].square().sum(), list(module.parameters())) for v in x]
    close(list(each.values()), [torch.stack(g) for g in zip(*alone, strict=True)])

    sets = {n: torch.stack([p, 0.5 * p, -p]) for n, p in parameters.items()}
    one = [{n: p[k] for n, p in sets.items()} for k in range(3)]
    close(vmap(call)(sets, x), torch.stack([looped(module, p, v)[0] for p, v in zip(one, x, strict=True)]))
    each = vmap(grad(loss))(sets, x)
    for k, p in enumerate(one):
        close({n: g[k] for n, g in each.items()}, grad(loss)(p, x[k]))


def test_members_of_members_along_any_axis() -> None:
    module, _ = made("GRU")
    x, state = torch.randn(4, 3, 2, 9, 3), torch.randn(4, 2, 5)
    close(vmap(vmap(lambda x: module(x)[0]))(x), torch.stack([torch.stack([module(v)[0] for v in w]) for w in x]))
    close(vmap(lambda x, s: module(x, s)[1], (None, 0))(x[0, 0], state), torch.stack([module(x[0, 0], s)[1] for s in state]))
    found = vmap(lambda x, s: module(x, s)[0], (2, 1), 1)(x[:, 0].movedim(0, 2), state.movedim(0, 1))
    close(found, torch.stack([module(v, s)[0] for v, s in zip(x[:, 0], state, strict=True)], 1))
    lengths, reset = torch.randint(0, 10, (3, 2)), torch.rand(3, 2, 9) < 0.2
    found = vmap(lambda x, n, r: module(x, lengths=n, reset=r)[0])(x[0], lengths, reset)
    close(found, torch.stack([module(v, lengths=n, reset=r)[0] for v, n, r in zip(x[0], lengths, reset, strict=True)]))
    nested = vmap(vmap(grad(lambda p, x: functional_call(module, p, (x,))[0].square().sum()), (None, 0)), (None, 0))(own(module), x)
    for i, j in ((0, 0), (3, 1)):
        right = torch.autograd.grad(module.sequential(x[i, j])[0].square().sum(), list(module.parameters()))
        close([g[i, j] for g in nested.values()], right)


def test_constants_that_differ_between_members_are_no_constants() -> None:
    rnn, x = seqparc.compile(Sparse(3, 4), backend="torch"), torch.randn(3, 2, 9, 3)
    rnn(x[0])  # finds out that half of the products with the mask are zero
    masks = torch.stack([rnn.cell.mask, 1 - rnn.cell.mask, torch.ones(4, 4)])
    found = vmap(lambda mask, x: functional_call(rnn, {"cell.mask": mask}, (x,))[0])(masks, x)
    close(found, torch.stack([looped(rnn, {**rnn.state_dict(), "cell.mask": m}, v)[0] for m, v in zip(masks, x, strict=True)]))
    close(rnn(x[0])[0], rnn.sequential(x[0])[0])


@pytest.mark.parametrize("name", MODULES)
def test_many_gradients_at_once(name: str) -> None:
    module, x = made(name, 1, 2, dtype=torch.float64, backend="torch")
    x.requires_grad_()
    y = module(x)[0]
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad(y, wanted, cotangents, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, wanted, c, retain_graph=True) for c in cotangents]
    close(found, [torch.stack(g) for g in zip(*alone, strict=True)])
    assert torch.autograd.gradcheck(lambda x, *_: tuple(tree_leaves(module(x))), (x, *module.parameters()), check_batched_grad=True)


@pytest.mark.parametrize("frozen", [True, False], ids=["nothing else has a gradient", "parameters have gradients"])
def test_forward_mode_is_refused(frozen: bool) -> None:
    """Without the refusal the tangent of a cell that asks for no gradient would be none at all, or zero."""
    rnn, x = made("elementwise")
    rnn.requires_grad_(not frozen)
    rnn(x)
    with pytest.raises(seqparc.SeqparcError, match="forward mode"):
        jvp(lambda x: rnn(x)[0], (x,), (x,))
    with pytest.raises(seqparc.SeqparcError, match="forward mode"):
        torch.func.hessian(lambda x: rnn(x)[0].sum())(x)
    with forward_ad.dual_level():
        with pytest.raises(seqparc.SeqparcError, match="forward mode"):
            rnn(forward_ad.make_dual(x, x))
        close(rnn(x)[0], rnn.sequential(x)[0])  # where there is no tangent there is nothing to refuse
    close(jvp(lambda s: s * rnn(x)[0].detach(), (torch.tensor(2.0),), (torch.tensor(1.0),))[1], rnn(x)[0].detach())


def test_an_exported_graph_refuses_forward_mode() -> None:
    rnn, x = made("GRU")
    exported = torch.export.export(rnn.requires_grad_(False), (x,)).module()
    with pytest.raises(seqparc.SeqparcError, match="forward mode"):
        jvp(lambda x: exported(x)[0], (x,), (x,))


def test_second_derivatives_are_refused() -> None:
    rnn, x = made("GRU")
    with pytest.raises(seqparc.SeqparcError, match="second derivative"):
        grad(lambda x: grad(lambda x: rnn(x)[0].square().sum())(x).square().sum())(x)


class Spiking(nn.Module):
    hidden_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 4)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + self.into(x)
        spikes = Rough.apply(v - 0.3)
        return spikes, v - 0.3 * spikes


def test_a_gradient_of_ones_own_is_that_of_the_parameters_of_the_call() -> None:
    """Backward runs the cell again: on what it had then, though by then the module has its own parameters back, or new ones."""
    rnn, x = seqparc.compile(Spiking(), backend="torch"), torch.randn(2, 20, 3, requires_grad=True)
    leaves = {n: (0.7 * p).requires_grad_() for n, p in own(rnn).items()}
    twin = copy.deepcopy(rnn)
    twin.load_state_dict({n: 2 * p.detach() for n, p in leaves.items()})
    mine = functional_call(rnn, {n: 2 * p for n, p in leaves.items()}, (x,))
    close(gradients(mine, list(leaves.values())), [2 * g for g in gradients(twin.sequential(x), list(twin.parameters()))])
    old, mine, right = list(rnn.parameters()), rnn(x), rnn.sequential(x)
    rnn.cell.into.weight = nn.Parameter(torch.randn(4, 3))
    close(gradients(mine, [x, *old]), gradients(right, [x, *old]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        mine = rnn(x)
    close(gradients(mine, [x, *rnn.parameters()]), gradients(rnn.sequential(x), [x, *rnn.parameters()]))


def test_what_transforms_cannot_look_through_is_said() -> None:
    rnn, x = seqparc.compile(Spiking()), torch.randn(2, 20, 3)
    with pytest.raises(seqparc.SeqparcError, match=r"gradient of its own.*torch\.func"):
        grad(lambda x: rnn(x)[0].sum())(x)
    y = rnn(x.requires_grad_())[0]
    with pytest.raises(seqparc.SeqparcError, match="many gradients at once"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)
    with torch.no_grad():
        close(vmap(lambda x: rnn(x)[0])(x.detach()[None]), y.detach()[None])
    weights = torch.rand(3, 4)
    with pytest.raises(seqparc.SeqparcError, match=r"under vmap .* uses w"):
        vmap(lambda w: seqparc.compile(lambda u, h: torch.tanh(w * h + u), state=torch.zeros(4))(torch.ones(2, 5, 4))[0])(weights)


def test_a_closure_over_what_is_differentiated_runs_as_the_plain_loop() -> None:
    x = torch.randn(2, 9, 4)

    def loss(w: Tensor) -> Tensor:
        return seqparc.compile(lambda u, h: torch.tanh(w * h + u), state=torch.zeros(4))(x)[0].square().sum()  # type: ignore[no-any-return]

    w = torch.rand(4)
    with pytest.warns(seqparc.SeqparcWarning, match="w belongs to a transform"):
        found = grad(loss)(w)
    close(found, torch.autograd.grad(loss(w.requires_grad_()), w)[0])
