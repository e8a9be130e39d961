"""`rnn.explain(x)`: how a cell was taken apart, what was proved about it, and how it is run."""

from __future__ import annotations

import bisect
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from seqparc import ir
from seqparc.codegen.floor import floor
from seqparc.errors import SeqparcError, ToolchainError
from seqparc.explanation import TIME, Explanation
from seqparc.forgetting import forgetting
from seqparc.formula import formula
from seqparc.passes import derivative, symbolic
from seqparc.picture import Row
from seqparc.plan import Plan, Stats
from seqparc.runtime.derived import as_real
from seqparc.runtime.driver import Cut
from seqparc.runtime.engine import Engine
from seqparc.runtime.memory import Memory, memory
from seqparc.runtime.module import CompiledRNN
from seqparc.runtime.slabs import count
from seqparc.timeline import MOST, Timeline, timeline

#: Jacobian entries shown one by one.
SHOWN = 16
#: The card that GPU kernels are looked at on, whatever card there is.
CARD = "sm_90"


def explain(rnn: CompiledRNN, x: Any = None, state: Any = None) -> Explanation:
    """Explain a compiled cell for the shapes of x, or of the last call. Raises SeqparcError if there is neither.

    On an x calls are measured too, by an engine of their own: `rnn.stats` and what the cell's engine has learnt stay as they are.
    """
    engine = rnn.engine(x, state)
    if engine is None:
        raise SeqparcError("nothing was run yet: give explain an input, explain(x), for the shapes it is about")
    if isinstance(engine, str):
        return Explanation(rnn.name, (("not compiled", (engine, "It runs as the plain loop.")),), np.zeros((0, 0), bool), (), rnn.stats)
    plan = engine.plan
    entries = [entry for _, part in engine.parts for entry in _entries(part.plan)]
    form = formula(plan, rnn.cell)
    sections = [("stages", _stages(plan)) if plan.stages else ("split", _split(plan)), ("state Jacobian", _structure(plan))]
    sections.append(("in matrix form", form.text()))
    taken: dict[str, Memory] = {}
    times, ran = Timeline(), engine
    if x is not None:
        leaves, convention, start = rnn.understand(x, state)
        if leaves[0].shape[0]:
            sections.append(("forgetting", forgetting(rnn.cell, convention, leaves, start).lines()))
        times, watched = _timed(engine, leaves, as_real(start))
        ran = watched if watched is not None and not engine.stats.backend else engine
        taken = _memory(ran, leaves)
    for (suffix, part), (_, made) in zip(engine.parts, ran.parts, strict=True):
        shown = _entries(part.plan)
        sections += [
            *([(f"split{suffix}", _split(part.plan)[:3])] if plan.stages else []),
            (f"lanes{suffix}", _lanes(part.plan)),
            *([(f"entries of one lane{suffix}", tuple(f"{n} = {_readable(e)}" for n, e in shown[:SHOWN]) + _more(shown))] if shown else []),
            (f"strategy{suffix}", (*_unasked(ran, engine), *_strategy(made))),
            (f"kernels{suffix}", _kernels(made)),
            *([(f"GPU kernel{suffix}", told)] if (told := _gpu(part)) else []),
        ]
    if taken:
        sections.append(("memory of a call", tuple(line for what, m in taken.items() for line in m.lines(what))))
    if x is not None:
        sections.append((TIME, times.lines()))
    notes = dict.fromkeys(note for p in (plan, *(part.plan for _, part in engine.parts)) for note in p.notes)
    sections += [("notes", tuple(notes))] if notes else []
    hardest = max((e.last["forward"][2] for _, e in ran.parts if "forward" in e.last), key=len_of, default=None)
    return Explanation(
        rnn.name, tuple(sections), plan.structure.pattern, tuple(entries), ran.stats, taken, form, times, tuple(plan.core.state_sizes),
        rows(ran), None if hardest is None else hardest.rtol or hardest.atol,
    )  # fmt: skip


def len_of(cut: Cut) -> int:
    return len(cut.spans)


def _unasked(ran: Engine, engine: Engine) -> tuple[str, ...]:
    return () if ran is engine else ("not called yet: this is of runs for this explanation",)


def _timed(engine: Engine, x: Sequence[Tensor], start: Sequence[Tensor]) -> tuple[Timeline, Engine | None]:
    """Where a call's time goes, with backward where there is a compiled one and room for it."""
    own, known = bool(engine.plan.own_gradient), _memory(engine, x)
    most = {what: m.most for what, m in known.items()}
    gradient = torch.is_grad_enabled() and not own and most.get("forward and backward", 0) <= MOST
    return timeline(engine, x, start, gradient, most["forward and backward" if gradient else "forward"])


def rows(engine: Engine) -> dict[str, tuple[Row, ...]]:
    """Which stretches of time the last call ran where, by direction and what its kernels' names end in.

    Each is a chunk, or a sample where time is one stretch.
    """
    found = {}
    for suffix, part in engine.parts:
        for direction, (_, _, cut, outcome) in part.last.items():
            _, kernel = part.kernels.get(direction) or part.kernels.get(f"{direction} stored") or ("", None)
            spans, batch = cut.spans, max(1, outcome.batch)
            threads = _threads(kernel, len(spans), batch)
            lead = np.zeros_like(spans.t0) if spans.lead is None else spans.lead
            columns = zip(lead.tolist(), spans.t0.tolist(), spans.length.tolist(), strict=True)
            if len(spans) > 1:
                made = tuple(Row(c, *column, threads[c * batch]) for c, column in enumerate(columns))
            else:
                made = tuple(Row(b, *column, threads[b]) for column in columns for b in range(batch))
            found[direction + suffix] = made
    return found


def _threads(kernel: Any, chunks: int, batch: int) -> list[int]:
    """Which thread runs each (chunk, sample); -1 where all run at once. As the kernels in C share tiles out, in order and evenly."""
    lanes, together = chunks * batch, getattr(kernel, "together", None)
    if together is None:
        return [-1] * lanes
    team = torch.get_num_threads()
    size = together(lanes, team)
    tiles = int((lanes - 1) / size) + 1
    each, more = divmod(tiles, team)
    first = [t * each + min(t, more) for t in range(team + 1)]
    return [bisect.bisect_right(first, int(k / size)) - 1 for k in range(lanes)]


def _memory(engine: Engine, x: Sequence[Tensor]) -> dict[str, Memory]:
    """What calls on x like this take, cut into chunks as the last one was; the gradient's too where there is a compiled one."""
    s, save = engine.stats, engine.options.save
    batch, steps = x[0].shape[:2]
    chunks = s.chunks, s.backward.chunks if s.backward is not None else s.chunks
    found = {"forward": memory(engine.plan, batch, steps, chunks=chunks, slabs=count(batch, steps, engine.row_bytes))}
    if not engine.plan.own_gradient:
        found["forward and backward"] = memory(
            engine.plan, batch, steps, True, save, chunks, any(v.requires_grad for v in x)
        )  # fmt: skip
    return found


def _stages(plan: Plan) -> tuple[str, ...]:
    """Which leaves of the state are solved when."""
    lines = []
    for stage in plan.stages:
        size = sum(plan.core.state_sizes[i] for i in stage.leaves)
        what = "no recurrence of its own, torch operations" if stage.plan is None else "a recurrence"
        after = f", given state {', '.join(map(str, stage.earlier))}" if stage.earlier else ""
        lines.append(f"state {', '.join(map(str, stage.leaves))} ({size} number{'s' * (size != 1)}): {what}{after}")
    return (*lines, _split(plan)[3])


def _readable(e: sympy.Expr) -> str:
    return str(e).replace("**", "^")


def _more(entries: Sequence[Any]) -> tuple[str, ...]:
    return (f"… and {len(entries) - SHOWN} more",) if len(entries) > SHOWN else ()


def _names(operations: Sequence[Any]) -> str:
    counts: dict[str, int] = {}
    for node in operations:
        name = str(getattr(node.target, "_overloadpacket", getattr(node.target, "__name__", node.target))).removeprefix("aten.")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{n}×{c}" if c > 1 else n for n, c in counts.items()) or "nothing"


def _split(plan: Plan) -> tuple[str, ...]:
    values = [v for v in ir.topological(plan.core.outputs) if not isinstance(v, (ir.Leaf, ir.Const, ir.Gather))]
    counts: dict[str, int] = {}
    for v in values:
        name = v.op if isinstance(v, ir.Map) else type(v).__name__.lower()
        counts[name] = counts.get(name, 0) + 1
    core = ", ".join(f"{n}×{c}" if c > 1 else n for n, c in counts.items()) or "nothing"
    lines = {str(v.src) for v in values if isinstance(v, (ir.Map, ir.Contract, ir.Reduce)) and v.src is not None}
    widths = [f"x{'' if d is None else ' as it is'} ({size} numbers)" for d, size in zip(plan.direct, plan.core.stream_sizes, strict=True)]
    return (
        f"prelude, once over the whole sequence: {_names(plan.prelude.operations)}; gives the core {', '.join(widths) or 'nothing'} a step",
        f"on parameters alone, once per call: {_names(plan.weights.operations)}; gives {len(plan.core.param_sizes)} weights",
        f"core, every step: {core}",
        f"readout, once over all states: {_names(plan.readout.operations) if plan.readout else 'nothing, the output is the state'}",
        f"core written at {', '.join(sorted(lines))}" if lines else "the core has no operations",
    )


def _structure(plan: Plan) -> tuple[str, ...]:
    s = plan.structure
    n = len(s.pattern)
    filled = int(s.pattern.sum())
    sizes = sorted((len(c) for c in s.components), reverse=True)
    lines = [f"{s.kind}: {filled} of {n * n} entries of ∂s'/∂s may be non-zero, the others are proved zero"]
    lines.append(f"{len(sizes)} group{'s' * (len(sizes) != 1)} of state numbers that never meet, the largest of {sizes[0] if sizes else 0}")
    if len(plan.core.state_sizes) > 1:
        names = [[_block(s.pattern[a, b]) for b in _spans(plan)] for a in _spans(plan)]
        lines.append("by leaves: " + "; ".join(", ".join(row) for row in names))
    if any(len(c) > 1 for c in s.components) and len(s.order) > len(s.components):
        order = [len(g) for g in s.order]
        lines.append(f"strongly connected groups in the order they can be solved in: sizes {', '.join(map(str, order[:20]))}")
    if plan.frozen:
        lines.append(f"this rests on the present values of {', '.join(plan.frozen)}; another value compiles anew")
    return tuple(lines)


def _spans(plan: Plan) -> list[slice]:
    """Where each leaf's numbers lie in the flat state."""
    ends = np.cumsum(plan.core.state_sizes)
    return [slice(int(e - n), int(e)) for e, n in zip(ends, plan.core.state_sizes, strict=True)]


def _block(pattern: np.ndarray) -> str:
    """What the Jacobian of one leaf by another looks like."""
    rows, columns = np.nonzero(pattern)
    if not rows.size:
        return "zero"
    if pattern.all():
        return "dense" if pattern.size > 1 else "diagonal"
    if pattern.shape[0] == pattern.shape[1] and (rows == columns).all():
        return "diagonal"
    return "sparse"


def _lanes(plan: Plan) -> tuple[str, ...]:
    p = plan.program
    kind = "a scalar program: every number in a register, lanes in SIMD" if plan.scalar else "a vector program: lanes are columns"
    return (f"{p.lanes} lane{'s' * (p.lanes != 1)} per sample, {p.n} state number{'s' * (p.n != 1)} in each; {kind}",)


def _entries(plan: Plan) -> list[tuple[str, sympy.Expr]]:
    """(name, expression) of each non-zero Jacobian entry of a lane of a scalar program."""
    if not plan.scalar:
        return []
    names: dict[ir.Value, str] = {}
    for v in ir.leaves(plan.program.outputs):
        if v.kind == "state":
            names[v] = f"s{plan.program.state.index(v)}"
        else:
            column = int(v.index.array[0, 0])
            names[v] = f"{'u' if v.kind == 'stream' else 'w'}{v.slot}_{column}"
    found = []
    for i, row in enumerate(derivative.entries(plan.program)):
        for j, value in enumerate(row):
            if not (isinstance(value, ir.Const) and value.value == 0):
                found.append((f"J[{i},{j}]", symbolic.to_sympy(value, names)))
    return found


def _strategy(engine: Engine) -> tuple[str, ...]:
    s = engine.stats
    if not s.backend:
        return ("not run yet for these shapes",)
    lines = []
    for direction, d in (("forward", s), ("backward", s.backward)):
        if d is not None:
            lines.append(
                f"{direction}: {d.strategy}, {d.chunks} chunk{'s' * (d.chunks != 1)} of {d.chunk_length} steps, warm-up {d.warmup}, "
                f"update {d.update}; {d.passes} pass{'es' * (d.passes != 1)}, gap {d.gap:.2g}"
            )
            lines += [f"  {reason}" for reason in d.reasons]
            lines.append(f"  {d.verdict}")
            if d.fallback:
                lines.append("  finished by the sequential kernel")
            lines += _floor(engine, direction, d)
    return tuple(lines)


def _floor(engine: Engine, direction: str, d: Stats) -> list[str]:
    """What the last call took beside the least that its arithmetic and its memory take on this processor."""
    _, kernel = engine.kernels.get(direction) or engine.kernels.get(f"{direction} stored") or ("", None)
    if d.backend != "c" or not d.seconds or kernel is None:
        return []
    least = floor(kernel.program, engine.plan.dtype, d.batch, d.steps, torch.get_num_threads())  # type: ignore[attr-defined]
    shape = f"{d.batch} × {d.steps} steps"
    times = d.seconds / least.seconds
    return [f"  {1e3 * d.seconds:.3g} ms for {shape}: {times:.1f} times the least that this processor needs, for {least.unit} mostly"]


def _kernels(engine: Engine) -> tuple[str, ...]:
    if not engine.kernels:
        return (f"none yet; the {engine.backends[0][0]} backend makes them when they are first needed",)
    lines = []
    for direction, (backend, kernel) in engine.kernels.items():
        s = getattr(kernel, "setting", None)
        tile = "" if s is None else f", programs of {s.block} lanes on {s.warps} warps, chunks of {s.chunk_per_warmup} warm-ups at least"
        lines.append(f"{direction} on {backend}: {len(kernel.source.splitlines())} lines{tile}")
    return (*lines, f"{engine.compile_seconds:.2f} s from the cell to the kernels")


def _gpu(engine: Engine) -> tuple[str, ...]:
    """What the Triton kernels made so far use, or would the forward one: to compile those that nobody wants may take long."""
    if engine.backends[0][0] != "triton" or importlib.util.find_spec("triton") is None:
        return ()
    from seqparc.codegen import offline

    lines: list[str] = []
    for direction, program in offline.programs(engine.plan).items():
        if direction in (engine.kernels or ("forward",)):
            try:
                reports = offline.inspect(program, engine.plan.dtype, CARD, engine.options.precision)
            except ToolchainError as error:
                lines += [f"{direction} on {CARD}:", f"  {error}"]
                continue
            for report in reports:
                lines += [f"{direction} on {CARD}, {report.kernel}:", *(f"  {line}" for line in report.lines())]
    return tuple(lines)
