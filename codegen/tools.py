"""Other programs, run side by side; whatever interrupts us ends them."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from seqparc.errors import ToolchainError

Command = tuple[str, ...]

_running: set[subprocess.Popen[str]] = set()
_folders: set[Path] = set()
_over = False
#: Nobody forks while a program is being started: a child that holds the other end of a pipe keeps us waiting for as long as it lives.
_starting = threading.RLock()


class Ran(NamedTuple):
    """How a program went: its status, below zero for a signal, what it printed and what it complained about."""

    command: Command
    status: int
    printed: str
    said: str


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files of programs, gone afterwards, or when this process ends: a thread that would clean up is not waited for."""
    with _starting:
        if _over:
            raise ToolchainError("nothing is compiled any more, as this process ends")
        made = Path(tempfile.mkdtemp(prefix="seqparc-build-"))
        _folders.add(made)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _folders.discard(made)


def run(commands: Sequence[Command], scratch: Path | None = None) -> list[Ran]:
    """Run commands side by side, without a shell, to their end. `scratch`: where they put files of their own.

    Each leads a group of processes: a Ctrl-C in a terminal is for us to pass on, and what a compiler has started ends with it. Raises
    ToolchainError where one cannot be started.
    """
    env = None if scratch is None else {**os.environ, "TMPDIR": str(scratch)}
    mine: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            try:
                with _starting:
                    if _over:
                        raise ToolchainError(f"{command[0]} is not run, as this process ends", command)
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                        env=env, start_new_session=True,
                    )  # fmt: skip
            except OSError as error:
                raise ToolchainError(f"{command[0]} cannot be run: {error}", command) from error
            mine.append(process)
            _running.add(process)
        ended = [p.communicate() for p in mine]
        return [Ran(c, p.returncode, *texts) for c, p, texts in zip(commands, mine, ended, strict=True)]
    finally:
        for process in mine:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End what still runs of a program."""
    _running.discard(process)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@atexit.register
def _end_all() -> None:
    """Kernels that are still being made when we end are for nobody."""
    global _over
    with _starting:
        _over = True
    for process in list(_running):
        _end(process)
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)


for of_the_parent in (_running, _folders):
    os.register_at_fork(after_in_child=of_the_parent.clear)
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)
