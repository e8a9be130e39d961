"""Compile C and keep what was compiled.

An object is found again by its key, a digest of everything that decides its machine code. It is compiled in a folder of its own under
a lock, and files are written beside their place and moved there; it is loaded only from a private folder and only if its own digest
matches. What has no room in the cache is kept for this process.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from seqparc import store
from seqparc.codegen.tools import Command, Ran, run, scratch
from seqparc.errors import SeqparcWarning, ToolchainError
from seqparc.options import environment

FLAGS = (
    "-std=gnu11", "-O2", "-march=native", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fno-semantic-interposition", "-w",
    # Kernels are straight lines between loads and stores, with nothing for these to find: they are as fast without, and compiled sooner.
    "-fno-gcse", "-fno-tree-pre", "-fno-code-hoisting", "-fno-tree-vrp", "-fno-tree-fre", "-fno-tree-ccp",
)  # fmt: skip

#: What a kernel's library has.
SYMBOLS = ("seqparc_run", "seqparc_gap", "seqparc_scan", "seqparc_width", "seqparc_tile")


@dataclass(frozen=True)
class Key:
    """Everything that decides an object's machine code."""

    source: str  # the text itself, vector header included
    compiler: str  # command and version line: another compiler makes other code
    flags: tuple[str, ...]
    machine: str  # -march=native means this processor

    def digest(self) -> str:
        h = hashlib.sha256()
        for part in astuple(self):
            h.update(repr(part).encode() + b"\0")
        return h.hexdigest()


def load(source: str, parts: tuple[int, ...] = (1,), symbols: tuple[str, ...] = SYMBOLS) -> ctypes.CDLL:
    """The compiled library of a source, from the cache if it is there. `parts` are compiled side by side; `symbols` it must have.

    Raises ToolchainError where there is no compiler, where it fails, and where what it made is no such library.
    """
    command, version = compiler()
    key = Key(source, f"{shlex.join(command)} {version}", FLAGS, machine()).digest()
    try:
        path = _kept(key) or _made(key, command, source, parts)
    except OSError as error:
        raise ToolchainError(f"kernels cannot be compiled, as there is no place for their files: {error}") from error
    try:
        library = ctypes.CDLL(str(path))
        try:
            for name in symbols:
                getattr(library, name)
        except AttributeError:
            _ctypes.dlclose(library._handle)  # else it would be what is found under this path
            raise
    except (OSError, AttributeError) as error:
        store.drop(path.with_suffix(".sha256"))  # whatever is wrong with it, it is not to be found again
        raise ToolchainError(f"the kernel that {command[0]} compiled cannot be loaded: {error}", command) from error
    return library


def _kept(key: str) -> Path | None:
    return next((path for folder in store.folders() if _intact(path := folder / f"{key}.so")), None)


def _intact(path: Path) -> bool:
    """Whether an object is there whole: its digest stands beside it."""
    try:
        return path.with_suffix(".sha256").read_bytes() == _digest(path.read_bytes())
    except OSError:
        return False


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _made(key: str, command: Command, source: str, parts: tuple[int, ...]) -> Path:
    """Compile, unless another process has meanwhile; where there is no room in the cache, for this process alone."""
    with _one_at_a_time(store.folder() / f"{key}.lock"):
        path = _kept(key)
        if path is None:
            data = _compile(command, source, parts)
            try:
                path = _keep(store.folder() / f"{key}.so", source, data)
            except OSError as error:
                path = _keep(store.instead(error) / f"{key}.so", source, data)
        return path


def _keep(path: Path, source: str, data: bytes) -> Path:
    store.write(path.with_suffix(".c"), source.encode())  # for people
    store.write(path, data)
    store.write(path.with_suffix(".sha256"), _digest(data))  # last: it says the object is whole
    return path


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """While no other process is here. Where there can be no lock several are, and the last one's object stays."""
    import filelock  # a tenth of a second, and a warm start does without it

    lock = filelock.FileLock(str(path))
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        store.unkept(error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _compile(compiler: Command, source: str, parts: tuple[int, ...]) -> bytes:
    with scratch() as work:
        text, made = work / "kernel.c", work / "kernel.so"
        text.write_text(source, "utf-8")
        ran = _build(compiler, FLAGS, text, parts, made)
        if ran.status and "omp" in ran.said:  # clang without its OpenMP library
            ran = _build(compiler, tuple(f for f in FLAGS if f != "-fopenmp"), text, parts, made)
            if not ran.status:
                warnings.warn(f"{compiler[0]} has no OpenMP library, so kernels run in one thread", SeqparcWarning, stacklevel=2)
        if ran.status or not made.exists():
            how = f"failed with status {ran.status}" if ran.status >= 0 else f"was ended by signal {-ran.status}"
            raise ToolchainError(f"the C compiler {how}:\n{shlex.join(ran.command)}\n{ran.said.strip()}", ran.command, ran.said)
        return made.read_bytes()


def _build(compiler: Command, flags: tuple[str, ...], text: Path, parts: tuple[int, ...], made: Path) -> Ran:
    """The command that failed or was the last, and how it went."""
    if len(parts) == 1:
        return run([(*compiler, *flags, f"-DPART={parts[0]}", str(text), "-o", str(made), "-lm")], text.parent)[0]
    objects = [str(made.with_suffix(f".{part}.o")) for part in parts]
    commands = [(*compiler, *flags, "-c", f"-DPART={part}", str(text), "-o", o) for part, o in zip(parts, objects, strict=True)]
    failed = [r for r in run(commands, text.parent) if r.status]
    return failed[0] if failed else run([(*compiler, *flags, *objects, "-o", str(made), "-lm")], text.parent)[0]


@functools.cache
def _find(asked: str, search: str) -> tuple[Command, str]:
    del search  # part of the key only: another PATH may find another compiler
    try:
        command = (asked,) if shutil.which(asked) else tuple(shlex.split(asked))  # a path may hold blanks, and CC may hold arguments
    except ValueError as error:
        raise ToolchainError(f"CC is {asked!r}, which does not fall into words: {error}") from error
    found = shutil.which(command[0])
    if found is None:
        raise ToolchainError(f"no C compiler named {command[0]!r} is on the PATH")
    command = (found, *command[1:])
    about = os.stat(os.path.realpath(found))

    def ask() -> str | None:
        ran = run([(*command, "--version")])[0]
        return None if ran.status else ran.printed.split("\n")[0]

    # Asking starts a process; a compiler that is the same file has the same version.
    known = store.remembered("compiler", f"{os.path.realpath(found)} {about.st_mtime_ns} {about.st_size} {command[1:]}", ask)
    return command, known or "of no known version"


def compiler() -> tuple[Command, str]:
    """The command that compiles C, with the arguments that CC may hold, and its version. Raises ToolchainError."""
    search = os.environ.get("PATH", "")
    asked = (environment("CC") or "").strip()
    if asked:
        return _find(asked, search)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return _find(name, search)
    raise ToolchainError("no C compiler was found (looked for cc, gcc, clang on the PATH). Install one, or name it in CC.")


@functools.cache
def _features() -> str:
    """What the processor can do, in its own words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def machine() -> str:
    """The processor as -march=native sees it."""
    return f"{platform.machine()} {hashlib.sha256(_features().encode()).hexdigest()[:16]}"


@functools.cache
def registers() -> int:
    """Vector registers that there are at least."""
    return 32 if "avx512f" in _features().split() else 16
