"""Cells that carry a gradient of their own: custom autograd.Function, detach, no_grad, gradient hooks.

What such a cell computes is compiled like any other. Its derivative is what autograd makes of the user's code, so the adjoint
recurrence is not derived from the program but traced: one step of it,

    μ_before = (∂f/∂s)ᵀ (μ + ḡ_s) + (∂g/∂s)ᵀ ḡ_out,

is a function of (x, s, ḡ_s, ḡ_out) and μ like any cell, linear in μ, and is compiled as one. The solver's Jacobians stay those of
the program: a surrogate gradient says nothing about where a perturbed state goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqparc.captured import reachable
from seqparc.convention import Convention
from seqparc.record import user_source
from seqparc.tree import LEAF, Structure

#: Calls that cut or change a gradient, by name.
_CUTS = frozenset(("detach", "detach_", "register_hook", "_set_grad_enabled", "requires_grad_"))


class _Watch(TorchFunctionMode):
    """Notes every call that cuts or changes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        cut = name in _CUTS or (name == "__get__" and owner is Tensor.__dict__.get("data", torch._C.TensorBase.data))
        off = name == "_set_grad_enabled" and args and args[0] is False
        if name == "requires_grad_" and (kwargs or {}).get("requires_grad", args[1] if len(args) > 1 else True):
            cut = False  # it asks for what there is
        if cut and (off or (args and isinstance(args[0], Tensor) and args[0].requires_grad)):
            word = "no_grad" if name == "_set_grad_enabled" else "data" if name == "__get__" else name
            self.found.append(f"{word} at {user_source() or 'the cell'}")
        if not isinstance(func, (FunctionType, torch.jit.ScriptFunction)):
            return func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:  # whose result has a history of its own, if that is asked for
            if not (kwargs.get("create_graph") if kwargs and "create_graph" in kwargs else len(args) > 4 and args[4]):
                self.found.append(f"autograd.grad without create_graph at {user_source() or 'the cell'}")
            return func(*args, **(kwargs or {}))
        with _Cuts() as inside, kept_whole():  # one of torch's that is written in Python, in which this mode is not asked
            result = func(*args, **(kwargs or {}))
        if inside.seen:
            self.found.append(f"{name}, which detaches, at {user_source() or 'the cell'}")
        return result


def kept_whole() -> contextlib.AbstractContextManager[Any]:
    """Results that autograd keeps for backward are not detached meanwhile, as it does with them unless it is told otherwise."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


class _Cuts(TorchDispatchMode):
    """Sees whether something is detached."""

    seen = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in the recorder: dynamo is not to be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


class Own(NamedTuple):
    """Where a cell cuts or replaces gradients, in words, and which of its results, outputs and next states, no gradient leaves at all."""

    where: tuple[str, ...] = ()
    cut: tuple[bool, ...] = ()


def own_gradient(cell: Any, convention: Convention, x: Sequence[Tensor], state: Sequence[Tensor]) -> Own:
    """What is a cell's own about its gradient; nowhere if its derivative is that of what it computes."""

    def given(t: Tensor) -> Tensor:
        """As in the middle of a loop: not a leaf, which autograd would not let a cell change in place."""
        return t.detach().requires_grad_(t.is_floating_point() or t.is_complex()).clone()

    watch = _Watch()
    with torch.enable_grad():
        given_x, given_state = [given(t) for t in x], [given(t) for t in state]
        with watch:
            out, following = convention.call(cell, given_x, given_state)
    results = (*(out or ()), *following)
    todo = [t.grad_fn for t in results]
    if any(t.is_inference() for t in results):
        watch.found.append("inference_mode")
    done: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in done:
            done.add(node)
            if isinstance(node, BackwardCFunction):
                watch.found.append(f"the autograd function {type(node).__name__.removesuffix('Backward')}")
            todo += [following for following, _ in node.next_functions]
    # A parameter that is frozen now may be learnt later, and then a result that depends on nothing else has a gradient.
    certain = all(t.requires_grad for _, _, t in reachable(cell) if isinstance(t, nn.Parameter))
    return Own(tuple(dict.fromkeys(watch.found)), tuple(certain and not t.requires_grad for t in results))


class Vjp:
    """One step of a cell's adjoint recurrence, itself a cell: ((x…, s…, ḡ_s…, ḡ_out…), (μ…)) -> (μ_before…)."""

    def __init__(self, cell: Any, convention: Convention, n_x: int, floating: Sequence[bool]) -> None:
        self.cell, self.convention, self.n_x = cell, convention, n_x
        self.floating = tuple(floating)  # of each state leaf: only these have a cotangent
        self.n_out = 0 if convention.out is None else convention.out.count
        self.__name__ = f"the gradient of {getattr(cell, '__name__', type(cell).__name__)}"

    @property
    def signature(self) -> Convention:
        """How this is called."""
        n = len(self.floating)
        inputs = Structure("tuple", children=(LEAF,) * (self.n_x + n + sum(self.floating) + self.n_out))
        return Convention(("x", "state"), Structure("tuple", children=(LEAF,) * sum(self.floating)), inputs)

    def __call__(self, given: tuple[Tensor, ...], mu: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n, k = len(self.floating), sum(self.floating)
        x, state = given[: self.n_x], list(given[self.n_x : self.n_x + n])
        g_state, g_out = given[self.n_x + n :][:k], given[self.n_x + n + k :]
        with torch.enable_grad():
            state = [s.detach().requires_grad_() if f else s for s, f in zip(state, self.floating, strict=True)]
            # Not leaves, which autograd would not let a cell change in place.
            apart = [s.clone() if f else s for s, f in zip(state, self.floating, strict=True)]
            out, following = self.convention.call(self.cell, list(x), apart)
        wanted = [s for s, f in zip(state, self.floating, strict=True) if f]
        cotangents = [m + g for m, g in zip(mu, g_state, strict=True)]
        pairs = list(zip([t for t, f in zip(following, self.floating, strict=True) if f], cotangents, strict=True))
        pairs += list(zip(out or (), g_out, strict=True))
        pairs = [(t, c) for t, c in pairs if t.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(s) for s in wanted)
        found = torch.autograd.grad([t for t, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        return tuple(torch.zeros_like(s) if g is None else g for s, g in zip(wanted, found, strict=True))
