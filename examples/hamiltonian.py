"""A network learns the energy of a pendulum from noisy observations, and predicts it for a hundred seconds: plain loop against compiled.

Run `python examples/hamiltonian.py`. What is learnt is one function H(q, p); the motion follows from it by Hamilton's equations,
dq/dt = ∂H/∂p and dp/dt = -∂H/∂q (Greydanus, Dzamba and Yosinski, "Hamiltonian neural networks", NeurIPS 2019). The field takes the
derivative itself, by `autograd.grad`, and `seqparc.ode.solve` integrates it: a step of Kutta's 3/8 rule is a cell like any other,
derivative and all, and the network is trained through the solution. The observations are simulated: a frictionless pendulum, and noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from common import COMPILED, EAGER, arguments, progress, save, step_times, table, timed
from rich.console import Console
from torch import Tensor, nn

import seqparc

STEP = 0.1  # seconds from one observation to the next
NOISE = 0.02  # radians, and radians a second
SEGMENT = 20  # steps that are predicted from one observation in training

Field = Callable[[Tensor, Tensor], Tensor]
Solve = Callable[[Field, Tensor, Tensor], Tensor]


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """The true field, for y = (angle, velocity) [..., 2]: a pendulum of which g over l is 1."""
    q, p = y.unbind(-1)
    return torch.stack((p, -torch.sin(q)), -1)


def true_energy(y: Tensor) -> Tensor:
    q, p = y.unbind(-1)
    return p.square() / 2 + 1 - torch.cos(q)


class Hamiltonian(nn.Module):
    """dy/dt = func(t, y) of an energy that is a small network; y [..., 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = y if y.requires_grad else y.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.energy(at).sum(), at, create_graph=True)
        q, p = slope.unbind(-1)
        return torch.stack((p, -q), -1)


def plain_loop(func: Field, y: Tensor, t: Tensor) -> Tensor:
    """Kutta's 3/8 rule, which torchdiffeq calls rk4, as one would write it: [times, ...]."""
    states = [y]
    for now, then in pairwise(t):
        h = then - now
        k1 = func(now, y)
        k2 = func(now + h / 3, y + h * k1 / 3)
        k3 = func(now + 2 * h / 3, y + h * (k2 - k1 / 3))
        k4 = func(then, y + h * (k1 - k2 + k3))
        y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
        states.append(y)
    return torch.stack(states)


def compiled(func: Field, y: Tensor, t: Tensor) -> Tensor:
    return seqparc.ode.solve(func, y, t, method="rk4")  # type: ignore[no-any-return]


def observed(trajectories: int, segments: int, draw: torch.Generator) -> Tensor:
    """Noisy observations [SEGMENT + 1, trajectories * segments, 2]: trajectories cut into segments that follow one another."""
    steps = SEGMENT * segments
    q = 2.2 * (2 * torch.rand(trajectories, generator=draw) - 1)
    y = torch.stack((q, torch.zeros_like(q)), -1).double()
    y = plain_loop(pendulum, y, STEP / 5 * torch.arange(5 * steps + 1, dtype=torch.float64))[::5].float()
    y = y + NOISE * torch.randn(y.shape, generator=draw)
    cut = y.unfold(0, SEGMENT + 1, SEGMENT)  # [segments, trajectories, 2, SEGMENT + 1]
    return cut.permute(3, 0, 1, 2).flatten(1, 2)


class Trainer:
    """One network; all that are made alike see the same observations."""

    def __init__(self, width: int, data: Tensor, solve: Solve, steps: int) -> None:
        torch.manual_seed(0)
        self.func, self.data, self.solve = Hamiltonian(width), data, solve
        self.optimiser = torch.optim.Adam(self.func.parameters(), 0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 0.02, total_steps=steps)
        self.times = STEP * torch.arange(SEGMENT + 1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        def learn() -> float:
            self.optimiser.zero_grad()
            y = self.solve(self.func, self.data[0], self.times)
            loss = (y - self.data).square().mean()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            return loss.item()

        loss, seconds = timed(learn)
        self.losses.append(loss)
        self.seconds.append(seconds)


def draw(t: Tensor, truth: Tensor, found: Tensor, before: Tensor, mine: Trainer, loop: Trainer) -> object:
    """The angle; energy over time; phase space; loss; time a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    angle, drift = top.subplots(1, 2)
    shown = slice(0, min(len(t), 300))
    angle.plot(t[shown], truth[shown, 0], color=EAGER, linewidth=4, label="pendulum")
    angle.plot(t[shown], found[shown, 0], color=COMPILED, linewidth=1.2, label="network")
    angle.set(xlabel="time (s)", ylabel="angle (rad)", title="Predicted from the first moment alone")
    angle.legend(frameon=False, ncols=2, loc="upper right")
    angle.margins(x=0, y=0.25)
    for y, label, colour in ((before, "untrained network", "tab:blue"), (found, "network", COMPILED), (truth, "pendulum", EAGER)):
        energy = true_energy(y)
        drift.semilogy(t[1:], (energy / energy[0] - 1).abs()[1:].clamp(min=1e-8), color=colour, linewidth=1, label=label)
    drift.set(xlabel="time (s)", ylabel="relative change", title="The pendulum's energy along each prediction")
    drift.legend(frameon=False, ncols=3, fontsize="small", loc="lower right")
    drift.margins(x=0)
    drift.grid(alpha=0.3)

    phase, losses, times = bottom.subplots(1, 3)
    q, p = torch.meshgrid(torch.linspace(-3, 3, 121), torch.linspace(-2.2, 2.2, 89), indexing="xy")
    with torch.no_grad():
        learnt = mine.func.energy(torch.stack((q, p), -1))[..., 0]
        learnt = learnt - mine.func.energy(torch.zeros(1, 2))
    levels = [0.1, 0.4, 0.8, 1.2, 1.6]
    phase.contour(q, p, true_energy(torch.stack((q, p), -1)), levels, colors="0.7", linewidths=4)
    phase.contour(q, p, learnt, levels, colors=COMPILED, linewidths=1.2)
    phase.set(xlabel="angle (rad)", ylabel="velocity (rad/s)", title="Lines of equal energy: true, learnt")
    losses.semilogy(range(1, len(mine.losses) + 1), mine.losses, color=COMPILED, linewidth=1, label="compiled")
    losses.semilogy(range(1, len(loop.losses) + 1), loop.losses, "o", color="k", fillstyle="none", label="plain loop")
    losses.axhline(2 * NOISE**2, color=EAGER, linestyle=":", label="noise, at both ends")
    losses.set(xlabel="training step", ylabel="mean square error", title="Loss")
    losses.legend(frameon=False)
    step_times(times, "plain loop", loop.seconds, mine.seconds)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Train both; 0 if the losses agree and training takes the network nearer to the observations than it was."""
    parser = arguments(__doc__, "8 hidden units, few observations, 60 steps")
    parser.add_argument("--steps", type=int, help="training steps of the compiled network; default 300, or 60 with --quick")
    parser.add_argument("--eager-steps", type=int, default=3, help="training steps of the plain loop; default 3")
    args = parser.parse_args(argv)
    width, trajectories, segments, steps, ahead = (8, 4, 2, 60, 100) if args.quick else (32, 8, 5, 300, 1000)
    steps = args.steps or steps
    if not 1 <= args.eager_steps <= steps:
        parser.error("--eager-steps must be at least 1, and no more than --steps")
    console = Console()
    data = observed(trajectories, segments, torch.Generator().manual_seed(1))
    console.print(f"{trajectories} simulated pendulums, {segments * SEGMENT * STEP:g} s each, {data.shape[1]} segments of {SEGMENT} steps.")
    mine, loop = Trainer(width, data, compiled, steps), Trainer(width, data, plain_loop, steps)
    t = STEP * torch.arange(ahead + 1, dtype=torch.float32)
    y0 = torch.tensor([[1.5, 0.0]])
    with torch.no_grad():
        truth = plain_loop(pendulum, y0.double(), t.double())[:, 0]
        before = compiled(mine.func, y0, t)[:, 0]
    for name, trainer, count in (("plain loop", loop, args.eager_steps), ("compiled", mine, steps)):
        with progress(console, name, "loss {task.fields[loss]:.2e}") as bar:
            task = bar.add_task(name, total=count, loss=float("nan"))
            for _ in range(count):
                trainer.step()
                bar.update(task, advance=1, loss=trainer.losses[-1])
    with torch.no_grad():
        found = compiled(mine.func, y0, t)[:, 0]
        again = plain_loop(mine.func, y0, t)[:, 0]
    differ = max(abs(a - b) / a for a, b in zip(loop.losses, mine.losses, strict=False))
    slow, fast = (statistics.median(trainer.seconds) for trainer in (loop, mine))
    drift = {name: (true_energy(y) / true_energy(y[0]) - 1).abs().max().item() for name, y in (("before", before), ("after", found))}
    console.print(table(f"H(q, p) of {width} hidden units, {data.shape[1]} × {SEGMENT} steps", ("", "plain loop", "compiled"), [
        ("time per training step, median (s)", f"{slow:.3g}", f"{fast:.3g}"),
        ("times faster", "", f"{slow / fast:,.1f}"),
        ("training steps", f"{len(loop.losses)}", f"{len(mine.losses)}"),
        (),
        *[(f"loss, step {i + 1}", f"{a:.7f}", f"{b:.7f}") for i, (a, b) in enumerate(zip(loop.losses, mine.losses, strict=False))],
        ("largest relative difference of these", "", f"{differ:.1e}"),
        ("loss at the end", "", f"{mine.losses[-1]:.7f}"),
        ("what noise would leave, at the segment's start and at what is predicted", "", f"{2 * NOISE**2:.7f}"),
        (),
        (f"energy drifts in {ahead * STEP:g} s, untrained", "", f"{drift['before']:.1%}"),
        (f"energy drifts in {ahead * STEP:g} s, trained", "", f"{drift['after']:.1%}"),
        ("largest difference of the two predictions (rad)", "", f"{(found - again).abs().max():.1e}"),
    ]))  # fmt: skip
    save(draw(t, truth, found, before, mine, loop), args.out, "hamiltonian.png", console)  # type: ignore[arg-type]
    return 0 if differ < 1e-4 and mine.losses[-1] < mine.losses[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
