"""Which products of the input are better made inside the loop than before it."""

from __future__ import annotations

from torch import fx

#: Products with a weight, and where their two factors stand.
_PRODUCTS = {"aten.mm.default": (0, 1), "aten.addmm.default": (1, 2)}
#: A product of x with a weight is folded into the core if x has at most this many numbers, and this many times fewer than come out.
FOLD_MOST, FOLD_RATIO = 16, 3


def worth_folding(node: fx.Node) -> bool:
    """Whether a value made from x alone is better computed inside the loop: its traffic costs more than its arithmetic."""
    target = str(node.target)
    if target in _PRODUCTS:
        left, right = (node.args[i] for i in _PRODUCTS[target])
        if not isinstance(left, fx.Node) or left.meta["kind"] != "x" or right.meta["kind"] != "param":  # type: ignore[union-attr]
            return False
        inside, outside = (n.meta["val"].shape[-1] for n in (left, node))
        return bool(inside <= FOLD_MOST and outside >= FOLD_RATIO * inside and left.meta["val"].dim() == 2)
    if target in ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor"):
        made = [a for a in node.all_input_nodes if a.meta["kind"] == "x"]
        return bool(made) and all(worth_folding(a) for a in made)
    return False
