"""What a cell can reach: parameters, buffers, plain attributes, variables it closes over; by name, looked up anew when asked.

A compiled cell reads tensors at every call as the plain loop would: a parameter that was replaced, or a variable that was bound
to another tensor, counts from then on. All else that it reaches is part of what was traced, and compared at every call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seqparc.surroundings import SIMPLE, hooks

#: Looks a tensor up; raises KeyError, AttributeError or the like if it is no longer there.
Getter = Callable[[], Any]


#: What every module has.
_USUAL = frozenset(vars(nn.Module()))
#: Where a module keeps others, and what is called with it.
_TABLES = ("_modules", "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def reachable(cell: Any) -> Iterator[tuple[str, Getter, Tensor]]:
    """(name, how to look it up, the tensor now) of every way to a tensor in a cell; names are unique."""
    names: set[str] = set()
    for found, get, tensor in _walk(cell):
        if isinstance(tensor, Tensor):
            name = found
            while name in names:
                name += "_"
            names.add(name)
            yield name, get, tensor


def parts(cell: Any) -> tuple[list[nn.Module], list[Getter]]:
    """The modules that a cell can reach, and ways to what else decides about it: numbers, strings and functions it closes over."""
    found = list(_walk(cell))
    return [v for _, _, v in found if isinstance(v, nn.Module)], [get for _, get, v in found if type(v) in SIMPLE]


class Made:
    """All that a trace depends on beside tensors, and beside which modules are training: classes, settings, parts, hooks."""

    def __init__(self, modules: Sequence[nn.Module] = (), values: Sequence[Getter] = ()) -> None:
        self.modules = list(modules)
        self.hooks = hooks()
        self.classes = [
            (c, [(k, v) for k, v in vars(c).items() if type(v) in SIMPLE and not k.startswith("__")]) for c in _classes(modules)
        ]  # fmt: skip
        self.values = [(get, get()) for get in values]
        self.of = [
            (
                m, type(m), len(own := m.__dict__), [(k, v) for k, v in own.items() if type(v) in SIMPLE and k not in _USUAL],
                [(table, list(own[table].values())) for table in _TABLES],
                [(table, list(own[table]), [t is None for t in own[table].values()]) for table in ("_parameters", "_buffers")],
            )
            for m in self.modules
        ]  # fmt: skip

    def unchanged(self) -> bool:
        """Whether it is all still so. Asked at every call, so it looks at as little as will do."""
        for m, kind, count, settings, tables, tensors in self.of:
            own = m.__dict__
            if type(m) is not kind or len(own) != count:
                return False
            if not _same(own, settings):
                return False
            for table, values in tables:
                there = own[table]
                if len(there) != len(values) or (values and list(there.values()) != values):
                    return False
            for table, names, nothing in tensors:
                there = own[table]
                if len(there) != len(names) or (names and (list(there) != names or [t is None for t in there.values()] != nothing)):
                    return False
        return self.same_outside()

    def same_outside(self) -> bool:
        """Of that what no module holds: hooks on all modules, attributes of their classes, and what a function closes over."""
        if not all(_same(c.__dict__, settings) for c, settings in self.classes):
            return False
        return hooks() == self.hooks and all(_still(get, value) for get, value in self.values)


def _classes(modules: Sequence[nn.Module]) -> list[type]:
    """Those of modules, and what they are derived from, without torch's own."""
    every = dict.fromkeys(c for m in modules for c in type(m).__mro__)
    return [c for c in every if c is not object and not c.__module__.startswith("torch.")]


def _same(own: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> bool:
    for name, value in settings:
        now = own.get(name, _USUAL)  # which is no setting
        if now is not value and (type(now) is not type(value) or now != value):
            return False
    return True


def _still(get: Getter, value: Any) -> bool:
    try:
        now = get()
    except (KeyError, ValueError, AttributeError, IndexError):  # no longer there
        return False
    return now is value or (type(now) is type(value) and now == value)


def _walk(cell: Any) -> Iterator[tuple[str, Getter, Any]]:
    """Tensors, modules, and simple values that are not attributes of modules: (name, how to look it up, the value now)."""
    seen: set[int] = set()
    for root, getter in _roots(cell):
        yield from _inside(root, getter, seen, 0)


def _roots(cell: Any) -> Iterator[tuple[str, Getter]]:
    if isinstance(cell, functools.partial):
        for i in range(len(cell.args)):
            yield f"argument_{i}", functools.partial(lambda i: cell.args[i], i)
        for key in cell.keywords:
            yield key, functools.partial(lambda k: cell.keywords[k], key)
        yield from _roots(cell.func)
    elif inspect.ismethod(cell):
        yield "", lambda: cell.__self__
        yield from _roots(cell.__func__)
    elif inspect.isfunction(cell):
        for name, content in zip(cell.__code__.co_freevars, cell.__closure__ or (), strict=True):
            yield name, functools.partial(lambda c: c.cell_contents, content)
        for name in cell.__code__.co_names:
            if name in cell.__globals__:
                yield name, functools.partial(lambda n: cell.__globals__[n], name)
        defaults = cell.__defaults__ or ()
        count = cell.__code__.co_argcount
        for i, name in enumerate(cell.__code__.co_varnames[count - len(defaults) : count]):
            yield name, functools.partial(lambda i: cell.__defaults__[i], i)  # type: ignore[index]
    else:
        yield "", lambda: cell
        call = getattr(type(cell), "forward" if isinstance(cell, nn.Module) else "__call__", None)
        if inspect.isfunction(call):
            yield from _roots(call)


def _inside(name: str, get: Getter, seen: set[int], depth: int, of_module: bool = False) -> Iterator[tuple[str, Getter, Any]]:
    try:
        value = get()
    except (KeyError, ValueError, AttributeError, IndexError):  # an empty closure cell, say
        return
    if isinstance(value, Tensor):
        yield name, get, value
        return
    if type(value) in SIMPLE and not of_module:
        yield name, get, value
    if depth > 3 or id(value) in seen:
        return
    prefix = name + "." if name else ""
    parts: list[tuple[str, Getter]]
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield name, get, value
        held = [k for k, v in vars(value).items() if not k.startswith("_") or (k not in _USUAL and isinstance(v, Tensor))]
        own = [*value._parameters, *value._buffers, *held, *value._modules]
        parts = [(prefix + k, functools.partial(lambda g, k: getattr(g(), k), get, k)) for k in own]
        depth -= 1  # modules may nest as deep as they like
    elif isinstance(value, (list, tuple)):
        parts = [(f"{prefix}{i}", functools.partial(lambda g, i: g()[i], get, i)) for i in range(min(len(value), 64))]
    elif isinstance(value, dict) and len(value) <= 64:
        parts = [(f"{prefix}{k}", functools.partial(lambda g, k: g()[k], get, k)) for k in value]
    elif inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial):
        seen.add(id(value))
        parts = [(prefix + k, g) for k, g in _roots(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.ismodule(value):
        seen.add(id(value))
        parts = [(prefix + k, functools.partial(lambda g, k: getattr(g(), k), get, k)) for k in vars(value)]
    else:
        return
    for part, getter in parts:
        yield from _inside(part, getter, seen, depth + 1, isinstance(value, nn.Module))
