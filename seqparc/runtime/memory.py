"""How much memory a call takes, and for what: a ledger of what is allocated and freed, as a call of these shapes would go.

What kernels read and write follows from the plan. What torch's pieces before and after the recurrence take, and what autograd keeps of
them, is found out by running them on a few rows; it grows with the rows.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqparc.plan import Plan, Stage
from seqparc.runtime.differentiable import unit
from seqparc.runtime.weights import in_one

#: Rows that pieces are run on, twice: what does not grow is of parameters.
ROWS = 32


@dataclass(frozen=True)
class Memory:
    """Bytes that a call allocates beside its inputs: at most, and when it has returned; of what, when there is most of it."""

    most: int
    left: int
    parts: dict[str, int]

    def lines(self, what: str) -> list[str]:
        """In words."""
        parts = [f"{name} {_bytes(n)}" for name, n in sorted(self.parts.items(), key=lambda p: -p[1]) if n * 100 >= self.most]
        return [f"{what}: at most {_bytes(self.most)} beside the inputs ({', '.join(parts)}), {_bytes(self.left)} at the end"]


def _bytes(n: float) -> str:
    if n < 1024:
        return f"{n:.0f} bytes"
    power = 1 + (n >= 1 << 20) + (n >= 1 << 30)
    return f"{n / 1024**power:.3g} {'KMG'[power - 1]}iB"


def memory(
    plan: Plan, batch: int, steps: int, gradient: bool = False, save: str = "recompute", chunks: tuple[int, int] = (1, 1),
    of_x: bool = False, slabs: int = 1,
) -> Memory:  # fmt: skip
    """What a call, and with `gradient` its backward too, takes of memory.

    chunks: that time is cut into, forward and backward; of_x: a gradient of x is asked for as well; slabs: that time is run in.
    """
    if slabs > 1:
        one, whole = memory(plan, batch, -(-steps // slabs), chunks=chunks), memory(plan, batch, steps, chunks=chunks)
        return Memory(one.most + whole.left, whole.left, {**one.parts, "all outputs": whole.left})
    call = _Call(batch, batch * steps, gradient, save, chunks, of_x, plan.inputs + len(plan.draws))
    ledger = _Ledger()
    undo = _forward(ledger, plan, call)
    if gradient:
        undo()
    return Memory(ledger.most, ledger.now, {k: n for k, n in ledger.at_most.items() if n})


class _Call(NamedTuple):
    batch: int
    rows: int
    gradient: bool
    save: str
    chunks: tuple[int, int]
    of_x: bool
    inputs: int  # leaves of x; a stage has earlier states behind them

    def wants(self, key: Any) -> bool:
        """Whether a gradient of what a piece is given by this name is wanted."""
        return self.gradient and (key[0] != "x" or self.of_x or key[1] >= self.inputs)

    def stored(self, plan: Plan) -> Any:
        return plan.stored() if self.gradient and self.save == "store" else None


class _Ledger:
    """What is allocated now, by what it is for, and what was when it was most."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.at_most: dict[str, int] = {}
        self.now = self.most = 0

    def add(self, name: str, size: float) -> tuple[str, int]:
        """Allocate; gives what `free` takes."""
        self.live[name] += round(size)
        self.now += round(size)
        if self.now > self.most:
            self.most, self.at_most = self.now, dict(self.live)
        return name, round(size)

    def free(self, *entries: tuple[str, int]) -> None:
        for name, size in entries:
            self.live[name] -= size
            self.now -= size

    def passing(self, name: str, size: float) -> None:
        """Allocated, and freed at once."""
        self.free(self.add(name, size))


def _forward(ledger: _Ledger, plan: Plan, call: _Call, whole: list[tuple[str, int]] | None = None) -> Callable[[], None]:
    """Enter what forward does; gives what enters what its backward does. whole: this is a stage, and its states go there."""
    rows, item, sizes = call.rows, plan.dtype.itemsize, plan.core.state_sizes
    read = plan.read
    undo: list[Callable[[], None]] = []  # first in, last out
    states: list[tuple[str, int]] = []
    streams: list[tuple[str, int]] = []
    if plan.stages:
        undo += [_stage(ledger, plan, stage, call, states) for stage in plan.stages]
    else:
        before = cost_of(plan.prelude, call) if any(d is None for d in plan.direct) else Cost()
        ledger.passing("what the prelude makes on the way", rows * before.most)
        streams.append(ledger.add("streams", rows * before.out))
        graph = ledger.add("kept for the prelude's gradient", rows * (before.held - before.out))
        states.append(ledger.add("states", rows * item * sum(sizes)))
        found = call.stored(plan)
        stored = ledger.add("stored for backward", rows * item * (found.numbers if found is not None else 0))
        ledger.passing("chunks", 3 * item * call.chunks[0] * call.batch * sum(sizes) if call.chunks[0] > 1 else 0)
        if not call.gradient and not any(key[0] == "stream" for key in read):
            ledger.free(*streams)

        def recurrence() -> None:
            through = _adjoint(ledger, plan, call)
            ledger.free(stored, *streams, *(states if whole is not None or read else []))
            ledger.passing("what the prelude's gradient makes on the way", rows * max(before.backward - before.saved, 0))
            ledger.free(graph, through)
            ledger.add("gradient of x and of earlier states", rows * before.grads)

        undo.append(recurrence)
    cast = [n * s.dtype.itemsize for n, s in zip(sizes, plan.states, strict=True) if s.dtype != plan.dtype]
    ledger.add("states in the cell's dtypes", rows * sum(cast))
    if plan.readout is not None:
        after = cost_of(plan.readout, call)
        earlier = ledger.add("states before each step", rows * item * sum(sizes[key[1]] for key in read if key[0] == "state"))
        ledger.passing("what the readout makes on the way", rows * after.most)
        ledger.add("outputs", rows * after.out)
        kept = ledger.add("kept for the readout's gradient", rows * (after.held - after.out))
        if not call.gradient:
            ledger.free(*states, earlier, *(streams if any(key[0] == "stream" for key in read) else []))

        def readout() -> None:
            ledger.passing("what the readout's gradient makes on the way", rows * max(after.backward - after.saved, 0))
            ledger.free(kept, earlier)
            cotangents.append(ledger.add("cotangents", rows * after.cotangents))

        undo.append(readout)
    cotangents: list[tuple[str, int]] = []
    if whole is not None:
        whole += states

    def backward() -> None:
        for do in reversed(undo):
            do()
        ledger.free(*cotangents)

    return backward


def _stage(ledger: _Ledger, plan: Plan, stage: Stage, call: _Call, states: list[tuple[str, int]]) -> Callable[[], None]:
    """The same of one stage."""
    item, sizes = plan.dtype.itemsize, plan.core.state_sizes
    copied = [j for k, j in enumerate(stage.earlier) if call.inputs + 2 * k in stage.uses]
    earlier = ledger.add("states before each step", call.rows * item * sum(sizes[j] for j in copied))
    undo: Callable[[], None] | None = None
    if stage.plan is not None:
        undo = _forward(ledger, stage.plan, call, states)
    else:
        cost = cost_of(stage.piece, call)
        ledger.passing("what a stage makes on the way", call.rows * cost.most)
        states.append(ledger.add("states", call.rows * cost.held))
    if not call.gradient:
        ledger.free(earlier)

    def backward() -> None:
        if undo is not None:
            undo()
        ledger.free(earlier)

    return backward


def _adjoint(ledger: _Ledger, plan: Plan, call: _Call) -> tuple[str, int]:
    """Enter the adjoint recurrence and the products that make the weights' gradients; gives what goes on to the prelude."""
    rows, item, found = call.rows, plan.dtype.itemsize, call.stored(plan)
    adjoint = plan.adjoint() if found is None else found.adjoint
    program = adjoint.program
    made_of = [plan.prelude.reads[k] if d is None else (("x", d),) for k, d in enumerate(plan.direct)]
    idle = adjoint.idle([any(call.wants(key) for key in keys) for keys in made_of])
    filled = enumerate(zip(program.emit_sizes, program.filled, strict=True))
    written = {k: size for k, (size, part) in filled if part and k not in idle}
    direct = {e.slot for e in adjoint.streams if e.direct}
    through = ledger.add("cotangents of the streams", rows * item * sum(n for k, n in written.items() if k in direct))
    factors = ledger.add("factors of the weights' gradients", rows * item * sum(n for k, n in written.items() if k not in direct))
    held = item * (3 * sum(program.state_sizes) if call.chunks[1] > 1 else 0) + 8 * sum(program.sum_sizes)
    ledger.passing("chunks", call.chunks[1] * call.batch * held)
    whole = sum(plan.core.stream_sizes[e.target] for e in adjoint.streams if not e.direct and e.slot not in idle)
    wide = ledger.add("cotangents of the streams", rows * item * whole)
    copies = [_copied(o, plan, program, call) for o in adjoint.outers if o.x < 0]
    ledger.passing("factors of the weights' gradients", rows * item * max(copies, default=0))
    ledger.free(factors)
    return through[0], through[1] + wide[1]


def _copied(o: Any, plan: Plan, program: Any, call: _Call) -> int:
    """Numbers a row that are copied of a factor read from a stream: of the states before each step of several samples, where those of all
    samples are multiplied at once, and of a part.
    """
    slot, numbers = -1 - o.x, o.columns.array.reshape(-1)
    size, first = program.stream_sizes[slot], len(plan.program.stream_sizes)
    at_once = o.columns.shape[0] > 1 or in_one(call.batch, call.rows // call.batch, min(len(numbers), len(o.rows.array)))
    of_states = call.batch > 1 and at_once and first <= slot < first + len(program.state_sizes)
    whole = len(numbers) == size and bool((numbers == range(size)).all())
    return (size if of_states else 0) + (0 if whole else len(numbers))


class Cost(NamedTuple):
    """Bytes that a piece takes for each row: at most while it runs, of its results, with what autograd keeps, of that without the results,
    at most while its gradient is made of that, of the gradients of x, and of those of states as kernels read them."""

    most: float = 0
    out: float = 0
    held: float = 0
    saved: float = 0
    backward: float = 0
    grads: float = 0
    cotangents: float = 0


def cost_of(piece: Any, call: _Call) -> Cost:
    """What a piece takes, found out by running it on a few rows; nothing of a cell that is called itself."""
    if len(piece.sources) != len(piece.inputs):
        return Cost()
    small, large = (_measured(piece, rows, call) for rows in (ROWS, 2 * ROWS))
    return Cost(*((b - a) / ROWS for a, b in zip(small, large, strict=True)))


def _measured(piece: Any, rows: int, call: _Call) -> Cost:
    given: list[Any] = []
    for key, node in zip(piece.inputs, piece.sources, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            given.append(rows)
            continue
        of_rows = node.meta["kind"] in ("x", "state")
        t = value.new_ones((rows, *value.shape[1:])) if of_rows else value.detach().clone()
        given.append(t.requires_grad_((t.is_floating_point() or t.is_complex()) and call.wants(key)))
    mode = _Watch([t for t in given if isinstance(t, Tensor)])
    with torch.set_grad_enabled(call.gradient), mode:
        made = piece.run(*given)
    out = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in made if t.untyped_storage()._cdata in mode.sizes}.values())
    most, held = mode.most, mode.live
    edges = [(torch.autograd.graph.get_gradient_edge(t), torch.ones_like(t)) for t in made if t.requires_grad]
    del made
    saved = mode.live
    wanted = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    if not edges or not wanted:
        return Cost(most, out, held, saved)
    mode.most = mode.live
    with mode:
        grads = torch.autograd.grad([e for e, _ in edges], wanted, [g for _, g in edges], allow_unused=True)
    found = {id(t): g for t, g in zip(wanted, grads, strict=True) if g is not None}
    of = [(key[0], found[id(t)]) for key, t in zip(piece.inputs, given, strict=True) if id(t) in found]
    of_x = sum(g.numel() * g.element_size() for kind, g in of if kind == "x")
    own = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for kind, g in of if kind == "next"}
    copied = sum(g.numel() * g.element_size() for kind, g in of if kind == "next" and unit(g) is not g)
    return Cost(most, out, held, saved, mode.most, of_x, sum(n for key, n in own.items() if key in mode.sizes) + copied)


class _Watch(TorchDispatchMode):
    """How many bytes of memory there are that were allocated under it, and were at most."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in given}
        self.sizes: dict[int, int] = {}
        self.live = self.most = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in the recorder: dynamo is not to be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.own and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self.gone, key)
        return result

    def gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
