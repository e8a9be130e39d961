"""The compiler, top to bottom: from a user's cell to a plan."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from seqparc import complexes as complexes  # these three register their handlers
from seqparc import convolution as convolution
from seqparc import stages
from seqparc import structural as structural
from seqparc.captured import Getter, reachable
from seqparc.draws import Draw, seed
from seqparc.errors import InternalError, TraceError, UnsupportedOpError
from seqparc.exact import HALVES
from seqparc.graphs import Graph, Key, carve, unify
from seqparc.ir import Program
from seqparc.lower import Lowered, Lowering
from seqparc.options import environment
from seqparc.owngrad import Own, Vjp, own_gradient
from seqparc.plan import Plan, Stage, StateShape
from seqparc.record import Trace, record
from seqparc.runtime import opaque
from seqparc.runtime.interpreter import TorchKernel
from seqparc.signature import Convention
from seqparc.surroundings import autocast
from seqparc.verify import verify

#: Two batch sizes at which every cell is recorded; what differs between the recordings must be the batch axis.
BATCH_SIZES = (3, 5)


def compile_plan(
    cell: Any, convention: Convention, x: Sequence[Tensor], state: Sequence[Tensor], fold: bool = True, wide: bool = False
) -> Plan:
    """Compile a cell for the shapes and dtypes of one step's inputs x [batch, ...] and states [batch, ...].

    fold: narrow inputs are multiplied inside the recurrence, which saves memory traffic and costs arithmetic.
    wide: the core computes in float64, for the sake of its integers.
    """
    begin = time.perf_counter()
    first, second = (trace(cell, convention, x, state, b) for b in BATCH_SIZES)  # two recordings: fx graphs of ATen operations
    draws = alike(first.draws, second.draws)
    counts = (len(x) + len(draws), len(state), convention.out.count if convention.out is not None else 0)
    graph = unify(first, second, BATCH_SIZES, counts)  # -> Graph, for any batch size
    given = [*x, *state, *graph.attributes.values()]
    graph.explicit = autocast(x[0].device.type) is None and not any(t.dtype in HALVES for t in given)
    graph.wide = wide
    shapes = [StateShape(tuple(s.shape[1:]), s.dtype) for s in state]
    getters = {name: first.getters.get(name, functools.partial(_same, t)) for name, t in graph.attributes.items()}
    try:
        plan = assemble(graph, shapes, getters, fold)
        plan.own_gradient = first.own.where
    except UnsupportedOpError as error:
        if draws:
            raise
        lower(graph, unknown=opaque.by_sample)  # raises where samples meet, or may
        plan = opaque.plan_of(cell, convention, x, state, getters, str(error))
    plan.cut, plan.draws, plan.inputs, plan.twins = first.own.cut, draws, len(x), tuple(first.twins)
    if not plan.scalar and plan.step is None:
        plan.stages = staged(graph, plan, fold)
        if plan.stages:
            plan.readout = readout(graph, [], [])
    plan.compile_seconds = time.perf_counter() - begin
    return plan


def assemble(graph: Graph, states: Sequence[StateShape], getters: dict[str, Getter], fold: bool) -> Plan:
    """The plan of a recorded step."""
    from seqparc.passes import dependency, derivative, diagonal, lanes
    from seqparc.passes.stored import Stored
    from seqparc.passes.stored import stored as keep

    lowered = lower(graph)  # -> Lowered: the core as a Program with one lane
    structure = dependency.analyse(lowered.program)  # -> Structure: who depends on whom, proved
    program = lanes.split_lanes(lowered.program, structure)  # -> Program of one lane
    scalar = lanes.scalarise(program)  # -> Program over single numbers, or None
    if fold and scalar is None and program.lanes == 1:
        lowered = lower(graph, fold=True)  # -> Lowered: with narrow inputs' products inside
        program = lanes.split_lanes(lowered.program, structure)
    chosen = scalar or program
    for p in (lowered.program, program, chosen):
        checked(p)

    def narrow(derived: Program) -> Program:
        """A derived program, over single numbers if the cell's is."""
        return checked((lanes.scalarise(derived, derived=True) if scalar else None) or derived)

    @functools.cache
    def adjoint() -> derivative.Adjoint:
        found = derivative.adjoint(program)
        return replace(found, program=narrow(found.program))

    @functools.cache
    def keeping() -> Stored | None:
        try:
            return keep(program, derivative.adjoint(program), scalar is not None)
        except NotImplementedError:  # there is no derivative; who asks for it is told
            return None

    @functools.cache
    def stored() -> Stored | None:
        found = keeping()
        return found and replace(
            found, program=narrow(found.program), adjoint=replace(found.adjoint, program=narrow(found.adjoint.program))
        )

    #: By the name of its kernel, what a Jacobian is asked of.
    derived: dict[str, Callable[[], Any]] = {
        "forward": lambda: program,
        "backward": lambda: derivative.adjoint(program).program,
        "forward stored": lambda: keeping().program,  # type: ignore[union-attr]
        "backward stored": lambda: keeping().adjoint.program,  # type: ignore[union-attr]
    }

    @functools.cache
    def jacobian(name: str, update: str) -> Program:
        extend = {"exact": derivative.jacobian, "diagonal": diagonal.diagonal}[update]
        return narrow(extend(derived[name]()))

    return Plan(
        states=tuple(states),
        dtype=lowered.dtype,
        prelude=carve(lowered.streams, {}),
        weights=carve(lowered.params, {}, batch=1),
        readout=readout(graph, lowered.streams, lowered.params),
        direct=tuple(graph.x.index(n) if n in graph.x else None for n in lowered.streams),
        core=lowered.program,
        program=chosen,
        scalar=scalar is not None,
        structure=structure,
        attributes=getters,
        frozen=lowered.frozen,
        given=lowered.given,
        coarse=any(getattr(n.meta.get("val"), "dtype", None) in (torch.bfloat16, torch.float16) for n in graph.graph.nodes),
        adjoint=adjoint,
        stored=stored,
        jacobian=jacobian,
    )


def staged(graph: Graph, plan: Plan, fold: bool) -> tuple[Stage, ...]:
    """The stages of a plan; none where one is best."""
    from seqparc.passes.lanes import SCALAR_LIMIT

    order = stages.order(plan.structure.pattern, plan.core.state_sizes, SCALAR_LIMIT)
    made = []
    for k, leaves in enumerate(order if len(order) > 1 else ()):
        earlier = tuple(i for before in order[:k] for i in before)
        part = stages.part(graph, leaves, earlier)
        if any(n.meta["kind"] == "state" for n in part.next):
            inner = assemble(part, [plan.states[i] for i in leaves], plan.attributes, fold)
            read = [key[1] for key in inner.prelude.inputs if key[0] == "x"] + [d for d in inner.direct if d is not None]
            made.append(Stage(leaves, earlier, inner, None, frozenset(read)))
        else:
            piece = carve(part.next, {})
            made.append(Stage(leaves, earlier, None, piece, frozenset(key[1] for key in piece.inputs if key[0] == "x")))
    return tuple(made) if any(s.plan is not None for s in made) else ()


def checked(program: Program) -> Program:
    """The program itself, verified if the environment asks for it."""
    if environment("SEQPARC_VERIFY") == "1":
        verify(program)
    return program


@dataclass
class Traced(Trace):
    """A recording, with how to look its attributes up again, and where the cell cuts or replaces its gradient."""

    getters: dict[str, Getter] = field(default_factory=dict)
    own: Own = field(default_factory=Own)
    twins: list[tuple[Getter, str]] = field(default_factory=list)  # other ways to an attribute


def trace(cell: Any, convention: Convention, x: Sequence[Tensor], state: Sequence[Tensor], batch: int) -> Traced:
    """Record one step at a batch size, on samples of the given inputs."""
    found = list(reachable(cell.cell if isinstance(cell, Vjp) else cell))
    size = state[0].shape[0] if state else x[0].shape[0]
    rows = torch.arange(batch, device=x[0].device) % size
    # Each input a tensor of its own, so that a write to one is seen as just that.
    inputs = [t.detach().index_select(0, rows).clone() for t in (*x, *state)]

    def step(*leaves: Tensor) -> list[Tensor]:
        out, following = convention.call(cell, list(leaves[: len(x)]), list(leaves[len(x) :]))
        return [*(out or []), *following]

    with torch.no_grad(), uncached(), unfused():
        made = record(step, inputs, {id(t): name for name, _, t in reversed(found)}, len(x))  # the first way to each
    made.inputs[len(x) : len(x)] = made.drawn  # they are further inputs of a step
    n_out = 0 if convention.out is None else convention.out.count
    after = made.memory[n_out:]
    shown = after if convention.out is None else made.memory[:n_out]
    for i, where in made.written.items():  # only states may be
        if after[i - len(x)] in shown:
            raise TraceError(
                f"{where or 'the cell'} changes the state in place and the cell gives the state out too, so that in a loop each step would "
                "change the output of the one before. Write h = h + u instead of h += u, or clone first."
            )
    own = Own() if isinstance(cell, Vjp) else own_gradient(cell, convention, inputs[: len(x)], inputs[len(x) :])
    used = {id(t): name for name, t in made.attributes.items()}
    twins = [(get, used[id(t)]) for name, get, t in found if used.get(id(t), name) != name]
    return Traced(**vars(made), getters={name: get for name, get, _ in found}, own=own, twins=twins)


def alike(first: Sequence[Draw], second: Sequence[Draw]) -> tuple[Draw, ...]:
    """The draws of a step, found to be the same in both recordings and of every sample its own."""
    if [(d.function, d.args, d.kwargs) for d in first] != [(d.function, d.args, d.kwargs) for d in second]:
        raise TraceError("the cell draws other random numbers at another batch size; it must not branch on that")
    for a, b in zip(first, second, strict=True):
        if (a.shape[:1], b.shape[:1]) != ((BATCH_SIZES[0],), (BATCH_SIZES[1],)) or a.shape[1:] != b.shape[1:]:
            raise UnsupportedOpError(f"{a.source}: random numbers of shape {list(a.shape)}, whose first axis is not the batch")
    return tuple(first)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Autocast casts every weight anew meanwhile: one that was cast before would come from nowhere."""
    was = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """A layer that some library runs as one operation (a sequence layer used as a cell) is taken apart meanwhile."""
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    were = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, was in zip(libraries, were, strict=True):
            library.enabled = was


def _same(t: Tensor) -> Tensor:
    return t


def lower(graph: Graph, fold: bool = False, unknown: Callable[[fx.Node], bool] | None = None) -> Lowered:
    """The core in the IR; lowered at both batch sizes, which must agree."""
    first, second = (Lowering(graph, which, fold, unknown).run() for which in (0, 1))
    if first.program != second.program:
        raise TraceError(
            f"the cell computes something else at batch size {graph.batch_sizes[0]} than at {graph.batch_sizes[1]}: the batch size is "
            "baked into it"
        )
    return first


def readout(graph: Graph, streams: Sequence[fx.Node], params: Sequence[fx.Node]) -> Any:
    """The part that makes outputs from states, run once over all steps; None if the output is the state."""
    if not graph.out:
        return None
    stops: dict[fx.Node, Key] = {n: ("stream", i) for i, n in enumerate(streams)}
    stops |= {n: ("param", i) for i, n in enumerate(params)}
    following = {i: n for i, n in enumerate(graph.next) if n.meta["kind"] == "state"}
    stops |= {n: ("next", i) for i, n in following.items()}
    for i, node in following.items():
        if str(node.target) == "aten.view_as_real.default" and isinstance(whole := node.args[0], fx.Node):
            stops[whole] = ("complex", i)
    return carve(graph.out, {n: key for n, key in stops.items() if n.op != "placeholder"})


def check(plan: Plan, convention: Convention, cell: Any, x: Sequence[Tensor], state: Sequence[Tensor], run: Any) -> None:
    """Compare two steps of the plan with two steps of the cell itself, on numbers of no particular kind.

    The last line of defence: whatever the passes proved, the compiled step must give what the cell gives.
    `run(plan, x leaves [B, T, ...], state leaves, kernel maker)` -> (out leaves or states [B, T, ...]).
    """
    generator = torch.Generator().manual_seed(0)
    batch, steps = 4, 2

    def sample(t: Tensor, *lead: int) -> Tensor:
        rows = t.detach().cpu().index_select(0, torch.arange(batch * (lead[0] if lead else 1), device="cpu") % t.shape[0])
        if rows.dtype.is_floating_point or rows.is_complex():
            wide = torch.complex128 if rows.is_complex() else torch.float64
            rows = rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=wide, device="cpu").to(rows.dtype)
        return (rows.reshape(batch, *lead, *rows.shape[1:]) if lead else rows).to(t.device)

    xs, ss = [sample(t, steps) for t in x], [sample(t) for t in state]
    with torch.no_grad():
        seed(x[0].device)
        got = run(plan, xs, ss, TorchKernel)
        seed(x[0].device)
        now, rows = ss, []
        for t in range(steps):
            out, now = convention.call(cell, [v[:, t] for v in xs], now)
            rows.append(out if out is not None else now)
        for i, mine in enumerate(got):
            theirs = torch.stack([r[i] for r in rows], 1)
            if theirs.is_complex():
                mine, theirs = torch.view_as_real(mine.resolve_conj()), torch.view_as_real(theirs.resolve_conj())
            theirs = theirs if theirs.dtype.is_floating_point else theirs.to(torch.float64)
            unit = 1e-9 if theirs.dtype is torch.float64 else 2e-4 if theirs.dtype is torch.float32 else 5e-2
            unit = max(unit, 5e-2) if plan.coarse else unit
            scale = float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).max()) if theirs.numel() else 0.0
            if not torch.allclose(mine.to(theirs.dtype), theirs, rtol=unit, atol=unit * (1 + scale), equal_nan=True):
                worst = float((mine.to(theirs.dtype) - theirs).abs().max())
                raise InternalError(
                    f"the compiled step differs from the cell by {worst:.3g} on a trial input. If the cell lets one sample of a batch "
                    "influence another (a batch statistic), that is why; otherwise please report it."
                )


