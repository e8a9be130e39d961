"""From the recorded graph to the IR: every operation on a state → state path, element by element.

The recording was made at a small batch size, and every tensor of it is laid out explicitly: for each of its elements,
which sample it belongs to and which element of the IR value it is. Views are lowered by applying them to such a layout,
so any view, split, cat, slice or in-place write is right by construction; and a value whose samples do not all read the
same elements of their own sample mixes the batch, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from seqparc import ir
from seqparc.errors import TraceError, UnsupportedOpError
from seqparc.exact import CASTS, Kinds, common, is_count, packet, picks
from seqparc.fold import worth_folding
from seqparc.graphs import PARTS, Graph, mixes
from seqparc.ir import Value
from seqparc.layout import Ints, Laid, Pair
from seqparc.ops import ATEN, SPLITS, VIEWS
from seqparc.outside import Outside


@dataclass
class Lowered:
    program: ir.Program
    streams: list[fx.Node]
    params: list[fx.Node]
    #: Elements of a parameter slot that are zero by the value of a constant.
    known_zero: dict[int, NDArray[np.bool_]]
    #: Tensors whose values were used (masks, indices): a change means lowering anew.
    frozen: dict[str, torch.Tensor]
    dtype: torch.dtype
    #: What integers that come in, go out or are states are to stay below; None where there are none that could reach it.
    given: int | None


#: Slots from here on stand for results of operations that are not known.
UNSEEN = 1 << 20


class Lowering(Outside):
    """Lowers the core of a graph at one of its two batch sizes."""

    def __init__(self, graph: Graph, which: int = 0, fold: bool = False, unknown: Callable[[fx.Node], bool] | None = None) -> None:
        super().__init__(graph, which)
        self.folding = fold
        self.unknown = unknown  # whether an operation that is not known treats each sample by itself: if so, any may stand for it
        self.unseen = 0
        self.done: dict[fx.Node, Any] = {}
        self.part: int | None = None  # which part of complex values is being lowered, while one is
        self.common: torch.dtype | None = None  # what the operation that is being lowered is computed in
        self.core = _needed(graph)
        self.kinds = Kinds(self.core, (*graph.state, *graph.next), graph.explicit, graph.wide, strict=unknown is None)

    # -- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        for node in self.core:  # in order, so that recursion stays shallow
            if node.meta["kind"] == "state" and "val" in node.meta:
                self.lower(node)
        state, following, sizes = [], [], []
        for slot, (before, after) in enumerate(zip(self.graph.state, self.graph.next, strict=True)):
            size = before.meta["val"].numel() // self.graph.batch_sizes[0]
            state.append(ir.leaf("state", slot, np.arange(size)[None]))
            following.append(self._as_vector(self.lower(after), tuple(before.meta["val"].shape)))
            sizes.append(size)
        program = ir.Program(
            name="cell",
            lanes=1,
            state=tuple(state),
            next=tuple(following),
            emits=tuple(ir.Store(i, v.index, f) for i, (v, f) in enumerate(zip(state, following, strict=True))),
            state_sizes=tuple(sizes),
            stream_sizes=tuple(n.meta["val"].numel() // n.meta["val"].shape[0] for n in self.streams),
            param_sizes=tuple(n.meta["val"].numel() for n in self.params),
            emit_sizes=tuple(sizes),
        )
        return Lowered(program, self.streams, self.params, self.known_zero, self.frozen, self.kinds.dtype, self.kinds.given)

    # -- building blocks of operations -------------------------------------------------------------------------------

    def map(self, op: str, *operands: Laid | float) -> Laid:
        tensors = [t for t in operands if isinstance(t, Laid)]
        shape = np.broadcast_shapes(*(t.shape for t in tensors))
        batch, elems = self._join(shape, tensors)
        size = elems[0].size
        picked = iter(elems)
        values = [
            ir.take(t.value, next(picked)) if isinstance(t, Laid) else ir.const(self.kinds.constant(t, self.common, self.node), size)
            for t in operands
        ]
        dead = np.logical_or.reduce([self._dead(v) for v in values]) if op == "mul" else np.zeros(size, bool)
        if not dead.any():
            return self._new(ir.map_(op, *values, src=self._src()), shape, batch)
        alive = np.flatnonzero(~dead)  # what is multiplied by a constant zero is not computed
        made = [ir.map_(op, *(ir.take(v, alive) for v in values), src=self._src())] if alive.size else []
        return self._new(ir.gather(made, np.where(dead, -1, 0), np.where(dead, -1, np.cumsum(~dead) - 1)), shape, batch)

    def _dead(self, value: Value) -> NDArray[np.bool_]:
        """Elements of a value that are zero by the value of a constant."""
        if isinstance(value, ir.Leaf) and value.kind == "param" and value.slot in self.known_zero:
            return self.known_zero[value.slot][value.index.array[0]]
        return value.which.array < 0 if isinstance(value, ir.Gather) else np.zeros(value.size, bool)

    def fold(self, kind: ir.Fold, t: Laid, dims: Sequence[int] | None, keepdim: bool) -> Laid:
        ndim = len(t.shape)
        axes = tuple(range(ndim)) if not dims else tuple(sorted(d % ndim for d in dims))
        kept = tuple(d for d in range(ndim) if d not in axes)
        elem = t.elem.transpose(*kept, *axes).reshape(*(t.shape[d] for d in kept), -1)
        shape = tuple(1 if d in axes else n for d, n in enumerate(t.shape)) if keepdim else tuple(t.shape[d] for d in kept)
        batch = None
        if t.batch is not None:
            b = t.batch.transpose(*kept, *axes).reshape(elem.shape)
            if not (b == b[..., :1]).all():
                raise self._mixes()
            batch = b[..., 0].reshape(shape)
        flat = elem.reshape(-1, elem.shape[-1])
        return self._new(ir.reduce_(kind, t.value, self._per_sample(flat, batch), self._src()), shape, batch)

    def product(self, a: Laid, b: Laid) -> Laid:
        """Batched matrix product [.., M, K] @ [.., K, N], leading axes equal."""
        *lead, m, k = a.shape
        n = b.shape[-1]
        shape = (*lead, m, n)
        full = (*lead, m, n, k)

        def spread(x: Ints, left: bool) -> Ints:
            return np.broadcast_to(x[..., :, None, :] if left else np.swapaxes(x, -1, -2)[..., None, :, :], full)

        batch = None
        for t, left in ((a, True), (b, False)):
            if t.batch is not None:
                s = spread(t.batch, left)
                if not (s == s[..., :1]).all() or (batch is not None and not np.array_equal(batch, s[..., 0])):
                    raise self._mixes()
                batch = s[..., 0]
        ia = self._per_sample(spread(a.elem, True).reshape(-1, k), batch)
        ib = self._per_sample(spread(b.elem, False).reshape(-1, k), batch)
        return self._new(self._contract(a.value, b.value, ia, ib), shape, batch)

    def _contract(self, a: Value, b: Value, ia: Ints, ib: Ints) -> Value:
        """A contraction with its parameter operand first; products with a weight known to be zero are left out."""
        if _is_param(b) and not _is_param(a):
            a, b, ia, ib = b, a, ib, ia
        a, ia = ir.absorb(a, ia)
        if isinstance(a, ir.Leaf) and a.kind == "param" and a.slot in self.known_zero:
            dead = self.known_zero[a.slot][a.index.array[0][ia]] | (ia < 0)
            alive = np.argsort(dead, axis=1, kind="stable")  # live terms first, in order
            width = max(1, int((~dead).sum(1).max()))
            ia = np.where(np.take_along_axis(dead, alive, 1), -1, np.take_along_axis(ia, alive, 1))[:, :width]
            ib = np.where(ia < 0, -1, np.take_along_axis(ib, alive, 1)[:, :width])
        return ir.contract(a, b, ia, ib, self._src())

    # -- nodes -------------------------------------------------------------------------------------------------------

    def lower(self, node: Any) -> Any:
        """A node's lowered tensor (or list of tensors, or a plain argument as it is)."""
        if isinstance(node, (list, tuple)):
            return [self.lower(n) for n in node]
        if not isinstance(node, fx.Node):
            return node
        if node not in self.done:
            outer, part, dtype = self.node, self.part, self.common
            self.node, self.part, self.common = node, None, None
            self.done[node] = self._lower(node)
            self.node, self.part, self.common = outer, part, dtype
        found = self.done[node]
        found = found[self.part] if isinstance(found, Pair) and self.part is not None else found
        rounding = self.kinds.converts(node, self.common) if isinstance(found, Laid) else None
        return found if rounding is None else self.map(rounding, found)

    def _lower(self, node: fx.Node) -> Any:
        kind, target = node.meta["kind"], str(node.target)
        val: Any = node.meta.get("val")
        if node in self.graph.state:
            size = val.numel() // val.shape[0]
            return self._input(ir.leaf("state", self.graph.state.index(node), np.arange(size)[None]), val)
        is_view = _moves_only(node)
        if kind == "const" and node.op != "placeholder" and not is_view:
            return self._constant(node)
        if kind == "param" and not is_view and node.meta.get("along") is not None:
            return self._shared(node)
        if kind in ("param", "x") and not is_view and not (self.folding and worth_folding(node)):
            # All of an opaque cell runs over all rows; parts of what is complex are nobody's operation.
            if self.unknown is not None and kind == "x" and node.op != "placeholder" and node.target not in PARTS:
                return self._operation(node)
            if kind == "param" or _batch_first(val, self.graph.batch_sizes[0]):
                return self._frontier(node, kind, val)
            # Its samples lie along another axis, as the core can follow and a stream cannot.
            try:
                return self._operation(node)
            except UnsupportedOpError as error:
                raise TraceError(
                    f"{node.meta.get('src') or 'the cell'}: {target} makes a tensor of shape {list(val.shape)} out of x; its first axis "
                    "must stay the batch axis up to where the state comes in"
                ) from error
        return self._operation(node)

    def _operation(self, node: fx.Node) -> Any:
        """A node in the core; where its operation is not known, what may stand for it."""
        if self.unknown is None or self.part is not None:
            return self._known(node)
        self.lower([n for n in node.all_input_nodes if "val" in n.meta])  # what is refused in there stays so
        try:
            return self._known(node)
        except UnsupportedOpError:
            if not self.unknown(node):
                raise
            return self._any(node)

    def _known(self, node: fx.Node) -> Any:
        """A node in the core, by its operation, in numbers of its dtype."""
        if _is_part(node):
            return self.lower(node.args[0])[node.args[1]]
        self.common = common(node)
        found, val = self._by_name(node), node.meta["val"]
        if isinstance(val, (list, tuple)):
            return [self._kept(node, one, v) for one, v in zip(found, val, strict=False)]
        return self._kept(node, found, val)

    def _by_name(self, node: fx.Node) -> Any:
        if not any(_is_complex(n) for n in (node, *node.all_input_nodes)):
            return self.plain(node)
        handler = COMPLEX.get(str(node.target), COMPLEX["_copied"] if getattr(node.target, "__name__", "") == "_copied" else None)
        if handler is None:
            raise UnsupportedOpError(
                f"{node.meta.get('src') or 'the cell'}: the operation {node.target} lies on a path from the state to the next state, and "
                "is not known there for complex numbers"
            )
        args, kwargs = node.meta["static"][self.which]
        return handler(self, node, *args, **kwargs)

    def _kept(self, node: fx.Node, found: Any, val: Any) -> Any:
        """A result as its dtype keeps it."""
        self.common = None
        if isinstance(found, Pair):
            return Pair(*(self._kept(node, part, val) for part in found))
        if not isinstance(found, Laid) or not isinstance(val, torch.Tensor):
            return found
        if val.dtype is torch.bool and packet(node) in ("add", "sum"):
            return self.map("ne", found, 0.0)
        if self.kinds.wraps(node):
            return self.wrapped(found, val.dtype)
        rounding = None if picks(node) or packet(node) in CASTS else self.kinds.rounding(val.dtype)
        return found if rounding is None else self.map(rounding, found)

    def wrapped(self, t: Laid, dtype: torch.dtype) -> Laid:
        """Integers beyond a dtype's range as it holds them: by as many whole ranges further on."""
        low, size = float(torch.iinfo(dtype).min), 2.0 ** (8 * dtype.itemsize)
        ranges = self.map("floor", self.map("mul", self.map("sub", t, low) if low else t, 1 / size))
        return self.map("sub", t, self.map("mul", ranges, size))

    def cast(self, t: Laid, of: torch.dtype, to: torch.dtype) -> Laid:
        """Numbers of a dtype in another."""
        if to.is_complex:
            return self.cast(t, of, to.to_real())
        if to is torch.bool:
            return t if of is torch.bool else self.map("ne", t, 0.0)
        if is_count(to):
            return self.map("trunc", t) if of.is_floating_point else t
        rounding = None if of is torch.bool or of is to else self.kinds.rounding(to)
        return t if rounding is None else self.map(rounding, t)

    def _any(self, node: fx.Node) -> Any:
        """What stands for the result of an operation that is not known: numbers of which only the sample is."""
        val = node.meta["val"]
        made = [self._unseen(v) for v in (val if isinstance(val, (list, tuple)) else (val,))]
        return made if isinstance(val, (list, tuple)) else made[0]

    def _unseen(self, val: torch.Tensor) -> Laid | Pair:
        if val.dtype.is_complex:
            return Pair(self._unseen(val.real), self._unseen(val.imag))  # type: ignore[arg-type]
        self.unseen += 1
        return self._input(ir.leaf("stream", UNSEEN + self.unseen, np.arange(val[0].numel())[None]), val)

    def plain(self, node: fx.Node) -> Any:
        """An operation on real numbers, or on one part of complex ones."""
        target, is_view = str(node.target), _moves_only(node)
        handler = STRUCTURAL.get(target)
        args, kwargs = node.meta["static"][self.which]
        if handler is not None:
            return handler(self, node, *args, **kwargs)
        if is_view:
            return self._view(node, args, kwargs)
        row = ATEN.get(target)
        if row is not None:
            return self.map(row.name, *self._operands(args[: row.arity]))
        raise UnsupportedOpError(
            f"{node.meta.get('src') or 'the cell'}: the operation {target} lies on a path from the state to the next state and has no "
            "row in seqparc's operation table"
        )

    def _operands(self, args: Sequence[Any]) -> list[Any]:
        return [self.lower(a) for a in args]

    def _samples(self, node: fx.Node) -> Ints:
        return Rows(self.graph, self.which).proved(node)

    def _view(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = node.target.__name__ if callable(node.target) else ""
        source = self.lower(args[0])
        if name == "_copied":
            cast = self.cast(source, args[0].meta["val"].dtype, args[2])
            return self.move(node, [cast], lambda c: c[0].expand(args[1]))[0]
        rest = [self._static_index(a) for a in args[1:]]
        extra = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype", "device", "layout", "pin_memory")}
        if str(node.target) == "aten.constant_pad_nd.default" and len(args) > 2 and args[2]:
            raise UnsupportedOpError(f"{node.meta.get('src')}: padding the state with a number other than zero")
        operation: Any = node.target
        parts = self.move(node, [source], lambda c: operation(c[0], *rest, **extra))
        return parts if str(node.target) in SPLITS else parts[0]

class Rows(Lowering):
    """Lowers what is made of parameters and constants alone as if it were the core, each axis that is a batch marked as that where it
    arises: what then keeps samples apart is the same for all of them."""

    def proved(self, node: fx.Node) -> Ints:
        """Which sample each element of a value belongs to; raises TraceError if the value need not be the same for all of them."""
        found = self.lower(node)
        if not isinstance(found, Laid) or found.batch is None:
            raise mixes(node)
        return found.batch

    def _lower(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._frontier(node, "param", node.meta["val"])
        made = self._operation(node) if any("val" in n.meta for n in node.all_input_nodes) else self._constant(node)
        along = node.meta.get("along")
        if not isinstance(made, Laid) or made.batch is not None or along in (None, -1):
            return made
        if not (made.elem == made.elem.take([0], along)).all():
            return made  # a row each
        shape = [-1 if axis == along else 1 for axis in range(made.elem.ndim)]
        return Laid(made.value, made.elem, np.broadcast_to(np.arange(self.batch_size).reshape(shape), made.shape))

    def _shared(self, node: fx.Node) -> Laid:
        raise mixes(node)


def _needed(graph: Graph) -> list[fx.Node]:
    """Nodes that the next state is made of, in order."""
    needed: set[fx.Node] = set()
    stack = list(graph.next)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in graph.graph.nodes if n in needed]


def _batch_first(value: Any, batch: int) -> bool:
    """Whether the first axis of a value is the batch; said of what is no tensor as well, which has no axes."""
    return not isinstance(value, torch.Tensor) or (value.dim() > 0 and value.shape[0] == batch)


def _is_complex(node: fx.Node) -> bool:
    """Whether a node's value is complex, or is several of which one is."""
    value = node.meta.get("val")
    return any(isinstance(v, torch.Tensor) and v.dtype.is_complex for v in (value if isinstance(value, (list, tuple)) else (value,)))


def _is_part(node: fx.Node) -> bool:
    """Whether a node picks one result of an operation that has several."""
    return getattr(node.target, "__name__", "") == "_getitem"


def _moves_only(node: fx.Node) -> bool:
    """Whether a node only says where elements go; a part of a result is that only where the whole is."""
    if _is_part(node):
        return str(node.args[0].target) in SPLITS  # type: ignore[union-attr]
    return str(node.target) in VIEWS or str(node.target) in SPLITS or getattr(node.target, "__name__", "") == "_copied"


def _is_param(value: Value) -> bool:
    found = ir.leaves([value])
    return bool(found) and all(v.kind == "param" for v in found)


#: What lowers an operation: called with the lowering, the node and its static arguments.
Handler = Callable[..., Any]
#: ATen overload -> handler: operations that are neither rows nor plain views.
STRUCTURAL: dict[str, Handler] = {}
#: The same for operations that take or give complex numbers.
COMPLEX: dict[str, Handler] = {}


def registers(table: dict[str, Handler]) -> Callable[..., Callable[[Handler], Handler]]:
    """A decorator that puts a handler into a table, under the names of the operations it lowers."""

    def lowers(*names: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            table.update({f"aten.{name}" if "." in name else f"aten.{name}.default": handler for name in names})
            return handler

        return register

    return lowers
