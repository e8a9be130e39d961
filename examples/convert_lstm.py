"""A model that is there already, with an nn.LSTM in it and a checkpoint on disk, converted in place by one line.

Run `python examples/convert_lstm.py`. The model marks each symbol of a sequence: an embedding, a bidirectional LSTM of two layers, a
linear readout. Its weights are drawn at random, as nothing here depends on what they are. Shown are what `seqparc.convert` says, that
the checkpoint and its keys stay what they were in both directions, that outputs and gradients are torch's, with sequences of different
lengths packed too, and how long a call takes.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import COMPILED, EAGER, arguments, progress, save, table, timed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqparc

SYMBOLS, MARKS = 40, 7
BATCH = 4


class Marker(nn.Module):
    """Symbols [batch, time] -> scores [batch, time, MARKS]. Nothing in it knows of seqparc."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 16)
        self.lstm = nn.LSTM(16, states, num_layers=2, bidirectional=True, batch_first=True)
        self.readout = nn.Linear(2 * states, MARKS)

    def forward(self, symbols: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.embedding(symbols)
        if lengths is None:
            y, _ = self.lstm(x)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.readout(y)  # type: ignore[no-any-return]


def differences(before: Marker, after: Marker, symbols: Tensor, lengths: Tensor | None) -> tuple[float, float]:
    """The largest difference of an output, and that of a gradient relative to the largest number in it."""
    found = []
    for model in (before, after):
        model.zero_grad()
        scores = model(symbols, lengths)
        scores.square().mean().backward()
        found.append((scores.detach(), [p.grad for p in model.parameters()]))
    (a, g), (b, h) = found
    return (a - b).abs().max().item(), max(((p - q).abs().max() / p.abs().max()).item() for p, q in zip(g, h, strict=True))


def lengths_timed(before: Marker, after: Marker, steps: list[int], console: Console) -> dict[str, list[float]]:
    """Seconds a call of each kind, for sequences of so many steps: medians."""
    kinds: dict[str, tuple[Marker, bool]] = {
        "nn.LSTM, forward": (before, False), "compiled, forward": (after, False),
        "nn.LSTM, with gradients": (before, True), "compiled, with gradients": (after, True),
    }  # fmt: skip

    def call(model: Marker, symbols: Tensor, grad: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(grad):
                scores = model(symbols)
            if grad:
                scores.square().mean().backward()

        return run

    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with progress(console, "timing", "{task.fields[steps]:,} steps") as bar:
        task = bar.add_task("timing", total=len(steps) * len(kinds), steps=0)
        for length in steps:
            symbols = torch.randint(SYMBOLS, (BATCH, length))
            for name, (model, grad) in kinds.items():
                run = call(model, symbols, grad)
                run()  # compiles, or finds pages for its memory
                seconds[name].append(statistics.median(timed(run)[1] for _ in range(5)))
                bar.update(task, advance=1, steps=length)
    return seconds


def draw(steps: list[int], seconds: dict[str, list[float]], before: Tensor, after: Tensor) -> object:
    """Time against length; outputs before and after, and their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    times, scores = figure.subplots(1, 2)
    for name, values in seconds.items():
        colour = COMPILED if name.startswith("compiled") else EAGER
        style = "o--" if "gradients" in name else "o-"
        times.loglog(steps, [1000 * s for s in values], style, color=colour, label=name)
    times.set(xlabel="sequence length (steps)", ylabel="time per call (ms)", title=f"Bidirectional LSTM, two layers, batch {BATCH}")
    times.grid(alpha=0.3)
    times.set_xticks(steps, [f"{s:,}" for s in steps])
    times.minorticks_off()
    times.set_ylim(top=10 * 1000 * max(map(max, seconds.values())))
    times.legend(frameon=False, loc="upper left", ncols=2, fontsize="small")
    shown = slice(0, 200)
    scores.plot(before[0, shown, 0], color=EAGER, linewidth=4, label="before")
    scores.plot(after[0, shown, 0], color=COMPILED, linewidth=1.2, label="after")
    scores.set(xlabel="time (steps)", ylabel="score of the first mark", title="One output before and after conversion")
    scores.margins(x=0, y=0.2)
    scores.legend(frameon=False, ncols=2)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Convert and compare; 0 if outputs, gradients, keys and checkpoints are the same before and after."""
    parser = arguments(__doc__, "8 states, short sequences")
    parser.add_argument("--states", type=int, help="states a layer and direction; default 32, or 8 with --quick")
    args = parser.parse_args(argv)
    states, steps = (8, [64, 256]) if args.quick else (32, [256, 1024, 4096, 16384])
    states = args.states or states
    console = Console()
    torch.manual_seed(0)
    model = Marker(states)
    original = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "marker.pt"
        torch.save(model.state_dict(), checkpoint)

        said = seqparc.convert(model)  # this is all
        console.print("convert:", *said)

        keys = list(model.state_dict()) == list(original.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model.load_state_dict(torch.load(checkpoint))  # saved before, read after
        torch.save(model.state_dict(), checkpoint)
        original.load_state_dict(torch.load(checkpoint))  # and the other way round
    same = all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), model.state_dict().values(), strict=True))
    console.print(f"{type(model.lstm).__name__} is still an nn.LSTM: {isinstance(model.lstm, nn.LSTM)}; its keys are the same: {keys}")

    symbols = torch.randint(SYMBOLS, (BATCH, steps[1]))
    lengths = torch.tensor([steps[1], steps[1] // 3, steps[1] // 2, 5])
    plain, packed = differences(original, model, symbols, None), differences(original, model, symbols, lengths)
    seconds = lengths_timed(original, model, steps, console)

    rows = [(name, *[f"{1000 * s:.3g}" for s in values]) for name, values in seconds.items()]
    faster = [
        (f"times faster, {kind}", *[f"{a / b:.1f}" for a, b in zip(seconds[f"nn.LSTM, {kind}"], seconds[f"compiled, {kind}"], strict=True)])
        for kind in ("forward", "with gradients")
    ]
    heads = ("time per call (ms), steps:", *[f"{s:,}" for s in steps])
    console.print(table(f"LSTM of {states} states, two layers, both directions, batch {BATCH}", heads, [*rows, (), *faster]))
    console.print(table(f"before against after, {steps[1]:,} steps", ("", "outputs", "gradients (relative)"), [
        ("all of one length", *[f"{d:.1e}" for d in plain]),
        (f"packed, of {', '.join(map(str, lengths.tolist()))} steps", *[f"{d:.1e}" for d in packed]),
    ], "largest differences, float32"))  # fmt: skip
    console.print("\n".join(f"layer {n}, {('forwards', 'backwards')[d]}: {s.verdict}" for (n, d), s in model.lstm.stats.items()))
    with torch.no_grad():
        picture = draw(steps, seconds, original(symbols), model(symbols))
    save(picture, args.out, "convert_lstm.png", console)  # type: ignore[arg-type]
    return 0 if keys and same and max(plain[0], packed[0]) < 1e-5 and max(plain[1], packed[1]) < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
