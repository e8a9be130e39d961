"""Sequences of 17,984 steps are told apart by a GRU of five layers: torch's own layer against the same layer converted.

Run `python examples/long_sequences.py`. The size is that of the EigenWorms task on which parallel evaluation of recurrent networks is
often shown (Lim et al., "Parallelizing non-linear sequential models over the sequence length", ICLR 2024): 6 channels, 5 classes, a GRU of
32 states. The data is not: these crawlers are made here, by numbers drawn at random.

A wave runs along six segments, forwards, and now and then backwards for a while. The five kinds differ in nothing but how long runs and
reversals last on average. A few hundred steps show the wave and say little about the kind: it has to be gathered over thousands.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import COMPILED, EAGER, arguments, learn, progress, save, step_times, table, timed
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import seqparc

LENGTH, CHANNELS = 17_984, 6
#: Steps that a run and a reversal last on average. The last three reverse half of the time, and differ in how often they turn alone.
KINDS = {"rover": (480, 80), "retreater": (80, 480), "ditherer": (40, 40), "turner": (160, 160), "drifter": (640, 640)}
HELD_OUT = 50  # sequences

Run = Callable[[Tensor], Tensor]


def wander(count: int, steps: int, memory: int, draw: torch.Generator) -> Tensor:
    """Smooth noise of size 1 that forgets in `memory` steps, [count, steps]."""
    total = F.pad(torch.randn(count, steps + memory - 1, generator=draw).double().cumsum(1), (1, 0))
    return ((total[:, memory:] - total[:, :-memory]) / memory**0.5).float()


def crawlers(count: int, steps: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [count, steps, CHANNELS] and their kinds [count], as many of each as there can be."""
    kind = torch.randperm(count, generator=draw) % len(KINDS)
    mean = torch.tensor(list(KINDS.values()), dtype=torch.float)[kind]  # [count, 2]
    turns = -torch.log(torch.rand(count, steps // 10, generator=draw)) * mean.repeat(1, steps // 20)
    turned = torch.searchsorted(turns.cumsum(1), torch.arange(steps, dtype=torch.float).repeat(count, 1), right=True)
    speed = (1 - 2 * (turned % 2)) * 0.15 * (1 + 0.2 * wander(count, steps, 500, draw))  # radians a step
    phase = speed.cumsum(1) + 2 * torch.pi * torch.rand(count, 1, generator=draw)
    size = 1 + 0.2 * wander(count, steps, 1000, draw)
    wave = size[..., None] * torch.sin(phase[..., None] - 0.8 * torch.arange(CHANNELS))
    return wave + 0.3 * torch.randn(wave.shape, generator=draw), kind


class Classifier(nn.Module):
    """A GRU and, of the mean over time of its last layer, a linear readout: [batch, time, CHANNELS] -> [batch, kinds]."""

    def __init__(self, states: int, layers: int) -> None:
        super().__init__()
        self.gru = nn.GRU(CHANNELS, states, layers, batch_first=True)
        self.readout = nn.Linear(states, len(KINDS))

    def forward(self, x: Tensor, run: Run | None = None) -> Tensor:
        y = run(x) if run else self.gru(x)[0]
        return self.readout(y.mean(1))  # type: ignore[no-any-return]


def plain_loop(gru: nn.GRU) -> Run:
    """The layers of a GRU as a loop over time, as one would write them without a layer."""

    def run(x: Tensor) -> Tensor:
        for layer in range(gru.num_layers):
            weights = [getattr(gru, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            h, states = x.new_zeros(len(x), gru.hidden_size), []
            for x_t in x.unbind(1):
                h = torch.gru_cell(x_t, h, *weights)
                states.append(h)
            x = torch.stack(states, 1)
        return x

    return run


@dataclass
class Training:
    """One model and what its training showed so far; all that are made alike see the same sequences in the same order."""

    model: Classifier
    batch: int
    length: int
    rate: float
    run: Run | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # steps, loss, accuracy

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), self.rate)
        self.draw = torch.Generator().manual_seed(1)

    def step(self) -> None:
        """One batch; the sequences are made before the clock starts."""
        x, kind = crawlers(self.batch, self.length, self.draw)
        loss, seconds = timed(lambda: learn(self.optimiser, self.model, lambda: F.cross_entropy(self.model(x, self.run), kind)))
        self.losses.append(loss)
        self.seconds.append(seconds)

    @torch.no_grad()
    def test(self, x: Tensor, kind: Tensor) -> None:
        said = self.model(x)
        self.held_out.append((len(self.losses), F.cross_entropy(said, kind).item(), (said.argmax(1) == kind).float().mean().item()))


def draw_picture(eager: Training, mine: Training, name: str) -> object:
    """One crawler of each kind; loss; accuracy; time a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    x, kind = crawlers(len(KINDS), mine.length, torch.Generator().manual_seed(3))
    shown = min(1500, mine.length)
    rows = top.subplots(len(KINDS), 1, sharex=True)
    for number, (axes, title) in enumerate(zip(rows, KINDS, strict=True)):
        axes.imshow(x[kind == number][0, :shown].T.numpy(), aspect="auto", cmap="RdBu", vmin=-1.8, vmax=1.8, interpolation="nearest")
        axes.set(ylabel=title, yticks=[])
        axes.yaxis.label.set(rotation=0, ha="right", va="center")
    rows[0].set_title(f"Six segments (rows) of one crawler of each kind: the first {shown:,} of {mine.length:,} steps (synthetic)")
    rows[-1].set_xlabel("time (steps)")

    losses, accuracy, times = bottom.subplots(1, 3, width_ratios=(1.2, 1.2, 0.9))
    steps = range(1, len(mine.losses) + 1)
    losses.plot(steps, mine.losses, color=COMPILED, linewidth=1, label="compiled")
    losses.plot(range(1, len(eager.losses) + 1), eager.losses, "o", color="k", markersize=6, fillstyle="none", label=name)
    losses.set(xlabel="training step", ylabel="loss (nats)", title="Loss on the batch", ylim=(0, 1.1 * max(mine.losses)))
    losses.legend(frameon=False)
    at, _, right = zip(*mine.held_out, strict=True)
    accuracy.plot(at, [100 * r for r in right], "o-", color=COMPILED, markersize=4)
    accuracy.axhline(100 / len(KINDS), color=EAGER, linestyle=":")
    accuracy.annotate("guessing", (0, 100 / len(KINDS)), (2, 3), textcoords="offset points", color="0.4")
    accuracy.set(xlabel="training step", ylabel="right (%)", title=f"{HELD_OUT} held-out sequences", ylim=(0, 104), xlim=(0, None))
    step_times(times, name, eager.seconds, mine.seconds)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Train both; 0 if the losses agree and, in full, the compiled model tells held-out sequences apart better than by guessing."""
    parser = arguments(__doc__, "two layers of 8 states, 600 steps: seconds instead of minutes")
    parser.add_argument("--steps", type=int, help="training steps of the compiled model; default 120, or 6 with --quick")
    parser.add_argument("--eager-steps", type=int, default=3, help="training steps of the eager model; default 3")
    parser.add_argument("--batch", type=int, default=8, help="sequences a batch; default 8")
    parser.add_argument("--plain-loop", action="store_true", help="a loop over time in Python in place of torch's own layer")
    args = parser.parse_args(argv)
    if not 1 <= args.eager_steps <= (args.steps or 6):
        parser.error("--eager-steps must be at least 1, and no more than --steps")
    length, states, layers, steps = (600, 8, 2, 6) if args.quick else (LENGTH, 32, 5, 120)
    steps = args.steps or steps
    console = Console()
    torch.manual_seed(0)
    model = Classifier(states, layers)
    converted = copy.deepcopy(model)
    told = seqparc.convert(converted)
    name = "plain loop" if args.plain_loop else "nn.GRU"
    eager = Training(model, args.batch, length, 5e-3, plain_loop(model.gru) if args.plain_loop else None)
    mine = Training(converted, args.batch, length, 5e-3)
    console.print(f"Synthetic sequences of {length:,} steps, {args.batch} a batch. Converted: {'; '.join(told)}.")

    test = crawlers(HELD_OUT, length, torch.Generator().manual_seed(2))
    with progress(console, name, "loss {task.fields[loss]:.4f}") as bar:
        task = bar.add_task(name, total=args.eager_steps, loss=float("nan"))
        for _ in range(args.eager_steps):
            eager.step()
            bar.update(task, advance=1, loss=eager.losses[-1])
    with progress(console, "compiled", "loss {task.fields[loss]:.4f}, {task.fields[right]:.0%} of held-out right") as bar:
        task = bar.add_task("compiled", total=steps, loss=float("nan"), right=0.0)
        mine.test(*test)
        for number in range(1, steps + 1):
            mine.step()
            if number % 10 == 0 or number == steps:
                mine.test(*test)
            bar.update(task, advance=1, loss=mine.losses[-1], right=mine.held_out[-1][2])

    differ = max(abs(a - b) for a, b in zip(eager.losses, mine.losses, strict=False))
    first, last = mine.held_out[0], mine.held_out[-1]
    slow, fast = (statistics.median(t.seconds) for t in (eager, mine))
    stats = converted.gru.stats[0, 0]
    console.print(table(f"GRU of {layers} layers, {states} states, {args.batch} × {length:,} steps", ("", name, "compiled"), [
        ("time per training step, median (s)", f"{slow:.3g}", f"{fast:.3g}"),
        ("times faster", "", f"{slow / fast:,.0f}"),
        ("first step, compiling included (s)", "", f"{mine.seconds[0]:.3g}"),
        ("training steps", f"{len(eager.losses)}", f"{len(mine.losses)}"),
        (),
        *[(f"loss, step {i + 1}", f"{a:.6f}", f"{b:.6f}") for i, (a, b) in enumerate(zip(eager.losses, mine.losses, strict=False))],
        ("largest difference of these", "", f"{differ:.1e}"),
        (),
        ("held-out loss, before", "", f"{first[1]:.3f}"),
        ("held-out loss, after", "", f"{last[1]:.3f}"),
        ("held-out right, before", "", f"{first[2]:.0%}"),
        ("held-out right, after", "", f"{last[2]:.0%}"),
        (),
        ("first layer: chunks, passes", "", f"{stats.chunks}, {stats.passes}"),
    ]))  # fmt: skip
    save(draw_picture(eager, mine, name), Path(args.out), "long_sequences.png", console)  # type: ignore[arg-type]
    return 0 if differ < 1e-4 and (args.quick or last[2] > 1 / len(KINDS)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
