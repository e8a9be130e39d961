"""Differential equations by steps of fixed size against torchdiffeq, and torchode where it is installed. `python benchmarks/ode.py`.

Two problems as the field has them: a Hamiltonian network (two bodies in the plane, so 8 numbers; an energy of two layers of 64, its
gradient by autograd inside the right-hand side) and a GRU-ODE of 32 units; Kutta's 3/8 rule, one sample, float32. Every system takes the
same steps by the same method; gradients are by autograd through the steps (odeint) or by an equation solved backwards (odeint_adjoint). The
other systems run once at up to `--most` steps, and beyond that their time is scaled from there and marked by ≈. Errors are the largest
against the same steps in float64, over the first 1,000. Writes benchmarks/out/ode.json.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from measure import machine  # noqa: E402
from page import marked  # noqa: E402
from shell import bar, parser  # noqa: E402

from seqparc.ode import Solver  # noqa: E402

METHOD = "rk4"
STEP = 0.01
#: Calls before those that are timed, and those.
SETTLING, TIMED = 3, 7
#: Steps over which errors are taken, the same for all.
COMPARED = 1_000
#: What is asked: at this many steps the faster of the others takes so many times as long.
ASKED = (10_000, 50)


class Hamiltonian(nn.Module):
    """dq/dt = ∂H/∂p, dp/dt = -∂H/∂q of an energy that is a network."""

    def __init__(self, n: int = 8, width: int = 64) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(n, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus(), nn.Linear(width, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
        dq, dp = slope.chunk(2, -1)
        return torch.cat((dp, -dq), -1)


class GRUODE(nn.Module):
    """dh/dt = (1 - z) (g - h), the gates of a GRU without inputs (De Brouwer et al. 2019, "GRU-ODE-Bayes", equation 3)."""

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.r, self.z, self.g = (nn.Linear(n, n) for _ in range(3))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.r(h)), torch.sigmoid(self.z(h))
        return (1 - z) * (torch.tanh(self.g(r * h)) - h)


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], int]] = {"Hamiltonian network, 8": (Hamiltonian, 8), "GRU-ODE, 32": (GRUODE, 32)}

#: y0, t -> y.
Run = Callable[[Tensor, Tensor], Tensor]


def torchode(func: nn.Module) -> Run:
    """torchode's dopri5 with all steps as long as those between the times."""
    import torchode as to

    method = to.Dopri5(term=to.ODETerm(func))
    solver = to.AutoDiffAdjoint(method, to.FixedStepController())

    def run(y0: Tensor, t: Tensor) -> Tensor:
        problem = to.InitialValueProblem(y0=y0, t_eval=t.expand(len(y0), -1))
        return solver.solve(problem, dt0=torch.full((len(y0),), STEP)).ys.transpose(0, 1)  # type: ignore[no-any-return]

    return run


@dataclass(frozen=True)
class System:
    """What is compared: how it is made from func, its method, and whether it gives values without gradients."""

    make: Callable[[nn.Module], Run]
    method: str = METHOD
    forward: bool = True


SYSTEMS: dict[str, System] = {
    "seqparc": System(lambda func: Solver(func, METHOD)),
    "odeint": System(lambda func: lambda y0, t: odeint(func, y0, t, method=METHOD)),
    "odeint_adjoint": System(lambda func: lambda y0, t: odeint_adjoint(func, y0, t, method=METHOD), forward=False),
}
if importlib.util.find_spec("torchode"):
    SYSTEMS |= {"seqparc, dopri5": System(lambda func: Solver(func, "dopri5"), "dopri5"), "torchode, dopri5": System(torchode, "dopri5")}


def seconds(func: nn.Module, run: Run, y0: Tensor, t: Tensor, both: bool) -> float:
    """One call, forward alone or with the gradients of y0 and the parameters."""
    for p in func.parameters():
        p.grad = None
    start = y0.clone().requires_grad_(both)
    begin = time.perf_counter()
    with torch.set_grad_enabled(both):
        y = run(start, t)
    if both:
        y.square().mean().backward()
    return time.perf_counter() - begin


def measure(name: str, steps: int, most: int, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """One problem at one length: a row for each system."""
    torch.manual_seed(0)
    make, n = PROBLEMS[name]
    func, exactly = make(), make().double()
    exactly.load_state_dict(func.state_dict())
    y0, t = torch.randn(1, n), STEP * torch.arange(steps + 1)
    with torch.no_grad():
        exact = {m: Solver(exactly, m)(y0.double(), t.double()) for m in {s.method for s in SYSTEMS.values()}}
    rows = []
    for system, about in SYSTEMS.items():
        run, ours = about.make(func), system.startswith("seqparc")
        taken = steps if ours else min(steps, most)
        row: dict[str, Any] = {"problem": name, "steps": steps, "system": system, "method": about.method, "scaled": taken != steps}
        for what, both in (("fwd", False), ("fwd+bwd", True)):
            if not (both or about.forward):
                continue
            tick(f"{name}, {steps:,} steps, {system}, {what}")
            first = seconds(func, run, y0, t[: taken + 1 if ours else 3], both)  # compiles; of others, wakes what sleeps
            calls = [seconds(func, run, y0, t[: taken + 1], both) for _ in range(SETTLING + TIMED if ours else 1)]
            calls = calls[SETTLING:] if ours else calls
            row |= {what: statistics.median(calls) * steps / taken, f"{what} spread": [min(calls), max(calls)], f"{what} first": first}
        with torch.no_grad():
            y = run(y0, t[: min(taken, COMPARED) + 1])
        row["error"] = float((y - exact[about.method][: len(y)]).abs().max())
        if ours:
            stats = run.stats  # type: ignore[attr-defined]
            row["run"] = f"{stats.chunks} × {stats.passes}"
        rows.append(row)
    return rows


def ratios(rows: Sequence[dict[str, Any]], row: dict[str, Any], what: str) -> float | None:
    """How many times as long as ours a system takes, by the same method."""
    ours = next(r for r in rows if r["system"].startswith("seqparc") and r["method"] == row["method"])
    return row[what] / ours[what] if what in row else None


HEAD = ("problem", "steps", "system", "fwd, ms", "× ours", "fwd+bwd, ms", "× ours", "largest error", "chunks × passes")


def cells(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[str]:
    """A row as it is shown."""
    made = [row["problem"], f"{row['steps']:,}", row["system"]]
    for what in ("fwd", "fwd+bwd"):
        ratio = ratios(rows, row, what)
        approximately = "≈ " if row["scaled"] else ""
        made += ["", ""] if ratio is None else [f"{approximately}{1e3 * row[what]:,.3g}", "" if ratio == 1 else f"{ratio:,.0f}"]
    return [*made, f"{row['error']:.1e}", row.get("run", "")]


def judged(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is asked at the length it is asked for."""
    steps, bound = ASKED
    said = []
    for row in rows:
        for what in ("fwd", "fwd+bwd"):
            ratio = ratios(rows, row, what)
            if row["steps"] == steps and not row["system"].startswith("seqparc") and ratio is not None:
                verdict = "met" if ratio >= bound else "MISSED"
                said += [f"{verdict}: {row['problem']}, {what}, {row['system']}: {ratio:.0f} times, asked {bound}"]
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and write; returns 1 if what is asked was missed."""
    args = parser(__doc__, TIMED)
    args.add_argument("--steps", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    args.add_argument("--most", type=int, default=10_000, help="steps up to which the other systems run")
    args.add_argument("--page", type=Path, help="write the table into this Markdown page, between its marks")
    told = args.parse_args(argv)
    torch.set_num_threads(told.threads)
    lengths = [200] if told.quick else told.steps
    console = Console(width=160)
    chosen = [(name, n) for name in PROBLEMS if told.only in name for n in lengths]
    every: list[dict[str, Any]] = []
    table = Table(*HEAD, title=f"{STEP:g} a step, one sample, float32; rk4 unless said")
    said: list[str] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for name, n in chosen:
            rows = measure(name, n, told.most, lambda text: (progress.update(task, description=text), progress.refresh())[0])
            every += rows
            said += judged(rows)
            for row in rows:
                table.add_row(*cells(rows, row))
            progress.advance(task)
    console.print(table)
    console.print("\n".join(said))
    told.out.mkdir(exist_ok=True)
    about = machine() | {"torchdiffeq": importlib.metadata.version("torchdiffeq")}
    (told.out / "ode.json").write_text(json.dumps({"machine": about, "rows": every}, indent=1))
    if told.page:
        lines = [", ".join(f"{k} {v}" for k, v in about.items()) + ".", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|--|--:|--|--:|--:|--:|--:|--:|--|"]
        for name, n in chosen:
            rows = [r for r in every if (r["problem"], r["steps"]) == (name, n)]
            lines += ["| " + " | ".join(cells(rows, r)) + " |" for r in rows]
        told.page.write_text(marked(told.page.read_text(), "\n".join(lines)))
    return int(any(text.startswith("MISSED") for text in said))


if __name__ == "__main__":
    sys.exit(main())
