"""What is kept between processes: a private folder, and small facts in it as JSON.

What cannot be kept is not kept: a disk that is full, or a folder that is gone or belongs to another user, costs time and no call.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqparc.errors import SeqparcWarning
from seqparc.locks import Lock
from seqparc.options import environment

_private: Path | None = None  # a folder of this process alone
_said = False  # that something is not kept
_lock = Lock()
#: Files in the folder that are ours.
_OURS = re.compile(
    r"[0-9a-f]{64}\.(so|c|sha256|lock)|[a-z]+-[0-9a-f]{32}\.json|seqparc_generated_[0-9a-f]{24}(_interpreted)?\.py|write-\w+"
)


def folder() -> Path:
    """The folder of compiled kernels: private to the user, or a temporary one, said once, if that cannot be had.

    Raises OSError where that cannot be had either.
    """
    found = wanted()
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = found.stat()
        if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError("it belongs to another user or others may write to it")
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        return instead(error)


def wanted() -> Path:
    """The folder that was asked for, or the user's own, whether it can be used or not."""
    asked = environment("SEQPARC_CACHE")
    if asked:
        return Path(asked)
    import platformdirs  # only where nothing was asked for

    return Path(platformdirs.user_cache_dir("seqparc"))


def instead(error: OSError) -> Path:
    """A folder of this process alone, where the cache cannot be used for this reason. Raises OSError where there is no room for one."""
    global _private
    unkept(error)
    with _lock():
        if _private is None or not _private.is_dir():
            _private = Path(tempfile.mkdtemp(prefix="seqparc-"))
            atexit.register(_remove, _private, os.getpid())
        return _private


def folders() -> list[Path]:
    """Where something that was kept may lie."""
    return list(dict.fromkeys(f for f in (folder(), _private) if f is not None))


def unkept(error: Exception) -> None:
    """Say, once, that the cache is of no use to later processes."""
    global _said
    if not _said:
        _said = True
        warnings.warn(
            f"the cache folder {wanted()} cannot be used ({error}); what this process compiles and finds out is not kept for the next. "
            "Mend it or make room there, or name another folder in SEQPARC_CACHE.",
            SeqparcWarning,
            stacklevel=2,
        )


def write(path: Path, data: bytes) -> None:
    """Put a file in its place, whole; raises OSError, and then leaves nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="write-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            drop(Path(file.name))
            raise


def remembered(name: str, key: str, make: Callable[[], Any]) -> Any:
    """A JSON value that `make` gives, from the folder if it was made before under the same key. None is not kept."""
    found = recall(name, key)
    if found is None:
        found = make()
        if found is not None:
            keep(name, key, found)
    return found


def recall(name: str, key: str) -> Any:
    """What was kept under a key; None if nothing was, or it is spoilt."""
    try:
        kept = json.loads(_path(name, key).read_text("utf-8"))
        return kept["value"] if kept["digest"] == _digest(key, kept["value"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep(name: str, key: str, value: Any) -> None:
    """Keep a JSON value under a key, for this and other processes, if that can be."""
    try:
        write(_path(name, key), json.dumps({"digest": _digest(key, value), "value": value}).encode())
    except OSError as error:
        unkept(error)


def files() -> list[Path]:
    """What we have put into the folder; whatever else lies there is somebody else's."""
    return [f for f in folder().iterdir() if _OURS.fullmatch(f.name) and f.is_file()]


def _digest(key: str, value: Any) -> str:
    """Of a fact: a wrong one that reads well would be a wrong number."""
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()


def _path(name: str, key: str) -> Path:
    return folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def drop(path: Path) -> None:
    """Remove a file if that can be."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _remove(path: Path, process: int) -> None:
    """At the end of the process that made it, and not of one forked from that."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
