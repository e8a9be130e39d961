"""Compile C and keep what was compiled.

An object is found again by its key, a digest of everything that decides its machine code. Files are written beside their
place and moved there, under a lock; an object is loaded only from a private folder and only if its own digest matches.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from seqparc import store
from seqparc.errors import SeqparcWarning, ToolchainError
from seqparc.options import environment

FLAGS = (
    "-std=gnu11", "-O2", "-march=native", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fno-semantic-interposition", "-w",
    # A third of the compile time of straight-line code, which has nothing for these to find: kernels are as fast without.
    "-fno-gcse", "-fno-tree-pre", "--param=sccvn-max-alias-queries-per-access=20",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """Everything that decides an object's machine code."""

    source: str  # the text itself, vector header included
    compiler: str  # path and version line: another compiler makes other code
    flags: tuple[str, ...]
    machine: str  # -march=native means this processor

    def digest(self) -> str:
        h = hashlib.sha256()
        for part in astuple(self):
            h.update(repr(part).encode() + b"\0")
        return h.hexdigest()


def load(source: str, parts: tuple[int, ...] = (1,)) -> tuple[ctypes.CDLL, Path]:
    """The compiled library of a source, from the cache if it is there, and where its source lies. `parts` are compiled side by side."""
    command, version = compiler()
    key = Key(source, f"{command} {version}", FLAGS, _machine()).digest()
    folder = store.folder()
    path = folder / f"{key}.so"
    if not _intact(path):
        import filelock  # a tenth of a second, and a warm start does without it

        with filelock.FileLock(str(folder / f"{key}.lock")):
            if not _intact(path):
                _compile(command, source, parts, path)
    try:
        return ctypes.CDLL(str(path)), path.with_suffix(".c")
    except OSError as error:
        raise ToolchainError(f"the compiled kernel {path} cannot be loaded: {error}. Delete it and try again.") from error


def _intact(path: Path) -> bool:
    """Whether an object is there whole: its digest stands beside it."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _compile(compiler: str, source: str, parts: tuple[int, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
        text, made = Path(work, "kernel.c"), Path(work, "kernel.so")
        text.write_text(source)
        command, done = _build(compiler, FLAGS, text, parts, made)
        if done.returncode and "omp" in done.stderr:  # clang without its OpenMP library
            command, done = _build(compiler, tuple(f for f in FLAGS if f != "-fopenmp"), text, parts, made)
            if not done.returncode:
                warnings.warn(f"{compiler} has no OpenMP library, so kernels run in one thread", SeqparcWarning, stacklevel=2)
        if done.returncode or not made.exists():
            raise ToolchainError(
                f"the C compiler failed with status {done.returncode}:\n{' '.join(command)}\n{done.stderr.strip()}", command, done.stderr
            )
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        Path(work, "kernel.sha256").write_text(digest)
        os.replace(text, path.with_suffix(".c"))
        os.replace(made, path)
        os.replace(Path(work, "kernel.sha256"), path.with_suffix(".sha256"))  # last: it says the object is whole


Ran = tuple[tuple[str, ...], subprocess.CompletedProcess[str]]


def _build(compiler: str, flags: tuple[str, ...], text: Path, parts: tuple[int, ...], made: Path) -> Ran:
    """The command that failed or was the last, and how it went."""
    if len(parts) == 1:
        return _run((compiler, *flags, str(text), "-o", str(made), "-lm"))
    objects = [str(made.with_suffix(f".{part}.o")) for part in parts]
    commands = [(compiler, *flags, "-c", f"-DPART={part}", str(text), "-o", o) for part, o in zip(parts, objects, strict=True)]
    with ThreadPoolExecutor(len(parts)) as pool:
        ran = list(pool.map(_run, commands))
    failed = [r for r in ran if r[1].returncode]
    return failed[0] if failed else _run((compiler, *flags, *objects, "-o", str(made), "-lm"))


def _run(command: tuple[str, ...]) -> Ran:
    try:
        return command, subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"the C compiler {command[0]} cannot be run: {error}", command) from error


@functools.cache
def _find(name: str, search: str) -> tuple[str, str]:
    del search  # part of the key only: another PATH may find another compiler
    found = shutil.which(name)
    if found is None:
        raise ToolchainError(f"no C compiler named {name!r} is on the PATH")
    about = os.stat(os.path.realpath(found))

    def ask() -> str:
        try:
            return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
        except OSError as error:
            raise ToolchainError(f"the C compiler {found} cannot be run: {error}") from error

    # Asking starts a process; a compiler that is the same file has the same version.
    return found, store.remembered("compiler", f"{os.path.realpath(found)} {about.st_mtime_ns} {about.st_size}", ask)


def compiler() -> tuple[str, str]:
    search = os.environ.get("PATH", "")
    asked = environment("CC")
    if asked:
        return _find(asked, search)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return _find(name, search)
    raise ToolchainError("no C compiler was found (looked for cc, gcc, clang on the PATH). Install one, or name it in CC.")


@functools.cache
def _machine() -> str:
    """The processor as -march=native sees it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"
