"""The same from a shell: `python -m seqparc explain module:Cell --input 2,64,6`."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import seqparc
from seqparc import store
from seqparc.errors import SeqparcError, ToolchainError
from seqparc.options import ENVIRONMENT, environment
from seqparc.runtime.engine import Engine
from seqparc.runtime.module import CompiledRNN
from seqparc.tree import flatten


def load(target: str) -> CompiledRNN:
    """The compiled cell that `module:object` names: a cell, a compiled cell, or a zero-argument callable that returns one."""
    name, colon, attribute = target.partition(":")
    if not colon or not name or not attribute:
        raise SeqparcError(f"{target!r} is not of the form module:object")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ImportError as error:
        raise SeqparcError(f"the module {name!r} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SeqparcError(f"{name} has no {attribute!r}; it has {', '.join(n for n in dir(found) if not n.startswith('_'))}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            made = found()
        except TypeError as error:
            if isinstance(found, type):
                raise SeqparcError(f"{target} needs arguments ({error}); name a function without any that returns the cell") from error
            made = found  # it wants arguments: a cell of its own
        found = made if isinstance(made, nn.Module) or callable(made) else found
    return found if isinstance(found, CompiledRNN) else seqparc.compile(found)


def inputs(shapes: Sequence[str], rnn: CompiledRNN) -> Any:
    """Random inputs of the given shapes, in the cell's own dtype; several make a tuple."""
    dtype = next((p.dtype for p in rnn.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())
    generator = torch.Generator().manual_seed(0)
    made = []
    for text in shapes:
        try:
            shape = [int(n) for n in text.split(",")]
        except ValueError:
            raise SeqparcError(f"--input {text!r} is not a shape such as 2,64,6") from None
        made.append(torch.randn(shape, generator=generator).to(dtype))
    return made[0] if len(made) == 1 else tuple(made)


def explain(args: argparse.Namespace) -> int:
    rnn = load(args.target)
    x = inputs(args.input, rnn)
    rnn(x)
    found = rnn.explain(x)
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0


def validate(args: argparse.Namespace) -> int:
    rnn = load(args.target)
    report = rnn.validate(inputs(args.input, rnn), grad=not args.no_grad)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


def emit(args: argparse.Namespace) -> int:
    rnn = load(args.target)
    x = inputs(args.input, rnn)
    if args.card:
        return emit_offline(rnn, x, args.card, args.json)
    y, last = rnn(x)
    total = torch.stack([t.sum() for t in (*flatten(y)[0], *flatten(last)[0])]).sum()
    if total.requires_grad:  # the backward kernel is made when it is needed
        total.backward()
    kernels = rnn.kernels()
    if args.json:
        print(json.dumps([{"name": rnn.name, "backend": b, "direction": d, "source": s} for (b, d), s in kernels.items()], indent=2))
    else:
        print("\n".join(f"// {rnn.name}, {direction}, {backend} backend\n{source}" for (backend, direction), source in kernels.items()))
    return 0


def emit_offline(rnn: CompiledRNN, x: Any, card: str, as_json: bool) -> int:
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
    from seqparc.codegen import build

    found: dict[str, Any] = {
        "seqparc": seqparc.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "vectors": torch.backends.cpu.get_cpu_capability(), "cuda": torch.cuda.is_available(),
    }  # fmt: skip
    try:
        command, version = build.compiler()
        found["compiler"] = f"{shlex.join(command)}, {version}"
        rnn = seqparc.compile(lambda x, h: torch.tanh(0.5 * h + x), state=torch.zeros(8), backend="c", name="doctor's cell")
        report = rnn.validate(torch.randn(2, 100, 8))
        found["c backend"] = "ok" if report.ok and report.stats.backend == "c" else f"wrong:\n{report}"
    except ToolchainError as error:
        found["c backend"] = f"not usable: {error}"
    try:
        found["cache"] = str(store.folder())
    except OSError as error:
        found["cache"] = f"not usable: {error}"
    found |= {name: environment(name) or f"unset; {meaning}" for name, (_, meaning) in ENVIRONMENT.items()}
    print(json.dumps(found, indent=2) if args.json else "\n".join(f"{k:16} {v}" for k, v in found.items()))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 all well, 1 something is not right, 2 it cannot be done."""
    parser = argparse.ArgumentParser(prog="seqparc", description=seqparc.__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, cell: bool) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=about, description=about)
        p.set_defaults(run=run)
        p.add_argument("--json", action="store_true", help="print JSON")
        if cell:
            p.add_argument("target", help="module:object: a cell, a compiled cell, or a callable without arguments that returns one")
            p.add_argument("--input", action="append", required=True, metavar="B,T,…", help="shape of x; repeat for several leaves")
        return p

    command("explain", explain, "how a cell was taken apart, what was proved, how it runs", True)
    kernels = command("emit", emit, "the generated kernels of a cell", True)
    kernels.add_argument(
        "--target", dest="card", metavar="CARD",
        help="GPU kernels, with what they use on a card: sm_80, sm_90 or gfx942; needs Triton, and no GPU",
    )  # fmt: skip
    check = command("validate", validate, "values and gradients against the plain loop in float64", True)
    check.add_argument("--no-grad", action="store_true", help="values only")
    command("doctor", doctor, "what this machine offers, and whether a kernel works on it", False)
    command("cache", cache, "the cache of compiled kernels", False).add_argument("--clear", action="store_true", help="empty it")
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except SeqparcError as error:
        print(f"seqparc: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
