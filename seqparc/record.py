"""Record what one call of a cell does, as a functional torch.fx graph of ATen operations.

A dispatch mode sees every ATen operation below autograd, composite operations already taken apart. In-place writes and
views are made functional here, by storage: every storage knows the value of each view that was read or written, and a
view read after an overlapping write is taken anew from the storage's current value. torch.export and make_fx record the
same operations; starting them takes seconds in a new process where this takes milliseconds, and a warm start matters.

Control flow on values shows itself as a tensor turned into a Python number, which is refused with the user's line.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqparc.draws import Draw, draw_of
from seqparc.errors import TraceError, UnsupportedOpError
from seqparc.fused import cosine_similarity, made_of
from seqparc.ir import Source

aten = torch.ops.aten

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

#: Functions under which the user's code runs while it is watched.
_WATCHING = ("record", "own_gradient")

#: Operations whose result is a Python number or has a shape that depends on values.
_VALUE_DEPENDENT = frozenset(
    """aten._local_scalar_dense.default aten.item.default aten.equal.default aten.is_nonzero.default aten.nonzero.default
    aten.masked_select.default aten.unique_dim.default aten._unique2.default aten.unique_consecutive.default""".split()
)

#: Operations that take no more than shape and kind from the tensor they are given, and what they fill theirs with.
_SHAPED: dict[str, float | Callable[..., Any]] = {
    "aten.zeros_like.default": 0.0,
    "aten.new_zeros.default": 0.0,
    "aten.ones_like.default": 1.0,
    "aten.new_ones.default": 1.0,
    "aten.full_like.default": lambda like, value, *_: value,
    "aten.new_full.default": lambda like, shape, value, *_: value,
}


class _Reading(TorchFunctionMode):
    """Refuses what reads a tensor's numbers past the operations that a recorder sees, and takes apart what those do not tell all of."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in ("numpy", "tolist", "__array__"):
            raise TraceError(
                f"{user_source() or 'the cell'} reads a tensor's numbers in Python ({name}), which are others at every step. seqparc "
                "follows one path for all steps and samples: use torch's own operations."
            )
        if func is torch.cosine_similarity:
            return cosine_similarity(self.recorder.call, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass
class Trace:
    """One recorded call: a functional graph, its placeholders, the tensors it found, and example values in node.meta["val"]."""

    graph: fx.Graph
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    attributes: dict[str, torch.Tensor]
    #: Placeholders of the random numbers it drew, and what they are.
    drawn: list[fx.Node] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    #: Inputs that the function wrote to, with the line that did first; and the memory of every output, by a number.
    written: dict[int, Source | None] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)


@dataclass
class _Entry:
    node: fx.Node
    version: int


@dataclass
class _Storage:
    """The values of all tensors that share one storage."""

    first: torch.Tensor
    entries: dict[tuple[Any, ...], _Entry] = field(default_factory=dict)
    base: fx.Node | None = None  # the whole storage, flat; made when first needed
    version: int = 0
    writes: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (version, storage offsets written)
    written: Source | None = None  # by the first write
    origin: str = "fresh"  # "fresh", or what a write to it would change: "an input", "the parameter weight"


def _geometry(t: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))
    return (tuple(t.shape), strides, t.storage_offset(), t.dtype, t.is_conj(), t.is_neg())


def _offsets(t: torch.Tensor) -> torch.Tensor:
    """The storage offsets a tensor occupies."""
    at = torch.full((), int(t.storage_offset()), dtype=torch.int64, device="cpu")
    for n, s in zip(t.shape, t.stride(), strict=True):
        at = (at.unsqueeze(-1) + torch.arange(n, device="cpu") * s).flatten() if n else at.new_empty(0)
    return at.flatten()


def user_source() -> Source | None:
    """The innermost line outside torch and seqparc; failing that, the innermost line of a torch module."""
    frame = sys._getframe(1)
    module_line = None
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)) and not name.startswith("<"):
            inside = frame
            while frame is not None and not (frame.f_code.co_filename.startswith(_HERE) and frame.f_code.co_name in _WATCHING):
                frame = frame.f_back  # type: ignore[assignment]
            return Source(name, inside.f_lineno) if frame is not None else module_line
        if module_line is None and name.startswith(_TORCH + "nn" + os.sep):
            module_line = Source(name, frame.f_lineno)
        if name.startswith(_HERE) and frame.f_code.co_name in _WATCHING:
            return module_line
        frame = frame.f_back  # type: ignore[assignment]
    return module_line


class _Recorder(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.storages: dict[int, _Storage] = {}
        self.attributes: dict[str, torch.Tensor] = {}
        self.names = names
        self.keep: list[torch.Tensor] = []  # storages are told apart by address, so nothing may be freed
        self.shown: dict[int, list[fx.Node]] = {}  # nodes whose example is memory of a storage, which a write would change
        self.drawn: list[fx.Node] = []
        self.draws: list[Draw] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping the handler for dynamo would import dynamo: two seconds at the first call

    # -- values ----------------------------------------------------------------------------------------------------

    def define(self, t: torch.Tensor, node: fx.Node, origin: str = "fresh") -> None:
        """Say that a tensor's value is a node's."""
        self.keep.append(t)
        if "val" not in node.meta:
            self.show(node, t)
        storage = self.storages.setdefault(t.untyped_storage()._cdata, _Storage(t, origin=origin))
        storage.entries[_geometry(t)] = _Entry(node, storage.version)

    def show(self, node: fx.Node, value: Any) -> None:
        """Give a node its example."""
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.shown.setdefault(value.untyped_storage()._cdata, []).append(node)

    def before_write(self, target: torch.Tensor) -> None:
        """Examples that are memory about to be written to become what they are now: constants are known by them."""
        for node in self.shown.pop(target.untyped_storage()._cdata, ()):
            node.meta["val"] = node.meta["val"].clone()

    def read(self, t: torch.Tensor) -> fx.Node:
        """The node that holds a tensor's current value."""
        storage = self.storages.get(t.untyped_storage()._cdata)
        if storage is None:
            return self.attribute(t)
        entry = storage.entries.get(_geometry(t))
        if entry is not None:
            mine = None
            for version, offsets in storage.writes:
                if version > entry.version:
                    mine = _offsets(t) if mine is None else mine
                    if torch.isin(mine, offsets).any():
                        break
            else:
                return entry.node
        if id(t) in self.names and storage.origin != "fresh" and not storage.writes:  # parameters that share memory
            return self.attribute(t)
        node = self.emit(aten.as_strided.default, (self.whole(storage), list(t.shape), list(t.stride()), t.storage_offset()), t)
        self.define(t, node)
        return node

    def whole(self, storage: _Storage) -> fx.Node:
        """The current value of a whole storage, flat."""
        if storage.base is None:
            t = storage.first
            order = sorted(range(t.dim()), key=lambda d: (-t.stride()[d], d))
            dense = t.permute(order)
            if not dense.is_contiguous() or t.storage_offset() or t.numel() * t.element_size() != t.untyped_storage().nbytes():
                where = user_source()
                raise TraceError(
                    f"{where or 'the cell'} writes in place into a view of a tensor whose memory layout cannot be followed "
                    f"(shape {list(t.shape)}, strides {list(t.stride())}). Make the written tensor contiguous first, with .clone()."
                )
            node = storage.entries[_geometry(t)].node
            if order != list(range(t.dim())):
                node = self.emit(aten.permute.default, (node, order), dense)
            storage.base = self.emit(aten.reshape.default, (node, [-1]), dense.reshape(-1))
        return storage.base

    def write(self, t: torch.Tensor, node: fx.Node) -> None:
        """Say that a tensor was overwritten, and with it every view that overlaps it."""
        storage = self.storages[t.untyped_storage()._cdata]
        if _geometry(t) == _geometry(storage.first):
            storage.base = None
        else:
            storage.base = self.emit(
                aten.as_strided_scatter.default, (self.whole(storage), node, list(t.shape), list(t.stride()), t.storage_offset())
            )
        storage.version += 1
        storage.written = storage.written or user_source()
        storage.writes.append((storage.version, _offsets(t)))
        storage.entries[_geometry(t)] = _Entry(node, storage.version)

    def attribute(self, t: torch.Tensor) -> fx.Node:
        """A tensor the cell did not get and did not make: a parameter, a buffer, or one it closes over."""
        name = self.names.get(id(t)) or f"lifted_{len(self.attributes)}"
        self.attributes[name] = t
        node = self.graph.create_node("get_attr", name.replace(".", "_"), (), {}, name="p_" + name.replace(".", "_"))
        node.meta["attribute"] = name
        self.define(t, node, f"the parameter or buffer {name}" if id(t) in self.names else "a tensor it closes over")
        return node

    def emit(self, target: Any, args: tuple[Any, ...], val: Any = None, kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs or {})
        if val is None:
            with torch.utils._python_dispatch._disable_current_modes():
                val = target(*fx.map_arg(args, lambda n: n.meta["val"]), **fx.map_arg(kwargs or {}, lambda n: n.meta["val"]))
        self.show(node, val)
        node.meta["src"] = user_source()
        return node

    # -- operations ------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., torch.Tensor], t: torch.Tensor, *numbers: float) -> torch.Tensor:
        """A function of ours, as one operation."""
        node = self.emit(function, (self.read(t), *numbers))
        self.define(node.meta["val"], node)
        return node.meta["val"]  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name in _VALUE_DEPENDENT:
            raise TraceError(
                f"{user_source() or 'the cell'} makes a Python decision or a shape out of a tensor's value ({name}). seqparc follows "
                "one path for all steps and samples: use torch.where(condition, a, b) in place of an if."
            )
        # Those that torch takes apart by itself come here whole from inside of what is taken apart below.
        if (parts := func.decompose if func._can_decompose() else made_of(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        if name == "aten.detach.default" or (name == "aten.alias.default"):
            result = func(*args, **kwargs)
            self.define(result, self.read(args[0]))
            return result
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info is not None and s.alias_info.is_write
        ] + [kwargs[s.name] for s in func._schema.arguments if s.kwarg_only and s.alias_info and s.alias_info.is_write and s.name in kwargs]
        if torch.Tag.nondeterministic_seeded in func.tags:
            draw = draw_of(func, args, kwargs, user_source())
            if draw is None:
                raise UnsupportedOpError(f"{user_source() or 'the cell'}: random numbers that depend on more than a shape ({name})")
            return self.draw(draw, args, kwargs, written)
        if written:
            return self.mutation(func, name, args, kwargs, written)
        if (fill := _SHAPED.get(name)) is not None:  # ones_like(energy.sum()), where autograd begins, reads no energy
            result = func(*args, **kwargs)
            value = fill if isinstance(fill, float) else fill(*args)
            about = {"dtype": result.dtype, "device": result.device}
            self.define(result, self.emit(aten.full.default, (list(result.shape), value), result, about))
            return result
        nodes = self.nodes(args), self.nodes(kwargs)
        result = func(*args, **kwargs)
        node = self.emit(func, nodes[0], result, nodes[1])
        if isinstance(result, torch.Tensor):
            self.define(result, node)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    self.define(part, self.emit(_getitem, (node, i), part))
        return result

    def draw(self, draw: Draw, args: Any, kwargs: Any, written: list[torch.Tensor]) -> Any:
        """Random numbers become an input."""
        if written:
            self.refuse_foreign(written[0])
            self.before_write(written[0])
        result = draw.function(*args, **kwargs)
        node = self.graph.placeholder(f"draw_{len(self.draws)}")
        value = result[1] if isinstance(result, tuple) else result
        node.meta.update(val=value.clone(), src=draw.source)
        self.drawn.append(node)
        self.draws.append(draw)
        if written:
            self.write(written[0], node)
        else:
            self.define(value, node)
        if isinstance(result, tuple):  # dropout as one operation: what it lets through, and what that is multiplied by
            through = self.emit(aten.mul.Tensor, (self.read(args[0]), node), result[0])
            self.define(result[0], self.emit(aten.mul.Tensor, (through, 1 / (1 - args[1]) if args[1] < 1 else 0.0), result[0]))
        return result

    def refuse_foreign(self, target: torch.Tensor) -> None:
        """Raises TraceError, before a write happens, if it would go to what the cell was given."""
        if target.is_conj() or target.is_neg():
            raise TraceError(f"{user_source() or 'the cell'} writes in place into a conjugate view. Make a copy first, with .clone().")
        if target.untyped_storage()._cdata not in self.storages:
            self.attribute(target)
        origin = self.storages[target.untyped_storage()._cdata].origin
        if origin != "fresh":
            advice = "write y = x + u instead of x += u, or clone first."
            if "parametrizations." in origin:  # spectral_norm, say
                advice = "a parametrisation that changes its buffers while it trains can be run in evaluation, after .eval() on it."
            raise TraceError(
                f"{user_source() or 'the cell'} changes {origin} in place. A cell must leave its inputs, parameters and buffers as they "
                f"are: {advice}"
            )

    def nodes(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self.read(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(self.nodes(v) for v in tree)
        if isinstance(tree, dict):
            return {k: self.nodes(v) for k, v in tree.items()}
        return tree

    def mutation(self, func: Any, name: str, args: Any, kwargs: Any, written: list[torch.Tensor]) -> Any:
        """An in-place or out= operation: record the functional one, run the real one, note the write."""
        packet = name.removeprefix("aten.").rsplit(".", 1)[0]
        target = written[0]
        if torch.Tag.inplace_view in func.tags and packet not in ("set_", "resize_") and (view := _functional(func, packet, set())):
            nodes = self.nodes(args), self.nodes(kwargs)
            result = func(*args, **kwargs)  # only the tensor's shape changes, not what it holds
            self.define(target, self.emit(view, nodes[0], target.view_as(target), nodes[1]))
            return result
        if len(written) > 1 or packet in ("set_", "resize_"):
            raise TraceError(f"{user_source() or 'the cell'} uses {name}, which seqparc cannot follow. Use its functional form.")
        self.refuse_foreign(target)
        functional: Any
        fargs: tuple[Any, ...]
        fkw: dict[str, Any] = {}
        if packet == "copy_":
            functional, fargs = _copied, (args[1], list(args[0].shape), args[0].dtype)
        elif packet in ("fill_", "zero_"):
            value = args[1] if packet == "fill_" else 0
            if isinstance(value, torch.Tensor):
                functional, fargs = _copied, (value, list(args[0].shape), args[0].dtype)
            else:
                functional, fargs, fkw = aten.full.default, (list(args[0].shape), value), {"dtype": args[0].dtype}
        else:
            out = {s.name for s in func._schema.arguments if s.kwarg_only and s.alias_info and s.alias_info.is_write}
            plain = _functional(func, packet, out)
            if plain is None:
                raise TraceError(f"{user_source() or 'the cell'} uses {name}, which has no functional form. Avoid the in-place call.")
            functional, fargs, fkw = plain, args, {k: v for k, v in kwargs.items() if k not in out}
        nargs, nkw = self.nodes(fargs), self.nodes(fkw)
        self.before_write(target)
        result = func(*args, **kwargs)
        node = self.emit(functional, nargs, target.clone(), nkw)
        self.write(target, node)
        return result


def _functional(func: Any, packet: str, out: set[str]) -> Any:
    """The operation that gives what an in-place or out= one writes: the one that takes the same, whatever it is called."""

    def taken(op: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in op._schema.arguments if a.name not in out]

    base = getattr(aten, packet if out else packet.removesuffix("_"), None)
    found = [] if base is None else [getattr(base, name) for name in base.overloads()]
    return next((op for op in found if op is not func and taken(op) == taken(func) and not op._schema.is_mutable), None)


def _getitem(sequence: Sequence[Any], i: int) -> Any:
    return sequence[i]


def _copied(value: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).expand(shape)


def record(
    function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], names: dict[int, str], given: int | None = None
) -> Trace:
    """Record `function(*inputs)`.

    `names` maps the id of a known parameter or buffer to its name. The function's results must be tensors. The inputs from number
    `given` on are the function's own, to write to.
    """
    recorder = _Recorder(names)
    placeholders = []
    for i, t in enumerate(inputs):
        node = recorder.graph.placeholder(f"in_{i}")
        recorder.define(t, node, "x" if given is None or i < given else "fresh")
        placeholders.append(node)
    before = random.getstate(), np.random.get_state()
    with _Reading(recorder), recorder:
        results = function(*inputs)
    after = random.getstate(), np.random.get_state()
    if before[0] != after[0] or not all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True)):
        raise UnsupportedOpError("the cell draws random numbers of Python's or NumPy's, which are not followed; torch's are")
    outputs = [recorder.read(r) for r in results]
    recorder.graph.output(tuple(outputs))
    recorder.graph.eliminate_dead_code()
    storages = [recorder.storages[t.untyped_storage()._cdata] for t in inputs]
    written = {i: storage.written for i, storage in enumerate(storages) if storage.version}
    memory = [r.untyped_storage()._cdata for r in results]
    return Trace(recorder.graph, placeholders, outputs, recorder.attributes, recorder.drawn, recorder.draws, written, memory)
