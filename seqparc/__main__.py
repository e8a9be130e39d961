"""The same from a shell: `python -m seqparc explain module:Cell --input 2,64,6`."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from seqparc import store
from seqparc.bench import bench as measure
from seqparc.doctor import examine
from seqparc.errors import SeqparcError
from seqparc.picture import SUFFIXES
from seqparc.runtime.engine import Engine
from seqparc.targets import inputs, load
from seqparc.tree import flatten

ABOUT = "Any recurrent cell written in plain PyTorch, run in parallel over time, with the answers of the plain loop."
STATUS = "exit status: 0 all well, 1 something is not right, 2 it cannot be done or was asked for wrongly"


def show(made: Any) -> None:
    """With colours on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty():
        Console(markup=False, emoji=False).print(made if hasattr(made, "__rich__") else made.table())
    else:
        print(made)


def call(rnn: Any, x: Any) -> None:
    """Call a cell, with backward where there is one: each makes its kernel when it is needed."""
    y, last = rnn(x)
    results = [t.sum() for t in (*flatten(y)[0], *flatten(last)[0]) if t.requires_grad]
    if results:
        torch.stack(results).sum().backward()


def explain(args: argparse.Namespace) -> int:
    for path in filter(None, (args.plot, args.html)):  # before anything that takes time
        if not path.parent.is_dir():
            raise SeqparcError(f"there is no folder {path.parent} to write {path.name} in")
    if args.plot and args.plot.suffix.lower() not in SUFFIXES:
        raise SeqparcError(f"--plot {args.plot} should end in {' or '.join(SUFFIXES)}")
    rnn = load(args.target)
    x = inputs(args.input, rnn)
    call(rnn, x)
    found = rnn.explain(x)
    if args.plot:
        found.plot(args.plot)
    if args.html:
        args.html.write_text(found.page(), "utf-8")
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    elif args.latex:
        print(found.to_latex())
    else:
        show(found)
    return 0


def validate(args: argparse.Namespace) -> int:
    rnn = load(args.target)
    report = rnn.validate(inputs(args.input, rnn), grad=not args.no_grad)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report)
    return 0 if report.ok else 1


def bench(args: argparse.Namespace) -> int:
    if args.seconds <= 0 or args.runs < 1:
        raise SeqparcError("--seconds must be more than 0 and --runs at least 1")
    found = measure(args.target, args.input, args.seconds, args.runs, not args.no_compile_times)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
    return 0 if found.ok else 1


def emit(args: argparse.Namespace) -> int:
    rnn = load(args.target)
    x = inputs(args.input, rnn)
    if args.card:
        return emit_offline(rnn, x, args.card, args.json)
    call(rnn, x)
    kernels = rnn.kernels()
    if args.json:
        print(json.dumps([{"name": rnn.name, "backend": b, "direction": d, "source": s} for (b, d), s in kernels.items()], indent=2))
    else:
        print("\n".join(f"// {rnn.name}, {direction}, {backend} backend\n{source}" for (backend, direction), source in kernels.items()))
    return 0


def emit_offline(rnn: Any, x: Any, card: str, as_json: bool) -> int:
    """The GPU kernels of a cell, compiled for a card that need not be there, and what they use on it."""
    from seqparc.codegen import offline

    rnn = copy.copy(rnn)  # the same cell, with nothing made for it yet
    rnn.options = replace(rnn.options, backend="triton")
    engine = rnn.engine(x)  # makes the plan; kernels are made when they are called
    if not isinstance(engine, Engine):
        raise SeqparcError(f"{rnn.name} is not compiled and has no kernels: {engine}")
    plan, precision = engine.plan, engine.options.precision
    found = [(direction, r) for direction, p in offline.programs(plan).items() for r in offline.inspect(p, plan.dtype, card, precision)]
    if as_json:
        rows = [{**report.as_dict(), "name": rnn.name, "backend": "triton", "direction": d} for d, report in found]
        print(json.dumps(rows, indent=2))
    else:
        shown = ""
        for direction, report in found:
            if report.source != shown:
                print(f"# {rnn.name}, {direction}, triton backend\n{report.source}")
            shown = report.source
            told = (f"{direction} on {report.target}, {report.dtype}, {report.kernel}:", *report.lines())
            print("\n".join(f"# {line}" for line in told), end="\n\n")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine offers, and whether a kernel compiles and runs right on it."""
    found, lacks = examine()
    if args.json:
        print(json.dumps({**found, "missing": [lack._asdict() for lack in lacks]}, indent=2))
    else:
        print("\n".join(f"{k:16} {v}" for k, v in found.items()))
        print("\nmissing:" if lacks else "\nnothing is missing")
        for lack in lacks:
            print(f"  {lack}")
    return 0 if found["c backend"] == "ok" else 1


def cache(args: argparse.Namespace) -> int:
    """How large the cache of compiled kernels is; --clear empties it, of nothing but what seqparc put there."""
    files = store.files()
    about = {"folder": str(store.folder()), "files": len(files), "bytes": sum(f.stat().st_size for f in files)}
    if args.clear:
        for f in files:
            store.drop(f)
        about["cleared"] = True
    print(json.dumps(about, indent=2) if args.json else "\n".join(f"{k:8} {v}" for k, v in about.items()))
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    made = argparse.ArgumentParser(
        prog="seqparc", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n  seqparc doctor\n  seqparc explain cells:make --input 2,1000,6\n  seqparc explain --help\n\n{STATUS}",
    )  # fmt: skip
    commands = made.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, examples: Sequence[str], cell: bool = True
    ) -> argparse.ArgumentParser:
        listed = "\n".join(f"  seqparc {name} {example}".rstrip() for example in examples)
        p = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=f"examples:\n{listed}\n\n{STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        p.set_defaults(run=run)
        p.add_argument("--json", action="store_true", help="print JSON")
        if cell:
            p.add_argument(
                "target", metavar="MODULE:OBJECT",
                help="a cell, a compiled cell, or a class or function that needs no arguments and gives one; modules of this folder too",
            )  # fmt: skip
            p.add_argument(
                "--input", action="append", required=True, metavar="B,T,…",
                help="shape of x, batch and steps first; again for every further leaf. Its numbers are random, always the same",
            )  # fmt: skip
        return p

    told = command(
        "explain", explain, "how a cell was taken apart, what was proved, how it runs, and where a call's time goes",
        ("cells:make --input 2,1000,6", "cells:make --input 2,1000,6 --plot told.svg --html told.html", "cells:make --input 1,9,6 --latex"),
    )  # fmt: skip
    told.add_argument("--plot", type=Path, metavar="FILE", help="write a picture too, .png or .svg; needs matplotlib")
    told.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser too, all in one file")
    told.add_argument("--latex", action="store_true", help="print the state Jacobian in LaTeX (needs amsmath) instead")
    check = command(
        "validate", validate, "values and gradients against the plain loop in float64",
        ("cells:make --input 2,500,6", "cells:make --input 2,500,6 --no-grad --json"),
    )  # fmt: skip
    check.add_argument("--no-grad", action="store_true", help="values only")
    speed = command(
        "bench", bench, "how fast a cell is beside its plain loop, forward and with gradients, and how exact",
        ("cells:make --input 1,4096,64", "cells:make --input 16,1024,64 --seconds 5 --runs 50 --json"),
    )  # fmt: skip
    speed.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each figure, about; 3 runs at least (%(default)s)")
    speed.add_argument("--runs", type=int, default=25, metavar="N", help="runs of each figure at most (%(default)s)")
    speed.add_argument("--no-compile-times", action="store_true", help="do not compile in processes of their own first")
    kernels = command(
        "emit", emit, "the generated kernels of a cell", ("cells:make --input 2,100,6", "cells:make --input 2,100,6 --target sm_90 --json")
    )
    kernels.add_argument(
        "--target", dest="card", metavar="CARD",
        help="GPU kernels, with what they use on a card: sm_80, sm_90 or gfx942; needs Triton, and no GPU",
    )  # fmt: skip
    command("doctor", doctor, "what this machine offers and lacks, and whether a kernel works on it", ("", "--json"), False)
    emptied = command("cache", cache, "the cache of compiled kernels: where it is and how large", ("", "--clear"), False)
    emptied.add_argument("--clear", action="store_true", help="empty it")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 all well, 1 something is not right, 2 it cannot be done."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (SeqparcError, OSError) as error:
        print(f"seqparc: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
