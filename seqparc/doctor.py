"""What this machine offers for compiled cells, what it lacks, what that costs, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import warnings
from typing import Any, NamedTuple

import torch

import seqparc
from seqparc import store
from seqparc.codegen import build
from seqparc.errors import SeqparcWarning, ToolchainError
from seqparc.options import ENVIRONMENT, environment

#: The oldest versions that are supported.
TORCH, TRITON = (2, 11), (3, 6)
_OPENMP = """\
int seqparc_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
"""


class Lack(NamedTuple):
    """Something that is not there: what it costs, and what to do."""

    what: str
    cost: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cost}; {self.do}"


def examine() -> tuple[dict[str, Any], list[Lack]]:
    """What was found, by name, and what is lacking. A kernel is compiled and run on the way."""
    found: dict[str, Any] = {
        "seqparc": seqparc.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "vectors": torch.backends.cpu.get_cpu_capability(), "cuda": torch.cuda.is_available(),
        "triton": _version("triton") or "not installed", "matplotlib": _version("matplotlib") or "not installed",
    }  # fmt: skip
    lacks = [*_versions(found["torch"]), *_cores(), *_compiler(found), *_graphics(), *_folder(found)]
    if _version("matplotlib") is None:
        lacks.append(Lack("matplotlib", "no pictures from rnn.explain(x).plot(...)", "pip install 'seqparc[demo]'"))
    found |= {name: environment(name) or f"unset; {meaning}" for name, (_, meaning) in ENVIRONMENT.items()}
    return found, lacks


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"


def older(version: str, least: tuple[int, int]) -> bool:
    """Whether a version is older than another; of one that says no numbers that is not known."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < least


def _versions(version: str) -> list[Lack]:
    lacks = []
    if older(version, TORCH):
        least = ".".join(map(str, TORCH))
        lacks.append(Lack(f"torch {least}", f"{version} is too old, and cells may not trace", f"pip install 'torch>={least}'"))
    triton = _version("triton")
    if triton is not None and older(triton, TRITON):
        least = ".".join(map(str, TRITON))
        lacks.append(Lack(f"triton {least}", f"{triton} is too old for GPU kernels", f"pip install 'triton>={least}'"))
    return lacks


def _cores() -> list[Lack]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1:
        return [Lack("second core", "chunks share one, so only its vectors run side by side", "run where there are more")]
    if torch.get_num_threads() == 1:
        do = f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores}"
        return [Lack("second thread", f"torch is set to one of {cores} cores, and kernels take as many", do)]
    return []


def _compiler(found: dict[str, Any]) -> list[Lack]:
    """The compiler and whether what it makes runs right."""
    try:
        command, version = build.compiler()
        found["compiler"] = f"{shlex.join(command)}, {version}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SeqparcWarning)
            openmp = build.load(_OPENMP, symbols=("seqparc_openmp",)).seqparc_openmp()
        rnn = seqparc.compile(lambda x, h: torch.tanh(0.5 * h + x), state=torch.zeros(8), backend="c", name="doctor's cell")
        report = rnn.validate(torch.randn(2, 100, 8))
    except ToolchainError as error:
        found["c backend"] = f"not usable: {error}"
        cost = "cells on the processor run as torch operations, slower by far"
        return [Lack("C compiler", cost, "install gcc or clang, or name one in CC")]
    found["c backend"] = "ok" if report.ok and report.stats.backend == "c" else f"wrong:\n{report}"
    lacks = []
    if not openmp:
        lacks.append(Lack("OpenMP", f"{command[0]} has none, so kernels run in one thread", "install libgomp (gcc) or libomp (clang)"))
    if found["c backend"] != "ok":
        lacks.append(Lack("right results of the C backend", "the kernel above is wrong", 'use backend="torch" and report what is printed'))
    return lacks


def _graphics() -> list[Lack]:
    lacks = []
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        lacks.append(Lack("CUDA", f"{why}, so cells run on the processor", "with a GPU, install its build of torch and its driver"))
    if _version("triton") is None:
        cost = "GPU tensors run as torch operations, and emit --target has nothing to compile with"
        lacks.append(Lack("Triton", cost, "pip install 'seqparc[gpu]'"))
    return lacks


def _folder(found: dict[str, Any]) -> list[Lack]:
    """The cache, and whether it is kept."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SeqparcWarning)
        try:
            folder = store.folder()
        except OSError as error:
            found["cache"] = f"not usable: {error}"
            return [Lack("place for files", "nothing can be compiled", "make room, or name a folder in SEQPARC_CACHE")]
    found["cache"] = str(folder)
    if folder == store.wanted():
        return []
    why = f" ({said[0].message})" if said else ""
    return [Lack("cache folder", f"{store.wanted()} cannot be used{why}, so every process compiles anew", "name another in SEQPARC_CACHE")]
