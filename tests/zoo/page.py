"""What is found out about each row, and the page that tells it: docs/zoo.md."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import seqparc
from seqparc import ir
from seqparc.ops import OPS
from seqparc.plan import Plan
from seqparc.tree import flatten

from .compare import Subject, errors, words
from .rows import FOLDER, Row

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
BATCH, REPEATS = 4, 5
#: Largest errors against the plain loop over 37 steps, relative to the largest number of a tensor: of values, of gradients.
VALUES, GRADIENTS = 1e-5, 1e-4
#: Operations with a kink, beside those that pick one of two values by a comparison.
KINKS = frozenset(("abs", "relu", "maximum", "minimum"))


@dataclass(frozen=True)
class Found:
    """About one row. Times are in seconds; those of the eager loop were taken once, the others are medians."""

    row: Row
    refused: str = ""
    lanes: int = 0
    numbers: int = 0  # of state in a lane
    structure: str = ""
    filled: float = 0.0  # of the state Jacobian, what is not proved to be zero
    kind: str = ""
    backend: str = ""
    agrees: bool = True
    compiling: float = 0.0
    forward: tuple[float, float] = (0.0, 0.0)  # the eager loop, compiled
    both: tuple[float, float] | None = None  # with gradients; None where the cell has none


def kind(plan: Plan) -> str:
    """How the next state depends on the state, and what is the cell's own about its gradient."""
    values = ir.topological(plan.program.outputs)
    maps = [v for v in values if isinstance(v, ir.Map)]
    conditions = {v.operands[0] for v in maps if v.op == "where"}
    flat = [v for v in maps if OPS[v.op].partials is not None and set(OPS[v.op].partials or ()) == {"0"}]
    names = {v.op for v in maps}
    if any(v not in conditions for v in flat):
        found = "steps"
    elif "where" in names:
        found = "branches"
    else:
        found = "kinks" if names & KINKS else "smooth"
    return found + ", own gradient" * bool(plan.own_gradient) + ", random" * bool(plan.draws)


def look(row: Row, steps: int) -> Found:
    """Compile a row from an empty cache, compare it, and time it."""
    if row.missing:
        return Found(row, refused=row.missing)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["SEQPARC_CACHE"] = folder
        try:
            return _figures(Subject.of(row, BATCH, steps))
        except seqparc.SeqparcError as error:
            return Found(row, refused=str(error).replace(f"{FOLDER}/", ""))
        except Exception as error:  # one row is not to cost the others
            return Found(row, refused=f"it fails, {type(error).__name__}: {error}", agrees=False)


def _figures(subject: Subject) -> Found:
    """Of a row that has not been compiled yet."""
    rnn, row = subject.rnn, subject.row
    first = _seconds(subject, rnn, both=True)
    if rnn.stats.backend == "eager":
        raise seqparc.SeqparcError(f"runs as the plain loop: {rnn.stats.fallback}")
    for _ in range(2):  # the warm-up of adaptive choices
        _seconds(subject, rnn, both=False)
        _seconds(subject, rnn, both=True)
    forward, both = ([_seconds(subject, rnn, both=b) for _ in range(REPEATS)] for b in (False, True))
    eager = [_seconds(subject, subject.plain, both=b) for b in (False, True)]
    engine = rnn.engine()
    assert not isinstance(engine, str) and engine is not None
    plan = engine.plan
    short = Subject.of(row, 3, 37)
    off = errors(short.results(short.rnn), short.results(short.plain))
    trained = any(t.requires_grad for t in flatten(short.plain(*_asking(short)))[0])
    return Found(
        row,
        lanes=plan.program.lanes,
        numbers=plan.program.n,
        structure=words(plan.structure) + (f" in {len(plan.stages)} stages" if plan.stages else ""),
        filled=float(plan.structure.pattern.mean()),
        kind=kind(plan),
        backend=rnn.stats.backend,
        agrees=all(e <= (GRADIENTS if name.startswith("d") else VALUES) for name, e in off.items()),
        compiling=max(0.0, first - statistics.median(both)),
        forward=(eager[0], statistics.median(forward)),
        both=(eager[1], statistics.median(both)) if trained else None,
    )


def _asking(subject: Subject) -> tuple[Any, Any]:
    """x and the state, of which gradients are asked."""
    leaves, structure = flatten((subject.x, subject.state))
    return structure.unflatten([t.detach().requires_grad_(t.is_floating_point()) for t in leaves])  # type: ignore[no-any-return]


def _seconds(subject: Subject, run: Callable[[Any, Any], Any], both: bool) -> float:
    """A call: forward alone, or with the gradients of x, the state and every parameter."""
    x, state = _asking(subject)
    begin = time.perf_counter()
    with torch.set_grad_enabled(both):
        results = [t for t in flatten(run(x, state))[0] if t.requires_grad]
        if both and results:
            wanted = [*flatten((x, state))[0], *(p for p in subject.rnn.parameters() if p.requires_grad)]
            torch.autograd.grad([t.sum() for t in results], [t for t in wanted if t.requires_grad], allow_unused=True)
    return time.perf_counter() - begin


# -- the page --------------------------------------------------------------------------------------------------------


def page(found: Sequence[Found], steps: int) -> str:
    """The page, in Markdown."""
    ran = [f for f in found if not f.refused]
    backends = ", ".join(f"{n} on the {name} backend" for name, n in Counter(f.backend for f in ran).most_common())
    direct = sum(f.row.call is None for f in ran)
    wrong = [f.row.title for f in ran if not f.agrees]
    lines = [
        "# The zoo",
        "",
        f"{len(found)} recurrent cells of public packages, unmodified, at the versions in tests/zoo/requirements.txt. {len(ran)} compile: "
        f"{backends}; {direct} are called as they are, {len(ran) - direct} through an adapter of at most three lines. "
        + (f"**These do not agree with their plain loop: {', '.join(wrong)}.** " if wrong else "All of these agree with their plain loop: "
           "values within 1e-5, gradients of inputs, states and parameters within 1e-4 of the largest number."),
        "",
        f"Against the eager loop over {steps:,} steps, the median speed-up is {_median([f.forward for f in ran])} forward and "
        f"{_median([f.both for f in ran if f.both])} with gradients. {_machine()}, batch {BATCH}, float32; the eager loop was timed "
        f"once, seqparc's times are medians of {REPEATS} calls after three.",
        "",
        "Not compiled:",
        "",
        *(f"- {f.row.title}: {' '.join(f.refused.split())}" for f in found if f.refused),
        "",
        "Lanes: independent recurrences in a sample, and the state numbers in each. Structure: of the state Jacobian as it is proved, with "
        "the share of entries that are not proved to be zero, and in how many stages it is solved if in several. "
        "Kind: smooth; kinks; branches, where a comparison picks one of two formulas; "
        "steps, which jump; whether the cell cuts or replaces its gradient, and whether it draws random numbers. Compiling: seconds to "
        "both kernels with an empty cache. The last columns: times faster than the eager loop, and milliseconds of a call.",
        "",
        "| cell | lanes | structure | kind | backend | compiling | forward | with gradients |",
        "|---|--:|---|---|---|--:|--:|--:|",
        *map(_line, ran),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(f: Found) -> str:
    structure = f.structure if f.structure in ("none", "diagonal") else f"{f.structure}, {100 * f.filled:.0f} %"
    times = [f"{_number(before / after)}× ({_number(1000 * after)} ms)" for before, after in (t for t in (f.forward, f.both) if t)]
    cells = [f.row.title, f"{f.lanes} × {f.numbers}", structure, f.kind, f.backend, f"{f.compiling:.1f} s", *times]
    return "| " + " | ".join(cells + [""] * (8 - len(cells))) + " |"


def _number(value: float) -> str:
    """Of three digits at least, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _median(times: Sequence[tuple[float, float]]) -> str:
    return _number(statistics.median([before / after for before, after in times] or [float("nan")]))


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    processor = names[0] if names else platform.processor()
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
