"""A network of spiking neurons tells apart in which order its inputs fire: the plain loop against the compiled cell.

Run `python examples/spiking.py`. Leaky integrate-and-fire neurons, all connected to one another, sum up what comes in, fire once they
are full, and start anew. Firing has no gradient, so training gives it one that it does not have (Neftci, Mostafa and Zenke, "Surrogate
gradient learning in spiking neural networks", IEEE Signal Processing Magazine 36(6), 2019): here by an `autograd.Function` that knows
nothing of seqparc. Values are those of the cell as it is, gradients those of the function, as in the plain loop.

The spike trains are made here: volleys run over 24 channels, upwards, downwards, outwards or inwards, under noise. Every channel fires
as often in each of the four, so that counting tells nothing and only the order does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import COMPILED, arguments, learn, progress, save, step_times, table, timed
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import seqparc

CHANNELS = 24
ORDERS = ("upwards", "downwards", "outwards", "inwards")
VOLLEY = 120  # steps from one volley to the next

Run = Callable[[Tensor], tuple[Any, Any]]


class Spike(torch.autograd.Function):
    """1 where the potential is above the threshold, else 0; its gradient is a triangle, low enough not to grow over thousands of steps."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        return g * 0.3 * (1 - above.abs()).clamp(min=0)


class Neurons(nn.Module):
    """Potential and last spike of each neuron; what has fired starts anew. Out go the spikes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.leak = nn.Parameter(torch.linspace(1, 4, n))  # potentials are down to 1/e in 3 to 55 steps
        self.inputs = nn.Linear(CHANNELS, n)
        self.others = nn.Linear(n, n, bias=False)
        nn.init.normal_(self.inputs.weight, 0.1, 0.3)
        nn.init.normal_(self.others.weight, 0.0, 0.2 / n**0.5)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.leak.new_zeros(batch, self.n), self.leak.new_zeros(batch, self.n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        potential, fired = state
        potential = torch.sigmoid(self.leak) * potential * (1 - fired.detach()) + self.inputs(x) + self.others(fired)
        fired = Spike.apply(potential - 1)
        return fired, (potential, fired)


class Network(nn.Module):
    """Neurons, and a readout of how often each fires: spikes [batch, time, CHANNELS] -> [batch, orders]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.rnn = seqparc.compile(Neurons(n))
        self.readout = nn.Linear(n, len(ORDERS))

    def forward(self, x: Tensor, run: Run | None = None) -> tuple[Tensor, Tensor]:
        spikes, _ = (run or self.rnn)(x)
        return self.readout(10 * spikes.mean(1)), spikes


def trains(count: int, steps: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spike trains [count, steps, CHANNELS] and the order of each [count], as many of each as there can be."""
    order = torch.randperm(count, generator=draw) % len(ORDERS)
    up = torch.arange(CHANNELS)
    out = (2 * up - CHANNELS + 1).abs() - 1  # the middle first
    delay = 3 * torch.stack((up, up.flip(0), out, CHANNELS - 2 - out))[order]  # [count, CHANNELS], in steps
    begin = torch.arange(0, steps, VOLLEY) + torch.randint(0, VOLLEY // 3, (count, -(-steps // VOLLEY)), generator=draw)
    at = begin[:, :, None] + delay[:, None] + torch.randint(-2, 3, (count, begin.shape[1], CHANNELS), generator=draw)
    spikes = (torch.rand(count, steps, CHANNELS, generator=draw) < 0.005).float()
    spikes.scatter_(1, at.clamp(0, steps - 1), 1.0)
    return spikes, order


class Trainer:
    """One network; all that are made alike see the same trains in the same order."""

    def __init__(self, n: int, batch: int, steps: int) -> None:
        torch.manual_seed(0)
        self.network, self.batch, self.steps = Network(n), batch, steps
        slow = list(self.network.rnn.cell.others.parameters())  # neurons that excite one another too soon end up firing all the time
        rest = [p for p in self.network.parameters() if all(p is not q for q in slow)]
        self.optimiser = torch.optim.Adam([{"params": rest, "lr": 5e-3}, {"params": slow, "lr": 3e-4}])
        self.draw = torch.Generator().manual_seed(1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, run: Run | None = None) -> None:
        x, order = trains(self.batch, self.steps, self.draw)
        loss, seconds = timed(lambda: learn(self.optimiser, self.network, lambda: F.cross_entropy(self.network(x, run)[0], order)))
        self.losses.append(loss)
        self.seconds.append(seconds)

    @torch.no_grad()
    def right(self, x: Tensor, order: Tensor) -> float:
        return (self.network(x)[0].argmax(1) == order).float().mean().item()


def draw(mine: Trainer, loop: Trainer) -> object:
    """A train of each order; what the neurons fire; loss; time a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    x, order = trains(len(ORDERS), mine.steps, torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, fired = mine.network(x)
    shown = min(4 * VOLLEY, mine.steps)
    rows = top.subplots(2, len(ORDERS), sharex=True, sharey="row")
    for number, name in enumerate(ORDERS):
        for axes, spikes, colour in zip(rows[:, number], (x, fired), ("k", COMPILED), strict=True):
            time, channel = spikes[order == number][0, :shown].nonzero(as_tuple=True)
            axes.plot(time, channel, "|", color=colour, markersize=3, markeredgewidth=0.8)
        rows[0, number].set_title(name)
        rows[1, number].set_xlabel("time (steps)")
    rows[0, 0].set_ylabel("input channel")
    rows[1, 0].set_ylabel("neuron, after training")
    top.suptitle(f"Spikes of one train of each order (synthetic), the first {shown} of {mine.steps:,} steps")

    losses, times = bottom.subplots(1, 2, width_ratios=(2, 1))
    losses.plot(range(1, len(mine.losses) + 1), mine.losses, color=COMPILED, linewidth=1, label="compiled")
    losses.plot(range(1, len(loop.losses) + 1), loop.losses, "o", color="k", markersize=6, fillstyle="none", label="plain loop")
    losses.set(xlabel="training step", ylabel="loss (nats)", title="Loss on the batch", ylim=(0, 1.1 * max(mine.losses)))
    losses.legend(frameon=False)
    step_times(times, "plain loop", loop.seconds, mine.seconds)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Train both; 0 if the losses agree, and the compiled network knows held-out trains better than by guessing."""
    parser = arguments(__doc__, "24 neurons and 300 steps")
    parser.add_argument("--steps", type=int, help="training steps of the compiled network; default 120, or 30 with --quick")
    parser.add_argument("--eager-steps", type=int, default=3, help="training steps of the plain loop; default 3")
    args = parser.parse_args(argv)
    neurons, length, steps = (24, 300, 30) if args.quick else (64, 2000, 120)
    steps = args.steps or steps
    if not 1 <= args.eager_steps <= steps:
        parser.error("--eager-steps must be at least 1, and no more than --steps")
    console = Console()
    mine, loop = (Trainer(neurons, 16, length) for _ in range(2))
    console.print(f"{neurons} neurons, {CHANNELS} channels of synthetic spikes, {length:,} steps, 16 trains a batch.")
    held_out = trains(100, length, torch.Generator().manual_seed(2))
    before = mine.right(*held_out)
    for name, trainer, count in (("plain loop", loop, args.eager_steps), ("compiled", mine, steps)):
        with progress(console, name, "loss {task.fields[loss]:.4f}") as bar:
            task = bar.add_task(name, total=count, loss=float("nan"))
            for _ in range(count):
                trainer.step(trainer.network.rnn.sequential if trainer is loop else None)
                bar.update(task, advance=1, loss=trainer.losses[-1])
    after, rnn = mine.right(*held_out), mine.network.rnn
    differ = max(abs(a - b) for a, b in zip(loop.losses, mine.losses, strict=False))
    slow, fast = (statistics.median(t.seconds) for t in (loop, mine))
    console.print(table(f"{neurons} spiking neurons, 16 × {length:,} steps", ("", "plain loop", "compiled"), [
        ("time per training step, median (s)", f"{slow:.3g}", f"{fast:.3g}"),
        ("times faster", "", f"{slow / fast:,.0f}"),
        ("training steps", f"{len(loop.losses)}", f"{len(mine.losses)}"),
        (),
        *[(f"loss, step {i + 1}", f"{a:.6f}", f"{b:.6f}") for i, (a, b) in enumerate(zip(loop.losses, mine.losses, strict=False))],
        ("largest difference of these", "", f"{differ:.1e}"),
        (),
        ("held-out right, before", "", f"{before:.0%}"),
        ("held-out right, after", "", f"{after:.0%}"),
        (),
        ("chunks, passes", "", f"{rnn.stats.chunks}, {rnn.stats.passes}"),
    ]))  # fmt: skip
    console.print(f"forward {rnn.stats.verdict}")
    save(draw(mine, loop), Path(args.out), "spiking.png", console)  # type: ignore[arg-type]
    return 0 if differ < 1e-4 and after > 1 / len(ORDERS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
