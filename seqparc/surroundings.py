"""What may surround a call: transforms of torch.func, modes that see every operation, hooks on saved tensors, tensors without memory.

A call goes through all of them, as any operation of torch does. To find out about a cell takes runs of it that are nobody else's
business, on tensors that hold numbers: they are made `apart`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as fx_trace
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

functorch = torch._C._functorch
_transforms = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracer = torch._C._get_tracing_state

#: Tensors that are memory, if they are on a device with any.
PLAIN = frozenset((Tensor, nn.Parameter))
#: Values that can be compared, and say all about themselves.
SIMPLE = frozenset((
    type(None), bool, int, float, complex, str, torch.dtype, torch.device, FunctionType, BuiltinFunctionType, MethodType,
    np.bool_, *(np.dtype(code).type for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"]),
))  # fmt: skip
#: Hooks on every module there is.
_GLOBAL: list[dict[int, Any]] = [
    getattr(nn.modules.module, f"_global_{name}_hooks") for name in ("forward_pre", "forward", "backward_pre", "backward")
]


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is going on."""
    return _transforms() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a mode or a tracer sees every operation."""
    return _dispatch_modes() > 0 or _tracer() is not None


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether these are memory that a kernel may read, and nothing surrounds the call that would have to know of it."""
    return not _transforms() and forward_ad._current_level < 0 and memory(tensors)


def surrounded(home: str) -> bool:
    """Whether anything at all surrounds a call: a transform, mode, tracer or autocast."""
    return bool(
        _transforms() or forward_ad._current_level >= 0 or _dispatch_modes() or _tracer() is not None or _function_modes()
        or torch.is_autocast_enabled(home)
    )  # fmt: skip


def memory(tensors: Iterable[Tensor]) -> bool:
    """The same below the transforms of torch.func, as they have taken them apart."""
    if _dispatch_modes() or _tracer() is not None:
        return False
    for t in tensors:  # noqa: SIM110  quicker than all()
        if type(t) not in PLAIN or t.is_meta:
            return False
    return True


def hollow(t: Tensor) -> bool:
    """Whether a tensor holds no numbers, or under vmap others for each of its members."""
    t, many = bare(t)
    return many or empty(t)


def empty(t: Tensor) -> bool:
    """Whether a tensor holds no numbers."""
    return t.is_meta or isinstance(t, (FakeTensor, FunctionalTensor))


def hooks() -> list[Any]:
    """What a user wants to be called with every module. Torch's own such hooks only look (they count, or track)."""
    if not any(_GLOBAL):
        return []
    return [hook for table in _GLOBAL for hook in table.values() if not _of_torch(hook)]


def modes() -> tuple[Any, ...]:
    """What changes or watches torch's functions, in a form that can be compared: a default device, modes of a user's own."""
    if not _function_modes():
        return ()
    own = [m for m in _get_current_function_mode_stack() if not _of_torch(m)]
    return tuple((type(m), *(v for v in vars(m).values() if type(v) in SIMPLE)) for m in own)


def _of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.") and not isinstance(hook, DeviceContext)


@contextlib.contextmanager
def _unlooked() -> Iterator[None]:
    """Without torch's own hooks on every module and modes of functions, and without fx seeing calls of modules."""
    were = [(table, dict(table)) for table in _GLOBAL if table]
    modes = _get_current_function_mode_stack()
    seen: Any = nn.Module
    calls = (seen.__call__, seen.__getattr__) if fx_trace._is_fx_tracing_flag else None
    try:
        if calls is not None:
            seen.__call__, seen.__getattr__ = fx_trace._orig_module_call, fx_trace._orig_module_getattr
        for table, kept in were:
            for k in (k for k, hook in kept.items() if _of_torch(hook)):
                del table[k]
        _replace_modes([m for m in modes if not _of_torch(m)])
        yield
    finally:
        if calls is not None:
            seen.__call__, seen.__getattr__ = calls
        _replace_modes(modes)
        for table, kept in were:
            table.clear()
            table.update(kept)


def _replace_modes(modes: Sequence[Any]) -> None:
    for _ in range(_function_modes()):
        _pop_mode()
    for m in modes:
        _push_mode(m)


def autocast(home: str) -> torch.dtype | None:
    """What autocast casts to on a type of device, if it does."""
    return torch.get_autocast_dtype(home) if _castable(home) and torch.is_autocast_enabled(home) else None


def recast(home: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to this, or none, on a type of device."""
    return contextlib.nullcontext() if autocast(home) == dtype else torch.autocast(home, dtype, enabled=dtype is not None)


_castable = functools.cache(torch.amp.is_autocast_available)


def wrapped(t: Tensor) -> bool:
    """Whether a transform of torch.func wraps a tensor."""
    return bool(functorch.is_functorch_wrapped_tensor(t))


def batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd asks for many gradients at once (is_grads_batched), by an older vmap."""
    return any(t is not None and functorch.is_legacy_batchedtensor(t) for t in tensors)


def bare(t: Tensor) -> tuple[Tensor, bool]:
    """What is inside of torch.func's wrappers, and whether one of them is vmap's."""
    many = False
    while functorch.is_functorch_wrapped_tensor(t):
        many = many or functorch.is_batchedtensor(t)
        t = functorch.get_unwrapped(t)
    return t, many


def same(t: Tensor, value: Tensor) -> bool:
    """Whether a tensor holds these numbers; under vmap each of its members. Of one that holds none nothing is said against it."""
    axes = []
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            axes.append(functorch.maybe_get_bdim(t))
        t = functorch.get_unwrapped(t)
    if empty(t):
        return True
    with alone() if transformed() or watched() else contextlib.nullcontext():
        for k, axis in enumerate(reversed(axes)):
            t = t.movedim(axis + k, k)
        return torch.equal(t, value.expand_as(t)) if axes else torch.equal(t, value)


def stand_in(t: Tensor, rows: int | None = None) -> Tensor:
    """A tensor that holds numbers in the place of one that may not: the same, what a transform of torch.func wraps, or made up.

    rows: the batch that made-up ones have, if not their own; an empty batch is one too.
    """
    with alone():
        return _stand_in(t, rows)


def _stand_in(t: Tensor, rows: int | None) -> Tensor:
    inside, _ = bare(t)
    if hollow(t) or (rows is not None and t.shape[0] == 0):
        shape = [size(n) for n in t.shape]
        if rows is not None:
            shape[0] = rows
        device = "cpu" if t.is_meta else t.device
        floating = t.dtype.is_floating_point or t.dtype.is_complex
        return torch.full(shape, 0.1 if floating else 0, dtype=t.dtype, device=device, requires_grad=floating)
    if inside is t and not t.is_inference():
        return t
    return inside.detach().clone().requires_grad_(t.requires_grad)


def size(n: Any) -> int:
    """A size as it was when tracing began: what is found out does not depend on it."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) and n.node.hint is not None else int(n)


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """None of torch.func's transforms is there meanwhile."""
    with contextlib.ExitStack() as stack:
        if torch._C._are_functorch_transforms_active():
            stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(enable_inplace_requires_grad(True))
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nothing of what surrounds the call is there meanwhile. Autocast stays: it is part of what a cell computes."""
    tracing = torch._C._get_tracing_state()
    cache = parametrize._cache_enabled, parametrize._cache
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unlooked())
        stack.enter_context(untransformed())
        if forward_ad._current_level >= 0:
            stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
        if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
            stack.enter_context(_disable_current_modes())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # with any, torch.func takes no derivatives
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        try:
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            parametrize._cache_enabled, parametrize._cache = 0, {}
            yield
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
            parametrize._cache_enabled, parametrize._cache = cache


def _itself(t: Any) -> Any:
    return t


#: A parameter or buffer: where a module keeps it, by which name, and the tensor.
Place = tuple[dict[str, Any], str, Tensor]


def places(modules: Iterable[nn.Module]) -> list[Place]:
    """The parameters and buffers of modules, one that is tied under each of its names."""
    tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
    return [(table, name, t) for table in tables for name, t in table.items() if t is not None]


@contextlib.contextmanager
def holding(others: Sequence[Place]) -> Iterator[None]:
    """Other tensors in the places of parameters and buffers."""
    kept = [(table, name, table.get(name), name in table) for table, name, _ in others]
    try:
        for table, name, t in others:
            table[name] = t
        yield
    finally:
        for table, name, was, there in kept:
            if there:
                table[name] = was
            else:
                del table[name]


@contextlib.contextmanager
def apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Alone, and parameters and buffers of modules that hold no numbers of their own are replaced by some that do."""
    found = places(modules)
    with alone():
        made = {id(t): _stand_in(t, None) for _, _, t in found}
        with holding([(table, name, made[id(t)]) for table, name, t in found if made[id(t)] is not t]):
            yield
