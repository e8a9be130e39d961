"""Compilers that are killed or lie, disks that are full, caches that vanish or are shared: announced, and never a wrong number."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seqparc
from seqparc import store
from seqparc.__main__ import main
from seqparc.codegen import build
from seqparc.errors import SeqparcWarning, ToolchainError
from tests.living import same
from tests.test_faults import Plain

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).parent.parent
CC = shutil.which("cc") or "gcc"
X = torch.linspace(-1, 1, 2 * 9 * 4).reshape(2, 9, 4)


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str) -> Path:
    """A compiler in CC that is the real one, except for objects while the file beside it is there: then it does this with "$out"."""
    script, flag = tmp_path / "some tools" / "fake-cc", tmp_path / "some tools" / "bad"
    script.parent.mkdir()
    flag.touch()
    script.write_text(
        f"""#!/bin/sh
for word; do [ "$last" = -o ] && out=$word; last=$word; done
if [ -z "$out" ] || ! [ -e {shlex.quote(str(flag))} ]; then exec {CC} "$@"; fi
{bad}
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return flag


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by what is compiled."""
    found: list[int] = []
    compiling = build._compile
    monkeypatch.setattr(build, "_compile", lambda *given: (found.append(1), compiling(*given))[1])
    return found


def used(rnn: seqparc.CompiledRNN | None = None, grad: bool = False) -> str:
    """Run a new module, or this one, compare it with the loop, and say which backend it was."""
    rnn = seqparc.compile(Plain()) if rnn is None else rnn
    with torch.set_grad_enabled(grad):
        if grad:
            same(rnn, X)
        else:
            torch.testing.assert_close(rnn(X)[0], rnn.sequential(X)[0])
    return rnn.stats.backend


# -- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('head -c 64 /bin/sh > "$out"; kill -9 $$', "ended by signal 9"),
        (f'{CC} "$@" && head -c 1000 "$out" > "$out.half" && mv "$out.half" "$out"; exit 1', "status 1"),
        (f'{CC} "$@"; case " $* " in *" -c "*) exit;; esac; head -c 60 "$out" > "$out.half"; mv "$out.half" "$out"', "cannot be loaded"),
        (f'case " $* " in *" -c "*) exec {CC} "$@";; esac; echo "int nothing;" | {CC} -shared -fPIC -x c - -o "$out"', "seqparc_run"),
        ("exit 0", "status 0"),
    ],
    ids=["killed", "half an object", "half an object, and content", "another object", "no object"],
)
def test_what_a_bad_compiler_leaves_is_not_used_by_anybody(
    bad: str, says: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = fake(tmp_path, monkeypatch, bad)
    with pytest.warns(SeqparcWarning, match=says):
        assert used() == "torch"
    flag.unlink()
    assert used(grad=True) == "c"  # the same compiler by name, date and version, and now it works
    assert all(map(build._intact, fresh.glob("*.so")))


def test_the_compiler_may_have_arguments(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shell: what one would make of the words does not happen."""
    monkeypatch.setenv("CC", f"{CC} -DWORD='a b'")
    assert build.compiler()[0] == (shutil.which(CC), "-DWORD=a b")
    assert used() == "c"
    mark = tmp_path / "mark"
    for wrong, says in ((f"{CC}; touch {mark}", "no C compiler named"), (f"$(touch {mark})", "no C compiler"), ("cc '", "into words")):
        monkeypatch.setenv("CC", wrong)
        with pytest.raises(ToolchainError, match=says):
            build.compiler()
    monkeypatch.setenv("CC", f"{CC} `touch {mark}`")
    with pytest.warns(SeqparcWarning, match="hands it to torch"):
        used()
    assert not mark.exists()


# -- the disk --------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_time_and_no_call(fresh: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    writing = store.write
    monkeypatch.setattr(store, "write", lambda path, data: full() if fresh in path.parents else writing(path, data))
    rnn = seqparc.compile(Plain())
    with pytest.warns(SeqparcWarning, match="No space left on device.*SEQPARC_CACHE") as said:
        assert used(rnn, grad=True) == "c"
    assert len(said) == 1 and len(counted) == 2
    assert used(grad=True) == "c" and len(counted) == 2  # this process has them
    assert not [f for f in fresh.iterdir() if f.suffix != ".lock"]


def test_a_disk_that_fills_up_while_it_is_written_to(fresh: Path) -> None:
    """For once by the system itself: no file may be longer than a page."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    value = list(range(5000))
    store.folder()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most[1]))
        with pytest.warns(SeqparcWarning, match="File too large"):
            assert store.remembered("compiler", "key", lambda: value) == value
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not list(fresh.iterdir())


@pytest.mark.parametrize("writing", [True, False], ids=["a cache", "no cache"])
def test_no_room_to_compile(writing: bool, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    also: Any = contextlib.nullcontext()
    if not writing:
        monkeypatch.setattr(store.tempfile, "TemporaryFile", full)
        also = pytest.warns(SeqparcWarning, match="the cache folder .*No space left")
    with also, pytest.warns(SeqparcWarning, match="no place for their files.*No space left"):
        assert used() == "torch"


def test_a_lock_that_cannot_be_had(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    with pytest.warns(SeqparcWarning, match="No space left"):
        assert used() == "c"


@pytest.mark.parametrize("when", ["between calls", "while it compiles"])
def test_a_cache_that_is_removed(when: str, fresh: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = seqparc.compile(Plain())
    if when == "between calls":
        assert used(rnn) == "c"
        shutil.rmtree(fresh)
        assert used(rnn) == "c" and len(counted) == 1  # what is loaded stays
        assert used() == "c" and len(counted) == 2 and len(list(fresh.glob("*.so"))) == 1
    else:
        compiling = build._compile
        monkeypatch.setattr(build, "_compile", lambda *given: (compiling(*given), shutil.rmtree(fresh))[0])
        assert used(rnn, grad=True) == "c"


def test_another_users_cache_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.mkdir()
    fresh.chmod(0o700)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.warns(SeqparcWarning, match="belongs to another user"):
        assert used() == "c"
    assert not list(fresh.iterdir())


def test_a_temporary_folder_with_an_odd_name(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "l'été, \\ \"$(x)\"\nzwei"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    assert used() == "c"
    assert not list(odd.iterdir())


# -- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("[1, 2]", "[2, 2]"), lambda text: text.replace("digest", "digits"), lambda _: "null", lambda _: "[3]",
        lambda _: '{"digest": null}', lambda _: "[" * 100_000, lambda text: text[:-1], lambda _: "\udcff",
    ],
    ids=["another number", "another key", "null", "a list", "no value", "deep", "cut off", "no text"],
)  # fmt: skip
def test_a_fact_that_is_not_what_was_written_is_found_again(spoil: Callable[[str], str], fresh: Path) -> None:
    assert store.remembered("compiler", "key", lambda: [1, 2]) == [1, 2] == store.recall("compiler", "key")
    (path,) = fresh.glob("compiler-*.json")
    path.write_text(spoil(path.read_text()), "utf-8", "surrogateescape")
    assert store.recall("compiler", "key") is None
    assert store.remembered("compiler", "key", lambda: [3]) == [3] == store.recall("compiler", "key")


def test_a_fact_is_that_of_its_own_question(fresh: Path) -> None:
    store.keep("compiler", "one", [1])
    (one,) = fresh.glob("compiler-*.json")
    store.keep("compiler", "two", [2])
    (two,) = set(fresh.glob("compiler-*.json")) - {one}
    shutil.copy(one, two)
    assert store.recall("compiler", "one") == [1] and store.recall("compiler", "two") is None


def test_clearing_the_cache_removes_nothing_of_anybody_else(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert used(grad=True) == "c"
    letters = [fresh / name for name in ("letter.c", "data.json", "thesis.py", "abc.so", ".bashrc")]
    for path in letters:
        path.write_text("dear")
    assert main(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] >= 8
    assert sorted(fresh.iterdir()) == sorted(letters)


# -- many processes --------------------------------------------------------------------------------------------------

MANY = """
import sys
from tests.test_machine import many
many(sys.argv[1])
"""


def decaying(a: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, h: torch.tanh(a * h + x)


def many(log: str) -> None:
    """Sixteen processes at once, with a cell out of four."""
    torch.set_num_threads(1)
    build.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in build.FLAGS)
    compiling = build._compile

    def compile_and_note(*given: Any) -> bytes:
        with open(log, "a") as file:
            file.write("compiled\n")
        return compiling(*given)

    build._compile = compile_and_note
    seqparc.compile(decaying(0.9), state=torch.zeros(4), backend="torch")(X)  # imports what all of them need
    children = []
    for k in range(16):
        if not (child := os.fork()):
            status = 1
            try:
                rnn = seqparc.compile(decaying((k % 4 + 1) / 5), state=torch.zeros(4))
                with torch.no_grad():
                    y, right = rnn(X)[0], rnn.sequential(X)[0]
                status = 0 if torch.allclose(y, right, atol=1e-6) and rnn.stats.backend == "c" else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16


def test_sixteen_processes_compile_everything_once(fresh: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command, env = [sys.executable, "-W", "error", "-c", MANY, str(log)], {**os.environ, "SEQPARC_VERIFY": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(log.read_text().splitlines()) == 4 == len(list(fresh.glob("*.so")))
    assert not list(fresh.glob("write-*"))
