"""Hard dynamics: what it takes, and what it costs where it does not pay. `python benchmarks/robustness.py`.

Every row is a cell whose memory is long, infinite, chaotic, oscillating, unstable or broken by jumps. Shown are the passes, the gap and who
finished; the time of the first call and of later ones against `strategy="sequential"` in the same run; and errors against float64 beside
the plain loop's own. The last columns are `strategy="newton"`: chunks of one step, as DEER has it. Writes benchmarks/out/robustness.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_map

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from dynamics import DYNAMICS, Dynamics  # noqa: E402
from measure import machine  # noqa: E402
from shell import bar, parser  # noqa: E402

import seqparc  # noqa: E402
from seqparc.tree import flatten  # noqa: E402

#: A call of a cell that does not parallelise may cost this many times what the sequential kernel does.
MOST = 1.3
#: An error is the plain loop's own up to this factor, or this many units in the last place of the largest number.
FACTOR, UNITS = 4.0, 16
#: Calls that are timed together, and as many again before those that are timed one by one.
SETTLING = 12
#: Modules whose first call is timed.
FRESH = 5


#: Columns that are words.
TEXTS = ("dynamics", "first run", "settled run", "newton")

PAGE = f"""
Times are multiples of strategy="sequential" on the same call, forward alone and with all gradients: of the first call of a shape, compiling
taken out, against the other's first; of the first {SETTLING} calls together; and of later ones. A run is passes × chunks and the update,
* where the sequential kernel finished it. The gap is that of the settled run. Errors are the largest against float64, relative to the
largest number, beside the plain loop's own. newton: chunks of one step, as DEER has it, forward, with its time for both directions.

Promised: the first calls together, and a settled one, take at most {MOST} times what the sequential kernel does; errors are at most
{FACTOR:g} times the plain loop's, or {UNITS} units in the last place of the largest number; NaN and infinity stand where the loop has them.
"""


class Subject:
    """One dynamics under one strategy."""

    def __init__(self, dynamics: Dynamics, **options: Any) -> None:
        torch.manual_seed(0)
        self.rnn = seqparc.compile(dynamics.make(), state=dynamics.state, options=options)
        self.x = dynamics.x(torch.Generator().manual_seed(1))

    def call(self, both: bool, steps: int | None = None) -> float:
        """Seconds of a call: forward alone, or with the gradients of x and every parameter."""
        x = self.x[:, :steps].detach().clone().requires_grad_(both)
        weights = [p for p in self.rnn.parameters() if p.requires_grad]
        begin = time.perf_counter()
        with torch.set_grad_enabled(both):
            y = flatten(self.rnn(x)[0])[0][0]
            if both:
                torch.autograd.grad(y, [x, *weights], torch.ones_like(y), allow_unused=True)
        return time.perf_counter() - begin

    def told(self) -> dict[str, Any]:
        """What the last call did, by direction."""
        s = self.rnn.stats
        parts = {"forward": s, "backward": s.backward}
        return {
            name: {"strategy": p.strategy, "chunks": p.chunks, "update": p.update, "passes": p.passes, "gap": p.gap, "fallback": p.fallback}
            for name, p in parts.items() if p is not None
        }  # fmt: skip


def outputs(rnn: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return flatten(rnn(x)[0])[0][0].double()


def apart(y: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite where NaN or infinity stands elsewhere."""
    if not torch.equal(y.isfinite(), right.isfinite()):
        return float("inf")
    there = right.isfinite()
    scale = right[there].abs().max() if there.any() else torch.ones(())
    return float(((y - right)[there].abs().max() / scale.clamp_min(1e-300)) if there.any() else 0.0)


def made(d: Dynamics, shorter: int) -> tuple[Subject, Subject]:
    """One that runs sequentially and one that chooses, with kernels made for shorter sequences, of which nothing is learnt for these."""
    subjects = Subject(d, strategy="sequential"), Subject(d)
    for s in subjects:
        for _ in range(3):
            s.call(True, s.x.shape[1] // shorter)
    return subjects


def compare(d: Dynamics, both: bool, repeats: int, shorter: int, fresh: int) -> tuple[dict[str, Any], Subject, Subject]:
    """Forward alone or with gradients: the first call, each time of new modules, the first ones together, and those that come then."""
    firsts = []
    for k in range(fresh):
        plain, auto = made(d, shorter)
        before = auto.rnn.stats.compile_seconds
        other, mine = plain.call(both) if k % 2 else 0.0, auto.call(both)
        making = auto.rnn.stats.compile_seconds - before  # of the kernels of an update that shorter runs did not need
        firsts.append((mine - making, other or plain.call(both)))
    now = auto.told()
    early = [firsts[-1]]
    for _ in range(SETTLING - 1):
        before = auto.rnn.stats.compile_seconds
        mine = auto.call(both)
        early.append((mine - (auto.rnn.stats.compile_seconds - before), plain.call(both)))
    for _ in range(SETTLING):
        plain.call(both), auto.call(both)
    times = [(plain.call(both), auto.call(both)) for _ in range(repeats)]
    sequential, settled = (statistics.median(column) for column in zip(*times, strict=True))
    total, without = (sum(column) for column in zip(*early, strict=True))
    return {
        "sequential_ms": 1000 * sequential, "first": statistics.median(a / b for a, b in firsts), "together": total / without,
        "settled": settled / sequential, "at_first": now, "then": auto.told(),
    }, plain, auto  # fmt: skip


def look(d: Dynamics, repeats: int, shorter: int, fresh: int) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"dynamics": d.name}
    for both, what in ((False, "fwd"), (True, "fwd+bwd")):
        row[what], plain, auto = compare(d, both, repeats, shorter, fresh)
    row["shape"] = list(plain.x.shape)
    newton = Subject(d, strategy="newton")
    newton.call(True)
    row["newton"] = {"times": 1000 * newton.call(True) / row["fwd+bwd"]["sequential_ms"], **newton.told()["forward"]}
    x = plain.x
    loop = outputs(plain.rnn.sequential, x)
    start = None if d.state is None else tree_map(Tensor.double, d.state)
    right = outputs(seqparc.compile(plain.rnn.cell.double(), state=start, options={"strategy": "sequential"}), x.double())
    plain.rnn.cell.float()
    mine = outputs(auto.rnn, x)
    row["errors"] = {"apart": apart(mine, loop), "loop": apart(loop, right), "seqparc": apart(mine, right)}
    row["nan_alike"] = bool(torch.equal(mine.isfinite(), loop.isfinite()))
    return row


def verdicts(row: dict[str, Any]) -> list[str]:
    """What a row promises and does not keep."""
    found = [
        f"{what}, {when}: {row[what][when]:.2f} × sequential"
        for what in ("fwd", "fwd+bwd") for when in ("together", "settled") if row[what][when] > MOST
    ]  # fmt: skip
    e = row["errors"]
    if not e["seqparc"] <= max(FACTOR * e["loop"], UNITS * torch.finfo(torch.float32).eps):
        found.append(f"error {e['seqparc']:.1e}, the loop's {e['loop']:.1e}")
    return found + ["NaN or infinity elsewhere"] * (not row["nan_alike"])


#: Columns of the table: what it is called, and what of a row it shows.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "dynamics": lambda r: r["dynamics"],
    "shape": lambda r: "×".join(map(str, r["shape"])),
    "seq. ms": lambda r: f"{r['fwd']['sequential_ms']:.2f}",
    "first": lambda r: f"{r['fwd']['first']:.2f}",
    f"first {SETTLING}": lambda r: f"{r['fwd']['together']:.2f}",
    "settled": lambda r: f"{r['fwd']['settled']:.2f}",
    "+bwd first": lambda r: f"{r['fwd+bwd']['first']:.2f}",
    f"+bwd first {SETTLING}": lambda r: f"{r['fwd+bwd']['together']:.2f}",
    "+bwd settled": lambda r: f"{r['fwd+bwd']['settled']:.2f}",
    "first run": lambda r: _run(r["fwd"]["at_first"]["forward"]),
    "settled run": lambda r: _run(r["fwd"]["then"]["forward"]),
    "gap": lambda r: f"{r['fwd']['then']['forward']['gap']:.1e}",
    "error": lambda r: f"{r['errors']['seqparc']:.1e}",
    "loop's": lambda r: f"{r['errors']['loop']:.1e}",
    "newton": lambda r: f"{_run(r['newton'])}",
    "newton ×": lambda r: f"{r['newton']['times']:.0f}",
}


def _run(told: dict[str, Any]) -> str:
    if told["strategy"] == "sequential":
        return "sequential"
    made = f"{told['passes']} × {told['chunks']}" + ("" if told["update"] == "none" else f" {told['update']}")
    return made + " *" * bool(told["fallback"])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title='hard dynamics; times are multiples of strategy="sequential"', title_justify="left")
    for head in COLUMNS:
        made.add_column(head, justify="left" if head in TEXTS else "right")
    for r in rows:
        made.add_row(*(show(r) for show in COLUMNS.values()))
    return made


def page(about: dict[str, Any], rows: Sequence[dict[str, Any]], missed: dict[str, list[str]]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Hard dynamics", "", f"Made by `python benchmarks/robustness.py --page`: {', '.join(f'{k} {v}' for k, v in about.items())}.", "",
        PAGE.strip(), "", "Kept by every row." if not missed else "Not kept:", *(f"- {k}: {'; '.join(v)}" for k, v in missed.items()), "",
        "| " + " | ".join(COLUMNS) + " |", "|" + "|".join("---" if head in TEXTS else "--:" for head in COLUMNS) + "|",
        *("| " + " | ".join(show(r) for show in COLUMNS.values()) + " |" for r in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table; 1 if a row does not keep what is promised."""
    shell = parser(__doc__, repeats=7)
    shell.add_argument("--page", type=Path, help="write the table as Markdown here too")
    args = shell.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=220)
    about = machine()
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    chosen = [d.shorter(512) if args.quick else d for d in DYNAMICS if args.only in d.name]
    rows: list[dict[str, Any]] = []
    with bar(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", seqparc.SeqparcWarning)
        task = progress.add_task("", total=len(chosen))
        for d in chosen:
            progress.update(task, description=d.name, refresh=True)
            rows.append(look(d, args.repeats, 2 if args.quick else 4, 1 if args.quick else FRESH))
            progress.advance(task)
    console.print(table(rows))
    console.print(PAGE.strip())
    missed = {r["dynamics"]: found for r in rows if (found := verdicts(r))}
    for name, found in missed.items():
        console.print(f"{name}: {'; '.join(found)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "robustness.json").write_text(json.dumps({"machine": about, "rows": rows, "missed": missed}, indent=1))
    if args.page:
        args.page.write_text(page(about, rows, missed))
    console.print(f"written to {args.out}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
