"""Which numbers torch computes each operation of the core with, and what the core's one floating type has to do to give the same.

A core computes everything in float32 or in float64. Torch computes each operation in the dtype its operands promote to. Where that is the
narrower one, results and constants are rounded to it; integers are exact as long as they are below a power of two, which is found out here
of what is made on the way, and looked at in every call of what comes in and goes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from seqparc.errors import UnsupportedOpError
from seqparc.ops import ATEN, SPLITS, VIEWS

HALVES = (torch.bfloat16, torch.float16)
COMPARISONS = frozenset(name for name, row in ATEN.items() if row.name in ("lt", "le", "gt", "ge", "eq", "ne"))
#: Rows of the operation table that round to a dtype.
ROUNDING = {torch.float32: "to_float32", torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operations, whatever their overload, that give numbers they were given, or ones that are exact beside them.
_PICKING = _names(
    """where masked_fill neg _neg_view abs relu maximum minimum clamp clamp_min clamp_max hardtanh cat stack slice_scatter select_scatter
    as_strided_scatter index amax amin sign sgn floor ceil trunc round fmod threshold_backward select_backward slice_backward
    diagonal_backward _conj _conj_physical conj_physical real imag view_as_real view_as_complex view_as_real_copy view_as_complex_copy
    complex zeros_like ones_like new_zeros new_ones empty_like new_empty"""
)


class Limits(NamedTuple):
    """Below what integers are exact: any number, and those that come in, go out and are states, for whatever is made of them."""

    all: int
    given: int


LIMITS = {torch.float32: Limits(1 << 24, 1 << 22), torch.float64: Limits(1 << 53, 1 << 50)}


#: What only changes a dtype.
CASTS = ("_to_copy", "_copied")


def packet(node: fx.Node) -> str:
    """The name of an operation, without its overload."""
    name = str(node.target) if isinstance(node.target, (str, torch._ops.OpOverload)) else getattr(node.target, "__name__", "")
    return name.removeprefix("aten.").partition(".")[0]


def is_count(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are integers; truth values are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def common(node: fx.Node) -> torch.dtype | None:
    """The dtype that an operation is computed in; None of one that gives several, or only casts."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if str(node.target) not in COMPARISONS:
        return None if packet(node) in CASTS else value.dtype
    numbers: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2]]
    return torch.result_type(*numbers)


def picks(node: fx.Node) -> bool:
    """Whether an operation's results need no rounding where its operands did not."""
    target = str(node.target)
    return target in VIEWS or target in SPLITS or packet(node) in _PICKING


class Kinds:
    """What is known of the dtypes of a core: of `nodes`, in order, of which some come from outside.

    explicit: whether 16 bits are rounded to where the cell asks for it; where it has them throughout, or by autocast, float32 is as good.
    wide: computes in float64 whatever floats it has. strict: raises UnsupportedOpError where that is not enough for its integers.
    """

    def __init__(self, nodes: Sequence[fx.Node], states: Sequence[fx.Node], explicit: bool, wide: bool, strict: bool = True) -> None:
        self.nodes, self.explicit = nodes, explicit
        inside = [n for n in nodes if n.meta["kind"] == "state"]
        read = {a for n in inside for a in n.all_input_nodes if a.meta["kind"] == "x"}
        floats = {d for n in (*inside, *read, *states) for d in _dtypes(n)} | {c for n in inside if (c := common(n)) is not None}
        self.outer = {*states, *(a for n in inside for a in n.all_input_nodes if a.meta["kind"] in ("x", "param"))}
        whole = not any(n.meta["val"].dtype.is_floating_point or n.meta["val"].dtype.is_complex for n in states)
        counts = whole and any(n.meta["val"].dtype in _WIDE for n in states)
        double = wide or counts or bool(floats & {torch.float64, torch.complex128})
        self.dtype = torch.float64 if double else torch.float32
        self.most: dict[fx.Node, float] = {}
        if self.inexact() is not None and not double:
            self.dtype = torch.float64
        why = self.inexact()
        if why is not None and strict:
            raise UnsupportedOpError(
                f"{why.meta.get('src') or 'the cell'}: {why.target} may make integers of more than 53 bits, which are not exact in float64"
            )

    def inexact(self) -> fx.Node | None:
        """The first operation of the core whose integers may be larger than they are exact; finds the largest of every other."""
        limits = LIMITS[self.dtype]
        self.most = {}
        for node in self.nodes:
            found = self.most[node] = _most(node, self.most, limits)
            if found > limits.all and node.meta["kind"] == "state" and _computes(node):
                return node
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex):
                self.most[node] = min(found, _range(value.dtype))
        return None

    @property
    def given(self) -> int | None:
        """What integers that come in and go out are to be below; None where there are none that could reach it."""
        limit = LIMITS[self.dtype].given
        return limit if any(reaches(limit, d) for n in self.outer for d in _dtypes(n)) else None

    def wraps(self, node: fx.Node) -> bool:
        """Whether integers of a node may leave their dtype's range, where torch's begin at its other end."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not is_count(value.dtype) or value.dtype.itemsize == 8 or node.meta["kind"] != "state":
            return False
        if packet(node) in CASTS:
            wraps = not _floating(node.args[0]) or value.dtype.itemsize < 4  # a float that 32 bits cannot hold becomes anything
        else:
            wraps = _computes(node) or packet(node) in ("neg", "abs")
        return wraps and (not value.dtype.is_signed or _most(node, self.most, LIMITS[self.dtype]) > torch.iinfo(value.dtype).max)

    def rounding(self, dtype: torch.dtype | None) -> str | None:
        """The operation that rounds to a dtype; None where numbers of it need none."""
        if dtype is None:
            return None
        real = dtype.to_real() if dtype.is_complex else dtype
        if real in HALVES:
            return ROUNDING[real] if self.explicit else None
        return ROUNDING[real] if real is torch.float32 and self.dtype is torch.float64 else None

    def constant(self, number: float, dtype: torch.dtype | None, node: fx.Node | None) -> float:
        """A number as an operation in a dtype takes it: torch's arithmetic in 16 bits has numbers of 32, its comparisons have not."""
        if dtype is torch.float32:
            rounded = self.dtype is torch.float64
        else:
            whole = node is not None and (picks(node) or str(node.target) in COMPARISONS or packet(node) in ("full_like", "new_full"))
            rounded = whole and dtype is not None and (dtype in HALVES or is_count(dtype))
        if not rounded or dtype is None:
            return float(number)
        return float(torch.tensor(int(number) if is_count(dtype) else float(number)).to(dtype))

    def converts(self, node: fx.Node, dtype: torch.dtype | None) -> str | None:
        """The operation that an operand of an operation in a dtype is first rounded by, if any."""
        value = node.meta.get("val")
        name = self.rounding(dtype)
        if dtype is None or name is None or not isinstance(value, torch.Tensor) or value.dtype is dtype or value.dtype is torch.bool:
            return None
        if is_count(value.dtype):
            return name if self.most.get(node, math.inf) > 1 / torch.finfo(dtype).eps else None
        return name if torch.finfo(value.dtype).eps < torch.finfo(dtype).eps else None


#: Integers of which no floating type of 32 bits holds all.
_WIDE = (torch.int64, torch.int32, torch.uint32, torch.uint64)


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    value = node.meta.get("val")
    return [v.dtype for v in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(v, torch.Tensor)]


def _range(dtype: torch.dtype) -> float:
    """The largest magnitude that a dtype of integers, or of truth values, has."""
    return 1.0 if dtype is torch.bool else float(max(torch.iinfo(dtype).max, -torch.iinfo(dtype).min))


def _computes(node: fx.Node) -> bool:
    """Whether a node makes integers out of integers, or compares them, other than by picking some."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or picks(node) or packet(node) in CASTS or not node.all_input_nodes:
        return False
    return is_count(value.dtype) or str(node.target) in COMPARISONS


# -- how large integers may be -------------------------------------------------------------------------------------------

Most = Callable[..., float]


def _largest(*of: float) -> float:
    return max(of, default=0)


def _total(*of: float) -> float:
    return sum(of)


def _product(a: float, b: float = 1) -> float:
    return 0 if 0 in (a, b) else a * b


def _power(a: float, exponent: float) -> float:
    return 1.0 if a <= 1 else math.inf if exponent * math.log2(a) > 1000 else a**exponent


#: By the name of an operation, from the largest magnitudes of its operands that of its results.
_MOST: dict[str, Most] = {
    **dict.fromkeys(("add", "sub", "rsub"), _total),
    **dict.fromkeys(("where", "masked_fill", "maximum", "minimum", "cat", "stack", "slice_scatter", "as_strided_scatter"), _largest),
    **dict.fromkeys(("neg", "abs", "relu", "amax", "amin", "floor", "ceil", "trunc", "round", "clone", "index", "fill"), _largest),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh", "floor_divide", "div", "select_scatter"), _largest),
    "addcmul": lambda t, a, b: t + _product(a, b), "mul": _product, "square": lambda a: _product(a, a), "pow": _power,
    "sign": lambda a: 1, "sgn": lambda a: 1,
    "remainder": lambda a, b: b, "fmod": min,
    **dict.fromkeys(("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"), lambda *a: 1),
}  # fmt: skip


#: Sums of products over the last axis of a factor, with what is added to them in front.
_PRODUCTS = ("mm", "bmm", "mv", "dot", "linear", "addmm", "baddbmm")


def _most(node: fx.Node, known: dict[fx.Node, float], limits: Limits) -> float:
    """The largest magnitude that integers of a node may have; of a comparison the largest that it compares."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        return math.inf
    outside = float(min(_range(value.dtype), limits.given))
    if node.meta["kind"] == "const" and value.numel():
        return float(value.abs().max() if value.dtype is not torch.bool else 1)
    if node.op == "placeholder" or node.meta["kind"] != "state":
        return outside
    name, target = packet(node), str(node.target)
    operands = [_of(a, known) for a in node.args if isinstance(a, (fx.Node, int, float, list, tuple))]
    if target in COMPARISONS:
        whole = [o for o, a in zip(operands, node.args, strict=False) if not _floating(a)]
        return max(whole, default=0) if len(whole) == 2 else 0
    if value.dtype is torch.bool:
        return 1
    if target in VIEWS or target in SPLITS or name == "_getitem":
        return operands[0] if node.args and isinstance(node.args[0], fx.Node) else outside
    if name in CASTS:
        source = node.args[0]
        # An integer made of a number with a fraction is as exact as that; in float64 it is taken to be below 2^31.
        floating = math.inf if limits is LIMITS[torch.float32] else float(1 << 31)
        return floating if _floating(source) else operands[0]
    if name in _PRODUCTS:
        *added, a, b = operands[: 3 if name.startswith(("add", "badd")) else 2]
        first = node.args[len(added)].meta["val"]  # type: ignore[union-attr]
        return sum(added) + _product(_product(a, b), float(first.shape[-1]))
    if name in ("sum", "cumsum"):
        first = node.args[0]
        given = first.meta["val"]  # type: ignore[union-attr]
        return _product(operands[0], float(given.numel() / max(value.numel(), 1) if name == "sum" else max(given.shape, default=1)))
    if name == "pow" and any(isinstance(a, fx.Node) for a in node.args[1:]):
        return math.inf  # which may be negative, and then is none of the table's
    if name == "addcmul" and "value" in node.kwargs:
        operands[1] = _product(operands[1], abs(node.kwargs["value"]))  # type: ignore[arg-type]
    if name in ("add", "sub", "rsub") and "alpha" in node.kwargs:
        operands[1 if name != "rsub" else 0] = _product(operands[1 if name != "rsub" else 0], abs(node.kwargs["alpha"]))  # type: ignore[arg-type]
    if name in ("clamp", "hardtanh") and len(node.args) == 3 and all(isinstance(a, (int, float)) for a in node.args[1:]):
        return max(operands[1:])
    rule = _MOST.get(name)
    if rule is None:
        return outside if not name.startswith(("new_", "zeros", "ones", "full", "empty")) else _filled(node)
    if name == "where":
        operands = operands[1:]
    return float(rule(*operands))


def _filled(node: fx.Node) -> float:
    return max([1.0, *(abs(float(a)) for a in node.args if isinstance(a, (int, float)))])


def _floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _of(argument: Any, known: dict[fx.Node, float]) -> float:
    """The largest magnitude of an argument."""
    if isinstance(argument, (list, tuple)):
        return max((_of(a, known) for a in argument), default=0)
    return known.get(argument, math.inf) if isinstance(argument, fx.Node) else abs(float(argument or 0))


def reaches(limit: int, dtype: torch.dtype) -> bool:
    """Whether there are integers of a dtype that are not below a limit."""
    return is_count(dtype) and _range(dtype) > limit


def below(limit: int, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether integers, or what a core made of integers, are below a limit everywhere."""
    return all(not t.numel() or bool(((t < limit) & (t > -limit)).all()) for t in tensors)


