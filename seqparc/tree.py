"""Trees of tensors: tensors in tuples, lists, dicts, named tuples and dataclasses, which need no registration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from seqparc.errors import ShapeError


@dataclass(frozen=True, repr=False)
class Structure:
    """The shape of a tree of tensors: `kind` is "leaf", "tuple", "list", "dict", "namedtuple" or "dataclass"."""

    kind: str
    build: Any = None  # the class of a named tuple or dataclass
    names: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def count(self) -> int:
        """Number of tensors."""
        return 1 if self.kind == "leaf" else sum(c.count for c in self.children)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The tree with these leaves."""
        if self.kind == "leaf":
            return leaves[0]
        parts, at = [], 0
        for child in self.children:
            parts.append(child.unflatten(leaves[at : at + child.count]))
            at += child.count
        match self.kind:
            case "tuple":
                return tuple(parts)
            case "list":
                return parts
            case "dict":
                return dict(zip(self.names, parts, strict=True))
            case "namedtuple":
                return self.build(*parts)
            case "dataclass":
                return self.build(**dict(zip(self.names, parts, strict=True)))
            case _:
                raise AssertionError(self.kind)

    def conform(self, tree: Any) -> list[Tensor] | None:
        """The leaves of a tree of this structure, else None. The order of dict keys is free, tuples and lists are alike."""
        if self.kind == "leaf":
            return [tree] if isinstance(tree, Tensor) else None
        node = _node(tree)
        if node is None or len(node.parts) != len(self.children):
            return None
        if node.kind != self.kind and {node.kind, self.kind} != {"tuple", "list"}:
            return None
        if node.build is not self.build or set(node.names) != set(self.names):
            return None
        named = dict(zip(node.names, node.parts, strict=True)) if node.names else {}
        parts = [named[n] for n in self.names] if named else node.parts
        found = [c.conform(p) for c, p in zip(self.children, parts, strict=True)]
        return None if any(f is None for f in found) else [t for f in found if f is not None for t in f]

    def __repr__(self) -> str:
        inner = [repr(c) for c in self.children]
        match self.kind:
            case "leaf":
                return "tensor"
            case "tuple":
                return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
            case "list":
                return f"[{', '.join(inner)}]"
            case "dict":
                return "{" + ", ".join(f"{n!r}: {c}" for n, c in zip(self.names, inner, strict=True)) + "}"
            case _:
                return f"{self.build.__name__}({', '.join(f'{n}={c}' for n, c in zip(self.names, inner, strict=True))})"


LEAF = Structure("leaf")


class _Node(NamedTuple):
    kind: str
    build: Any
    names: tuple[Any, ...]
    parts: list[Any]


def _node(tree: Any) -> _Node | None:
    """One level of a tree; None for what is not a container."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return _Node("namedtuple", type(tree), tuple(tree._fields), list(tree))
    if isinstance(tree, (tuple, list)):
        return _Node("list" if isinstance(tree, list) else "tuple", None, (), list(tree))
    if isinstance(tree, dict):
        return _Node("dict", None, tuple(tree), list(tree.values()))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = tuple(f.name for f in dataclasses.fields(tree))
        return _Node("dataclass", type(tree), names, [getattr(tree, n) for n in names])
    return None


def flatten(tree: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of a tree in order, and its structure. Raises ShapeError for anything else in it."""
    if isinstance(tree, Tensor):
        return [tree], LEAF
    node = _node(tree)
    if node is None:
        raise ShapeError(f"expected a tensor, or a tuple, list, dict, named tuple or dataclass of tensors, not {type(tree).__name__}")
    inner = [flatten(p) for p in node.parts]
    return [t for leaves, _ in inner for t in leaves], Structure(node.kind, node.build, node.names, tuple(s for _, s in inner))


def describe(leaves: Sequence[Tensor]) -> str:
    """Dtypes and shapes, for messages."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in leaves)


def seen(tree: Any) -> str:
    """A tree as messages show it."""
    try:
        leaves, structure = flatten(tree)
    except ShapeError:
        return type(tree).__name__
    return f"{structure} = {describe(leaves)}"
