"""A look into a compiled cell: what was proved about it, the C that runs it, and what each option makes of a call.

Run `python examples/inspect_kernels.py`. The cell is small, damped pendulums that an input pushes, so that all of it can be read: the
explanation, the structure of its state Jacobian, the inner loops of the generated kernels forward and backward, the same from a shell,
the statistics of a call, and a table of options. Each part can be asked for of any compiled cell.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import statistics
from collections.abc import Sequence

import torch
from common import COMPILED, arguments, progress, save, table, timed
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from torch import Tensor, nn

import seqparc
from seqparc.__main__ import main as shell


class Pendulums(nn.Module):
    """Damped pendulums that the input pushes, one step of simulation; what can be seen of them is how high they hang."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.n = n
        self.stiffness = nn.Parameter(torch.linspace(0.05, 0.4, n))
        self.push = nn.Linear(2, n)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.stiffness.new_zeros(batch, self.n), self.stiffness.new_zeros(batch, self.n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        angle, speed = state
        speed = 0.85 * speed - self.stiffness * torch.sin(angle) + 0.05 * self.push(x)
        angle = angle + speed
        return torch.cos(angle), (angle, speed)


#: What the table compares. Chunks and warm-up are chosen by seqparc unless they are given.
OPTIONS: dict[str, dict[str, object]] = {
    "auto": {},
    "sequential": {"strategy": "sequential"},
    "16 chunks, warmed up": {"strategy": "shooting", "chunks": 16},
    "16 chunks from zero": {"strategy": "shooting", "chunks": 16, "warmup": 0, "update": "none"},
    "64 chunks from zero": {"strategy": "shooting", "chunks": 64, "warmup": 0, "update": "none"},
    "64 chunks, diagonal Jacobian": {"strategy": "shooting", "chunks": 64, "warmup": 0, "update": "diagonal"},
    "64 chunks, whole Jacobian": {"strategy": "shooting", "chunks": 64, "warmup": 0, "update": "exact"},
    "newton (DEER)": {"strategy": "newton"},
    "what is costly stored": {"save": "store"},
    "torch backend": {"backend": "torch", "strategy": "shooting", "chunks": 16},
}

QUICK = ("auto", "sequential", "16 chunks, warmed up", "64 chunks, whole Jacobian")

#: What to look for in an inner loop, in the order in which it is there.
WALK = {
    "LOAD_SIDE(x": "a number of every lane is read: forward what the prelude made of the input; backward a state that forward kept, and "
    "gradients that come in",
    "p[0]": "parameters are weights of the loop (p), each loaded once, before it: here one stiffness a lane",
    "sp_sin(": "vector mathematics, inlined: no call, no table",
    "n0[0]": "the new state (n) is not the state (s) until the step is over",
    "STORE_SIDE(y": "what somebody needs is written: forward every state, which the readout and the gradient start from; backward the "
    "gradient of what the prelude gave, which autograd takes further to the weights of the inputs",
    "c0[0][u] +=": "the gradient of the stiffness is summed up on the way, in double over longer stretches",
    "KEEP(": "lanes whose chunk is shorter are done, and add nothing",
    "s0[0][u] =": "the step is over: the new state becomes the state",
}  # fmt: skip


def pendulums() -> seqparc.CompiledRNN:
    """What `python -m seqparc` is told to look at."""
    torch.manual_seed(0)
    return seqparc.compile(Pendulums())


def inner_loop(source: str) -> str:
    """The loop over steps of a C kernel; all around it is the same for every cell."""
    lines = source.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.lstrip().startswith("for (int64_t k = ") and "seqparc" not in line)
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    end = next(i for i in range(begin + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
    return "\n".join(line[indent:] for line in lines[begin : end + 1])


def compared(x: Tensor, names: Sequence[str], repeats: int, console: Console) -> dict[str, tuple[seqparc.Stats, float, float, float]]:
    """Of these of OPTIONS: statistics, seconds forward and with gradients, and the largest difference from the loop in float64."""
    torch.manual_seed(0)
    exact = seqparc.compile(Pendulums().double()).sequential(x.double())[0]
    found = {}
    with progress(console, "options", "{task.fields[name]}") as bar:
        task = bar.add_task("options", total=len(names), name="")
        for name in names:
            torch.manual_seed(0)
            rnn = seqparc.compile(Pendulums(), options=OPTIONS[name])
            forward, both = [], []
            for _ in range(repeats + 1):  # the first compiles
                (y, _), seconds = timed(lambda rnn=rnn: rnn(x))
                _, backward = timed(y.square().sum().backward)
                forward.append(seconds)
                both.append(seconds + backward)
            differ = (y - exact).abs().max().item()
            found[name] = rnn.stats, statistics.median(forward[1:]), statistics.median(both[1:]), differ
            bar.update(task, advance=1, name=name)
    return found


def draw(pattern: Tensor, y: Tensor, found: dict[str, tuple[seqparc.Stats, float, float, float]]) -> object:
    """The Jacobian's pattern; some of the outputs; gap after each pass; time of each option."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 8), layout="constrained")
    (spy, shown), (gaps, times) = figure.subplots(2, 2)
    spy.spy(pattern, color="tab:blue", markersize=9)
    spy.set(xlabel="state number (angles, then speeds)", ylabel="next state number", title="Where the state Jacobian may be non-zero")
    spy.xaxis.set_ticks_position("bottom")
    for lane in (0, 3, 7):
        shown.plot(y[0, :200, lane].detach(), label=f"pendulum {lane}", linewidth=1.2)
    shown.set(xlabel="time (steps)", ylabel="cos(angle)", title="Outputs of the cell")
    shown.legend(frameon=False, ncols=3, fontsize="small", loc="upper center")
    shown.margins(x=0, y=0.2)

    floor = torch.finfo(torch.float32).eps / 4  # a gap of zero has to be drawn somewhere
    for name, (stats, *_) in found.items():
        if stats.gaps and "torch" not in name and name not in ("auto", "what is costly stored"):
            gaps.semilogy(range(1, len(stats.gaps) + 1), [max(g, floor) for g in stats.gaps], "o-", label=name, markersize=5, alpha=0.8)
    gaps.set(xlabel="pass", ylabel="gap (relative, cut at 3e-8)", title="Gap after each pass, forward")
    gaps.xaxis.set_major_locator(MaxNLocator(integer=True))
    gaps.legend(fontsize="small")
    gaps.grid(alpha=0.3)
    at = range(len(found))
    times.barh([i + 0.2 for i in at], [1000 * f for _, f, _, _ in found.values()], 0.38, color=COMPILED, label="forward")
    times.barh([i - 0.2 for i in at], [1000 * b for _, _, b, _ in found.values()], 0.38, color="tab:blue", label="with gradients")
    times.set(yticks=list(at), yticklabels=list(found), xscale="log", xlabel="time per call (ms)", title="Options compared")
    times.invert_yaxis()
    times.legend(frameon=False, fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Look; 0 if every option gives the plain loop's outputs."""
    parser = arguments(__doc__, "400 steps, fewer options")
    args = parser.parse_args(argv)
    steps, repeats, names = (400, 1, QUICK) if args.quick else (20_000, 9, tuple(OPTIONS))
    console = Console()
    rnn = pendulums()
    x = torch.randn(1, steps, 2)

    console.rule("the cell")
    console.print(Syntax(inspect.getsource(Pendulums.forward), "python", dedent=True, background_color="default"))
    console.rule("one call, forward and backward")
    y, (angle, speed) = rnn(x)
    y.square().sum().backward()
    console.print(f"x {list(x.shape)} -> y {list(y.shape)}, and the last state: angle {list(angle.shape)}, speed {list(speed.shape)}")

    console.rule("rnn.explain(x)")
    told = rnn.explain(x)
    print(told)
    console.rule("its structure, as data")
    true = f"{told.pattern.sum()} of {told.pattern.size} are true"
    console.print(f"told.pattern: bools of shape {told.pattern.shape}; {true}, as a pendulum depends on no other")
    for name, entry in told.entries:
        console.print(f"told.entries: {name} = {entry}", highlight=False)

    console.rule("rnn.kernels()")
    kernels = rnn.kernels()
    for (backend, direction), source in kernels.items():
        loop = inner_loop(source)
        counts = f"{len(source.splitlines())} lines, of which these {len(loop.splitlines())} are a step"
        console.print(f"\n{direction}, backend {backend}: {counts}")
        console.print(Syntax(loop, "c", background_color="default", word_wrap=True))
        for mark, meaning in WALK.items():
            if mark in loop:
                console.print(f"  [bold]{escape(mark)}[/bold] … {meaning}", highlight=False)

    console.rule("the same from a shell")
    command = ["emit", "inspect_kernels:pendulums", "--input", f"1,{steps},2", "--json"]
    console.print("$ python -m seqparc " + " ".join(command), highlight=False)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = shell(command)
    emitted = json.loads(printed.getvalue())
    for kernel in emitted:
        console.print(f"{kernel['name']}, {kernel['direction']}, {kernel['backend']}: {len(kernel['source']):,} characters of C")

    console.rule("rnn.stats")
    s = rnn.stats
    console.print(f"{s.verdict}; gap {s.gap:.1e}; backward {s.backward.verdict}", highlight=False)
    console.rule("options")
    found = compared(x, names, repeats, console)
    rows = [
        (
            name, f"{s.chunks:,}", f"{s.warmup}", s.update, f"{s.passes}", f"{s.gap:.1e}", "yes" if s.converged else "no",
            *[f"{1000 * t:.3g}" for t in seconds], f"{d:.1e}",
        )
        for name, (s, *seconds, d) in found.items()
    ]
    heads = ("options", "chunks", "warm-up", "update", "passes", "gap", "converged", "forward (ms)", "with gradients (ms)", "error")
    caption = "error: the largest difference from the loop in float64; what did not converge was finished by the sequential kernel"
    console.print(table(f"{steps:,} steps of 8 pendulums", heads, rows, caption))
    save(draw(told.pattern, y, found), args.out, "inspect_kernels.png", console)  # type: ignore[arg-type]
    return 0 if status == 0 and max(d for *_, d in found.values()) < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
