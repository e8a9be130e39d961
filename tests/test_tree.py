"""Trees of tensors: what they print, and that they come back."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from seqparc.errors import ShapeError
from seqparc.tree import flatten

S, X = torch.ones(3, 8), torch.ones(3, 5)
HC = namedtuple("HC", "h c")


@dataclass
class Carry:
    h: Tensor
    c: Tensor


TREES = {
    "tensor": S,
    "(tensor, tensor)": (S, X),
    "(tensor,)": (S,),
    "[tensor, tensor]": [S, X],
    "{'h': tensor, 'c': tensor}": {"h": S, "c": X},
    "HC(h=tensor, c=tensor)": HC(S, X),
    "Carry(h=tensor, c=tensor)": Carry(S, X),
    "(tensor, {'a': [tensor]})": (S, {"a": [X]}),
}


@pytest.mark.parametrize("text", TREES)
def test_trees_flatten_print_and_come_back(text: str) -> None:
    leaves, structure = flatten(TREES[text])
    back = structure.unflatten(leaves)
    again, same = flatten(back)
    assert repr(structure) == text
    assert structure == same and hash(structure) == hash(same) and structure.count == len(leaves)
    assert type(back) is type(TREES[text]) and all(a is b for a, b in zip(leaves, again, strict=True))


def test_structures_differ_by_kind_class_and_names() -> None:
    structures = [flatten(t)[1] for t in TREES.values()]
    assert len(set(structures)) == len(structures)


@pytest.mark.parametrize("tree", [None, 3, (S, None), {"a": "b"}])
def test_a_tree_holds_tensors_only(tree: Any) -> None:
    with pytest.raises(ShapeError, match="expected a tensor"):
        flatten(tree)


def test_conform_follows_the_names_of_a_dict() -> None:
    structure = flatten({"h": S, "c": X})[1]
    h, c = structure.conform({"c": X, "h": S}) or (None, None)
    assert h is S and c is X
    assert structure.conform({"h": S}) is None and structure.conform((S, X)) is None
