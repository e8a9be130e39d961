"""A compressor for audio finds the settings another one was used with, from what went in and what came out.

Run `python examples/compressor.py`. A compressor turns loud passages down. Its detector follows the size of the signal, quickly while it
rises (attack) and slowly while it falls (release), which makes it a recurrence that cannot be written as one filter: 441,000 steps for
ten seconds of audio. Here the output is known and the settings are not; gradient descent on five numbers finds them. The audio is
synthesised: struck notes of changing loudness.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import COMPILED, EAGER, arguments, progress, save, table, timed
from rich.console import Console
from torch import Tensor, nn

import seqparc

RATE = 44_100  # samples a second
KNEE = 6.0  # dB over which the compressor sets in
RATE_OF_SEARCH = 0.2

#: What is found: its unit, what the target was made with, and where the search starts.
SETTINGS = {
    "attack": ("ms", 8.0, 25.0),
    "release": ("ms", 180.0, 60.0),
    "threshold": ("dB", -26.0, -15.0),
    "ratio": ("", 5.0, 2.0),
    "make-up": ("dB", 6.0, 0.0),
}


class Compressor(nn.Module):
    """One sample of audio and the detector's level go in, the compressed sample and the new level come out."""

    def __init__(self, attack: float, release: float, threshold: float, ratio: float, makeup: float) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.tensor([attack, release]).log())  # of milliseconds
        self.decibels = nn.Parameter(torch.tensor([threshold, makeup]) / 10)
        self.ratio = nn.Parameter(torch.tensor(ratio - 1).log())  # above 1, whatever the parameter

    def settings(self) -> list[float]:
        """As SETTINGS has them."""
        threshold, makeup = (10 * self.decibels).tolist()
        return [*self.times.exp().tolist(), threshold, 1 + self.ratio.exp().item(), makeup]

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        attack, release = torch.exp(-1000 / RATE / self.times.exp())  # what is left of the level after one sample
        size = x.abs()
        keep = torch.where(size > level, attack, release)
        level = keep * level + (1 - keep) * size
        threshold, makeup = 10 * self.decibels
        over = 20 * torch.log10(level + 1e-5) - threshold
        over = torch.where(over > KNEE / 2, over, (over + KNEE / 2).clamp(min=0) ** 2 / (2 * KNEE))
        gain = makeup - over * (1 - 1 / (1 + self.ratio.exp()))  # dB
        return x * 10 ** (gain / 20), level


def notes(seconds: float) -> Tensor:
    """Synthesised audio, [1, samples, 1]: a struck note every eighth of a second, loud and soft, that dies away."""
    draw = torch.Generator().manual_seed(4)
    audio = torch.zeros(int(seconds * RATE))
    for begin in range(0, len(audio), RATE // 8):
        time = torch.arange(min(RATE, len(audio) - begin)) / RATE
        pitch = 110 * 2 ** (float(torch.randint(0, 25, (), generator=draw)) / 12)
        loud = 10 ** (-1.5 * float(torch.rand((), generator=draw)))
        for k in range(1, 6):
            audio[begin : begin + RATE] += loud / k * torch.sin(2 * math.pi * k * pitch * time) * torch.exp(-(3 + 2 * k) * time)
    return (0.9 * audio / audio.abs().max())[None, :, None]


@dataclass
class Search:
    """The settings and the loss after each step, and what a step took."""

    settings: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # dB
    forward: list[float] = field(default_factory=list)  # seconds
    seconds: list[float] = field(default_factory=list)


def loudness(audio: Tensor) -> Tensor:
    """In dB, sample by sample; what is very soft counts as silence."""
    return 20 * torch.log10(audio.abs() + 1e-3)


def search(rnn: seqparc.CompiledRNN, audio: Tensor, target: Tensor, steps: int, console: Console) -> Search:
    """Adam on the difference in loudness between what comes out and the target, so that soft passages count as loud ones do."""
    optimiser = torch.optim.Adam(rnn.parameters(), RATE_OF_SEARCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE_OF_SEARCH, total_steps=steps, pct_start=0.2)
    found = Search([rnn.cell.settings()])
    wanted = loudness(target)

    def learn() -> float:
        optimiser.zero_grad()
        (out, _), seconds = timed(lambda: rnn(audio))
        found.forward.append(seconds)
        loss = (loudness(out) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        schedule.step()
        return loss.item()

    with progress(console, "searching", "difference {task.fields[loss]:.4f} dB") as bar:
        task = bar.add_task("searching", total=steps, loss=0.0)
        for _ in range(steps):
            loss, seconds = timed(learn)
            found.losses.append(loss**0.5)
            found.seconds.append(seconds)
            found.settings.append(rnn.cell.settings())
            bar.update(task, advance=1, loss=found.losses[-1])
    return found


def draw(audio: Tensor, target: Tensor, gains: dict[str, Tensor], found: Search, speeds: dict[str, float]) -> object:
    """Input and target; gains; the settings on their way; how much faster than real time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    sound, gain = top.subplots(2, 1, sharex=True)
    shown = slice(0, min(3 * RATE, audio.shape[1]))
    time = torch.arange(audio.shape[1])[shown] / RATE
    sound.plot(time, audio[0, shown, 0], color="0.6", linewidth=0.4, label="input (synthesised)")
    sound.plot(time, target[0, shown, 0], color="tab:blue", linewidth=0.4, label="target")
    sound.set(ylabel="amplitude", title="Input, and what the other compressor made of it")
    for line in sound.legend(frameon=False, ncols=2, loc="upper right").get_lines():
        line.set_linewidth(3)
    sound.margins(x=0, y=0.25)
    for (name, g), style in zip(gains.items(), ("0.6", "tab:blue", COMPILED), strict=True):
        gain.plot(time, g[shown], color=style, linewidth=3 if name == "target" else 1.2, label=name, alpha=0.5 if name == "target" else 1)
    gain.set(xlabel="time (s)", ylabel="gain (dB)")
    gain.margins(x=0)
    gain.legend(frameon=False, ncols=3, loc="lower right")

    path, speed = bottom.subplots(1, 2, width_ratios=(1.6, 1))
    for number, (name, (unit, true, _)) in enumerate(SETTINGS.items()):
        values = torch.tensor([s[number] for s in found.settings])
        said = f"{name}: {true:g} {unit}".strip() + f", found {values[-1]:.2f}"
        path.plot(values - true if unit == "dB" else 20 * torch.log10(values / true), label=said)
    path.axhline(0, color="0.6", linestyle=":")
    path.set(xlabel="step of the search", ylabel="from the true setting (dB)", title="Settings (times and ratio: 20 log of the quotient)")
    path.legend(frameon=False, fontsize="small")
    bars = speed.bar(list(speeds), list(speeds.values()), color=[EAGER, COMPILED] * 2, width=0.6)
    speed.bar_label(bars, labels=[f"{s:.3g}" for s in speeds.values()], padding=3)
    speed.axhline(1, color="0.6", linestyle=":")
    speed.set(yscale="log", ylabel="seconds of audio per second", title="Against real time (dotted)")
    speed.tick_params(axis="x", labelsize="small")
    speed.set_ylim(min(speeds.values()) / 4, max(speeds.values()) * 3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Search; 0 if the plain loop's output is the compiled one's and every setting is found, to a tenth of what was away."""
    parser = arguments(__doc__, "half a second of audio")
    parser.add_argument("--steps", type=int, help="steps of the search; default 250, or 100 with --quick")
    args = parser.parse_args(argv)
    seconds, looped, steps = (0.5, 0.02, 100) if args.quick else (10.0, 1.0, 250)
    steps = args.steps or steps
    console = Console()
    audio = notes(seconds)
    true, start = ([values[k] for values in SETTINGS.values()] for k in (1, 2))
    silence = torch.zeros(1)
    other, rnn = (seqparc.compile(Compressor(*settings), state=silence) for settings in (true, start))
    with torch.no_grad():
        target, before = other(audio)[0], rnn(audio)[0]
    console.print(f"{seconds:g} s of synthesised audio: {audio.shape[1]:,} steps. The plain loop is timed on the first {looped:g} s of it.")

    part = audio[:, : int(looped * RATE)]
    with console.status("the plain loop …"):
        (slow, _), loop_forward = timed(lambda: rnn.sequential(part))
        _, loop_backward = timed(slow.square().mean().backward)
    loop = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    fast, _ = rnn(part)
    fast.square().mean().backward()
    differ = (fast - slow).abs().max().item()
    pairs = list(zip(rnn.parameters(), loop, strict=True))
    differ_gradients = max((p.grad - g).norm().item() for p, g in pairs) / max(g.norm().item() for g in loop)

    found = search(rnn, audio, target, steps, console)
    forward, whole = statistics.median(found.forward), statistics.median(found.seconds)
    speeds = {
        "plain loop\nforward": looped / loop_forward, "compiled\nforward": seconds / forward,
        "plain loop\nwith gradients": looped / (loop_forward + loop_backward), "compiled\nwith gradients": seconds / whole,
    }  # fmt: skip
    away = [abs(f - t) / abs(s - t) for f, t, s in zip(found.settings[-1], true, start, strict=True)]
    rows = [
        (f"{name} ({unit})" if unit else name, f"{t:g}", f"{s:g}", f"{f:.3f}")
        for (name, (unit, t, s)), f in zip(SETTINGS.items(), found.settings[-1], strict=True)
    ]
    console.print(table("settings", ("", "true", "start", "found"), rows))
    a, b, c, d = speeds.values()
    console.print(table("plain loop against compiled", ("", "plain loop", "compiled", "faster"), [
        ("audio per second, forward (s)", f"{a:.3g}", f"{b:.3g}", f"{b / a:,.0f}x"),
        ("audio per second, step of the search (s)", f"{c:.3g}", f"{d:.3g}", f"{d / c:,.0f}x"),
        ("largest difference of the output", "", f"{differ:.1e}", ""),
        ("largest difference of a gradient, relative", "", f"{differ_gradients:.1e}", ""),
        ("chunks, passes", "", f"{rnn.stats.chunks}, {rnn.stats.passes}", ""),
        ("loudness from the target, start (dB)", "", f"{found.losses[0]:.2f}", ""),
        ("loudness from the target, end (dB)", "", f"{found.losses[-1]:.1e}", ""),
    ]))  # fmt: skip
    with torch.no_grad():
        outputs = {"target": target, "at the start": before, "found": rnn(audio)[0]}
    heard = audio[0, :, 0].abs() > 1e-4  # where nothing sounds, a gain cannot be read off
    gains = {n: torch.where(heard, 20 * torch.log10(y[0, :, 0].abs() / audio[0, :, 0].abs()), torch.nan) for n, y in outputs.items()}
    save(draw(audio, target, gains, found, speeds), Path(args.out), "compressor.png", console)  # type: ignore[arg-type]
    return 0 if differ < 1e-5 and max(away) < 0.1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
