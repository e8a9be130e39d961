"""A cell no library has learns to predict a recorded electrocardiogram: the plain loop against the compiled cell.

Run `python examples/ecg.py`. It times one training epoch of the plain PyTorch loop, compiles the cell, checks values and gradients
against the loop in float64, trains, prints one table and draws one picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import seqparc

HERE = Path(__file__).parent
RATE = 360  # samples a second
AHEAD = 4  # samples from what is seen to what is predicted: 11 ms
TRAINED = 4 / 5  # of the recording; the rest, its end, is held out
VALIDATED = 6000  # samples; the plain loop in float64 is slow
QUICK = 2000  # samples with --quick
COLD_CHUNK = 50  # steps a chunk where the picture shows how passes converge

Run = Callable[[Tensor], tuple[Any, Any]]


class TiringOscillators(nn.Module):
    """Damped oscillators; the input drives them and opens a gate on their memory, and each forgets the faster the harder it swings."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.logspace(-2, 0, n))  # radians a step: from 0.6 Hz to 57 Hz
        self.hold = nn.Parameter(torch.linspace(4, 1, n))  # the slow ones remember longer
        self.tire = nn.Parameter(0.1 * torch.rand(n))
        self.drive = nn.Linear(2, 3 * n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = state
        push_a, push_b, gate = self.drive(x).chunk(3, -1)
        keep = torch.sigmoid(self.hold + gate - self.tire * (a * a + b * b))  # below 1: the past fades
        c, s = keep * torch.cos(self.turn), keep * torch.sin(self.turn)
        return c * a - s * b + push_a, torch.tanh(s * a + c * b + push_b)


class Predictor(nn.Module):
    """Oscillators and a linear readout: millivolts [time] -> millivolts AHEAD samples later [time]."""

    def __init__(self, units: int) -> None:
        super().__init__()
        start = torch.zeros(units)
        self.rnn = seqparc.compile(TiringOscillators(units), state=(start, start))
        self.readout = nn.Linear(2 + 2 * units, 1)

    def forward(self, ecg: Tensor, run: Run | None = None) -> Tensor:
        x = seen(ecg)
        states, _ = (run or self.rnn)(x)
        return ecg + self.readout(torch.cat((x, *states), -1))[0, :, 0]  # type: ignore[no-any-return]


def seen(ecg: Tensor) -> Tensor:
    """What the cell sees, [1, time, 2]: the signal and its slope, brought to about the same size."""
    return torch.stack((ecg, 10 * torch.diff(ecg, prepend=ecg[:1])), -1)[None]


def load() -> Tensor:
    """The recording in millivolts, [time]; see data/README.md."""
    counts = (HERE / "data" / "ecg.csv").read_text().split()[1:]
    return (torch.tensor([float(c) for c in counts]) - 1024) / 200


@dataclass
class Result:
    """What the table and the picture show. Times in seconds, losses in mV² on the held-out part."""

    ecg: Tensor
    said: Tensor
    stop: int  # the held-out part starts here
    eager: tuple[float, float]  # forward; a whole epoch
    first: float  # the first compiled epoch, compiling included
    epochs: list[tuple[float, float]]
    before: float
    after: float
    stats: seqparc.Stats
    cold: seqparc.Stats

    def persistence(self) -> float:
        """The loss of saying that nothing will change."""
        return float((self.ecg[AHEAD:] - self.ecg[:-AHEAD])[self.stop :].square().mean())

    def compiled(self) -> tuple[float, float]:
        """Forward and a whole epoch, the median of all."""
        return statistics.median(f for f, _ in self.epochs), statistics.median(e for _, e in self.epochs)


class Trainer:
    """One model on one recording."""

    def __init__(self, ecg: Tensor, units: int, epochs: int) -> None:
        self.ecg, self.stop = ecg, int(len(ecg) * TRAINED)
        self.model = Predictor(units)
        self.optimiser = torch.optim.Adam(self.model.parameters(), 0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 0.02, total_steps=epochs + 2)
        self.loss = float("nan")  # of the last epoch, on the trained part

    def epoch(self, run: Run | None = None) -> tuple[float, float]:
        """One pass over the trained part and one step of the optimiser: seconds of forward, and of all of it."""
        begin = time.perf_counter()
        self.optimiser.zero_grad()
        said = self.model(self.ecg[: self.stop - AHEAD], run)
        forward = time.perf_counter() - begin
        loss = (said - self.ecg[AHEAD : self.stop]).square().mean()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.loss = loss.item()
        return forward, time.perf_counter() - begin

    @torch.no_grad()
    def held_out(self) -> tuple[float, Tensor]:
        """The loss on the held-out part, and the prediction everywhere."""
        said = self.model(self.ecg[:-AHEAD])
        return float((said - self.ecg[AHEAD:])[self.stop :].square().mean()), said

    def cold(self) -> seqparc.Stats:
        """Forward and backward in many short chunks that start from zero: how passes find what warming up finds before."""
        chunks = max(2, self.stop // COLD_CHUNK)
        start = torch.zeros_like(self.model.rnn.cell.hold)
        options = seqparc.Options(strategy="shooting", chunks=chunks, warmup=0, update="none")
        rnn = seqparc.compile(self.model.rnn.cell, state=(start, start), options=options)
        states, _ = rnn(seen(self.ecg[: self.stop]))
        torch.cat(states, -1).square().sum().backward()
        return rnn.stats  # type: ignore[no-any-return]


def demo(ecg: Tensor, units: int, epochs: int, console: Console) -> Result | None:
    """Everything but the table and the picture; None if the compiled cell is wrong."""
    trainer = Trainer(ecg, units, epochs)
    model, stop = trainer.model, trainer.stop
    console.print(
        f"{len(ecg):,} samples of an electrocardiogram, {len(ecg) / RATE:.0f} s: the first {stop:,} to train on, the last "
        f"{len(ecg) - stop:,} held out. {units} oscillators predict {AHEAD} samples ({1000 * AHEAD / RATE:.0f} ms) ahead."
    )
    with console.status("one epoch of the plain loop …"):
        eager = trainer.epoch(model.rnn.sequential)
    with console.status("compiling …"):
        first = trainer.epoch()
    with console.status("values and gradients against the plain loop in float64 …"):
        report = model.rnn.validate(seen(ecg[: min(stop, VALIDATED)]))
    print(report)
    if not report.ok:
        return None
    before, _ = trainer.held_out()
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn())
    seconds = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs, loss=trainer.loss)
        for _ in range(epochs):
            seconds.append(trainer.epoch())
            progress.update(task, advance=1, loss=trainer.loss)
    stats = model.rnn.stats
    after, said = trainer.held_out()
    return Result(ecg, said, stop, eager, first[1], seconds, before, after, stats, trainer.cold())


def tabulate(r: Result) -> Table:
    table = Table(title="plain loop against compiled", caption="* mean square error in mV² on the held-out part", caption_justify="left")
    for head in ("", "plain loop", "compiled", "faster"):
        table.add_column(head, justify="right" if head else "left")
    for name, plain, mine in zip(("forward", "whole epoch"), r.eager, r.compiled(), strict=True):
        table.add_row(f"{name} (ms)", f"{1000 * plain:,.0f}", f"{1000 * mine:,.1f}", f"{plain / mine:,.0f}x")
    table.add_row("compiling (s)", "", f"{r.first - r.compiled()[1]:.2f}", "")
    table.add_section()
    backward = r.stats.backward or seqparc.Stats()
    table.add_row("chunks, forward / backward", "", f"{r.stats.chunks} / {backward.chunks}", "")
    table.add_row("passes, forward / backward", "", f"{r.stats.passes} / {backward.passes}", "")
    table.add_row("gap, forward / backward", "", f"{r.stats.gap:.1e} / {backward.gap:.1e}", "")
    table.add_section()
    table.add_row("loss* if nothing changes", f"{r.persistence():.4f}", "", "")
    table.add_row("loss* untrained", "", f"{r.before:.4f}", "")
    table.add_row("loss* trained", "", f"{r.after:.4f}", "")
    return table


def draw(path: Path, r: Result) -> None:
    """Prediction against the signal; gap after each pass; time per epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    signal = top.subplots()
    seconds = (torch.arange(len(r.said)) + AHEAD) / RATE
    show = slice(r.stop, min(r.stop + 3 * RATE, len(r.said)))
    signal.plot(seconds[show], r.ecg[AHEAD:][show], color="0.7", linewidth=4, label="recorded")
    signal.plot(seconds[show], r.ecg[:-AHEAD][show], color="tab:blue", linewidth=1.1, linestyle=":", label="last sample seen")
    signal.plot(seconds[show], r.said[show], color="tab:red", linewidth=1.3, label=f"predicted {1000 * AHEAD / RATE:.0f} ms ahead")
    signal.set(xlabel="time (s)", ylabel="potential (mV)", title="Electrocardiogram, held-out part")
    signal.margins(x=0, y=0.15)
    signal.legend(loc="upper center", ncols=3, frameon=False)

    gaps, times = bottom.subplots(1, 2)
    floor = torch.finfo(torch.float32).eps / 4  # a gap of zero has to be drawn somewhere
    for label, s, style in (("forward", r.cold, "o-"), ("backward", r.cold.backward, "s--")):
        if s is not None and s.gaps:
            gaps.semilogy(range(1, len(s.gaps) + 1), [max(g, floor) for g in s.gaps], style, label=f"{label}, {s.chunks} chunks from zero")
    for label, s, style in (("forward", r.stats, "D"), ("backward", r.stats.backward, "*")):
        if s is not None and s.gaps:
            values = [max(g, floor) for g in s.gaps]
            text = f"{label}, {s.chunks} chunks warmed up (training)"
            gaps.semilogy(range(1, len(values) + 1), values, style, markersize=9, alpha=0.8, label=text)
    gaps.set(xlabel="pass", ylabel="gap (relative, cut at 3e-8)", title="Gap after each pass")
    gaps.xaxis.set_major_locator(MaxNLocator(integer=True))
    gaps.legend(fontsize="small")
    gaps.grid(alpha=0.3)

    labels = ["plain loop\nforward", "compiled\nforward", "plain loop\nepoch", "compiled\nepoch"]
    plain, mine = r.eager, r.compiled()
    bars = times.bar(labels, [1000 * v for v in (plain[0], mine[0], plain[1], mine[1])], color=["0.7", "tab:red"] * 2, width=0.6)
    times.bar_label(bars, labels=[f"{1000 * v:,.0f} ms" for v in (plain[0], mine[0], plain[1], mine[1])], padding=3)
    times.set(yscale="log", ylabel="time (ms)", title=f"Time per epoch: {plain[1] / mine[1]:,.0f} times faster")
    times.margins(y=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the compiled cell is right, and after training better than before and than saying nothing changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="default 80, or 40 with --quick")
    parser.add_argument("--units", type=int, default=24, help="oscillators; default 24")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder the picture goes to; default examples/out")
    parser.add_argument("--quick", action="store_true", help=f"only the last {QUICK:,} samples")
    args = parser.parse_args(argv)
    if args.epochs is not None and args.epochs < 1:
        parser.error("--epochs must be at least 1")
    console = Console()
    torch.manual_seed(0)
    ecg = load()[-QUICK if args.quick else None :]
    result = demo(ecg, args.units, args.epochs or (40 if args.quick else 80), console)
    if result is None:
        console.print("the compiled cell differs from the plain loop: stopping")
        return 1
    console.print(tabulate(result))
    draw(args.out / "ecg.png", result)
    console.print(f"picture: {args.out / 'ecg.png'}")
    return 0 if result.after < min(result.before, result.persistence()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
