"""What a cell can reach: parameters, buffers, plain attributes, variables it closes over; by name, looked up anew when asked.

A compiled cell reads them at every call as the plain loop would: a parameter that was replaced, or a variable that was bound
to another tensor, counts from then on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

#: Looks a tensor up; raises KeyError, AttributeError or the like if it is no longer there.
Getter = Callable[[], Any]


def reachable(cell: Any) -> Iterator[tuple[str, Getter, Tensor]]:
    """(name, how to look it up, the tensor now) of every tensor found in a cell, once each; names are unique."""
    names: set[str] = set()
    for found, get, tensor in _everything(cell):
        if isinstance(tensor, Tensor):
            name = found
            while name in names:
                name += "_"
            names.add(name)
            yield name, get, tensor


def parts(cell: Any) -> list[nn.Module]:
    """Every module a cell is, has inside, is a method of, holds or closes over."""
    return [found for _, _, found in _everything(cell) if isinstance(found, nn.Module)]


def _everything(cell: Any) -> Iterator[tuple[str, Getter, Any]]:
    """Tensors and modules, once each; names need not be unique."""
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


def _inside(name: str, get: Getter, seen: set[int], depth: int) -> Iterator[tuple[str, Getter, Any]]:
    try:
        value = get()
    except (KeyError, ValueError, AttributeError, IndexError):  # an empty closure cell, say
        return
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield name, get, value
        return
    if depth > 3 or id(value) in seen:
        return
    prefix = name + "." if name else ""
    parts: list[tuple[str, Getter]]
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield name, get, value
        own = [*value._parameters, *value._buffers, *(k for k in vars(value) if not k.startswith("_")), *value._modules]
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
        yield from _inside(part, getter, seen, depth + 1)
