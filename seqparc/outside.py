"""What the core takes from outside: streams, parameters, constants, and what is known of their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from seqparc import ir
from seqparc.errors import UnsupportedOpError
from seqparc.graphs import Graph, apart
from seqparc.layout import Ints, Laid, Layouts, Pair
from seqparc.ops import VIEWS


class Outside(Layouts):
    """The part of lowering that stands between the core and everything else."""

    def __init__(self, graph: Graph, which: int) -> None:
        super().__init__(graph.batch_sizes[which])
        self.graph, self.which = graph, which
        self.streams: list[fx.Node] = []
        self.params: list[fx.Node] = []
        self.known_zero: dict[int, NDArray[np.bool_]] = {}
        self.frozen: dict[str, torch.Tensor] = {}

    def lower(self, node: Any) -> Any:
        raise NotImplementedError

    def _samples(self, node: fx.Node) -> Ints:
        """Which sample each element of a value belongs to; raises TraceError if the value need not be the same for all of them."""
        raise NotImplementedError

    def _frontier(self, node: fx.Node, kind: str, val: Any) -> Laid | Pair:
        """A value the core takes from outside: computed before the loop, once per step or once per call."""
        if not isinstance(val, torch.Tensor):
            raise UnsupportedOpError(f"{node.meta.get('src')}: {node.target} gives the core something that is not a tensor")
        if val.dtype.is_complex:
            return Pair(*(self.lower(part) for part in apart(node)))
        nodes = self.params if kind == "param" else self.streams
        if node not in nodes:
            nodes.append(node)
        slot = nodes.index(node)
        if kind == "param":
            zero = self._zeros(node)
            if zero is not None and zero.any():
                self.known_zero[slot] = zero.reshape(-1)
            return Laid(ir.leaf("param", slot, np.arange(val.numel())[None]), np.arange(val.numel()).reshape(val.shape), None)
        size = val.numel() // val.shape[0]
        return self._input(ir.leaf("stream", slot, np.arange(size)[None]), val)

    def _constant(self, node: fx.Node) -> Any:
        """A tensor made in the cell from nothing: one number everywhere, or a table that becomes a parameter."""
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return node.meta["static"][self.which]
        if val.dtype.is_complex:
            return Pair(*(self.lower(part) for part in apart(node)))
        flat = val.reshape(-1).to(torch.float64)
        if flat.numel() and bool((flat == flat[0]).all() or torch.isnan(flat).all()):
            return Laid(ir.const(float(flat[0])), np.zeros(tuple(self._made(node).shape), np.int64), None)
        return self._frontier(node, "param", val) if node.meta.get("along") is None else self._shared(node)

    def _shared(self, node: fx.Node) -> Laid:
        """What parameters and constants give each sample, all of them the same (autograd begins with ones, one a sample): one row of it."""
        batch = self._samples(node)
        elem, rows = self._rows(batch)
        if "row" not in node.meta:
            with node.graph.inserting_after(node):
                row = node.graph.call_function(torch.ops.aten.reshape.default, (node, [-1]))  # which is one row at batch size 1
            one = node.meta["val"].reshape(-1)[torch.from_numpy(rows[0])] if not self.which else None
            row.meta.update(val=one, src=node.meta.get("src"), kind="param", static=(((node, [-1]), {}),) * 2)
            node.meta["row"] = row
        row = node.meta["row"]
        if not self.which:
            zero = self._zeros(node)
            row.meta["zero"] = None if zero is None else zero.reshape(-1)[rows[0]]
        return Laid(self._frontier(row, "param", row.meta["val"]).value, elem, None)  # type: ignore[arg-type, union-attr]

    def _made(self, node: fx.Node) -> Any:
        """A constant as it is made at this batch size."""
        if not self.which or node.op == "placeholder":
            return node.meta["val"]
        args, kwargs = node.meta["static"][self.which]
        return node.target(*fx.map_arg(args, self._made), **fx.map_arg(kwargs, self._made))  # type: ignore[operator]

    def _static_index(self, argument: Any) -> Any:
        """An index tensor's values, which the plan then depends on."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._static_index(a) for a in argument)
        if not isinstance(argument, fx.Node):
            return argument
        if argument.meta["kind"] not in ("param", "const"):
            raise UnsupportedOpError(f"{argument.meta.get('src')}: the state is indexed by values that change from step to step")
        above = [argument]
        for node in above:
            above += [n for n in node.all_input_nodes if n not in above]
            if node.meta.get("key", ("",))[0] == "attr":
                name = node.meta["key"][1]
                self.frozen[name] = self.graph.attributes[name].detach().clone()
        return argument.meta["val"].cpu()

    def _zeros(self, node: fx.Node) -> NDArray[np.bool_] | None:
        """Where a parameter-only value is zero because a constant in it is; None: nowhere known."""
        target, val = str(node.target), node.meta.get("val")
        if "zero" in node.meta:
            return node.meta["zero"]  # type: ignore[no-any-return]
        if node.meta["kind"] == "const" and isinstance(val, torch.Tensor):
            return (val == 0).cpu().numpy()
        if node.op == "placeholder" and node.meta["key"][0] == "attr":
            name = node.meta["key"][1]
            tensor = self.graph.attributes[name]
            if tensor.requires_grad or not (tensor == 0).any():
                return None
            self.frozen[name] = tensor.detach().clone()
            return (tensor == 0).cpu().numpy()
        args, kwargs = node.meta.get("static", (((), {}),) * 2)[self.which]
        if target in ("aten.mul.Tensor", "aten.mul.Scalar"):
            found = [z for a in args if isinstance(a, fx.Node) and (z := self._zeros(a)) is not None]
            shape = tuple(node.meta["val"].shape)
            return np.logical_or.reduce([np.broadcast_to(z, shape) for z in found]) if found else None
        if target in ("aten.div.Tensor", "aten.neg.default", "aten._to_copy.default", "aten.abs.default"):
            inner = self._zeros(args[0])
            return None if inner is None else np.broadcast_to(inner, tuple(node.meta["val"].shape)).copy()
        if target in VIEWS and (inner := self._zeros(args[0])) is not None:
            if target == "aten.constant_pad_nd.default":  # what is put there is zero where it is
                args, kwargs = (*args[:2], not (args[2] if len(args) > 2 else kwargs.get("value", 0))), {}
            view = node.target(torch.from_numpy(inner), *args[1:], **kwargs)  # type: ignore[operator]
            return view.numpy() if isinstance(view, torch.Tensor) else None
        return None
