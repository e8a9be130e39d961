"""What is kept between processes: a private folder, and small facts in it as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqparc.errors import SeqparcWarning
from seqparc.options import environment

_private: Path | None = None


def folder() -> Path:
    """The folder of compiled kernels: private to the user, or a temporary one, said once, if that cannot be had."""
    global _private
    asked = environment("SEQPARC_CACHE")
    if asked:
        found = Path(asked)
    else:
        import platformdirs  # only where nothing was asked for

        found = Path(platformdirs.user_cache_dir("seqparc"))
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = found.stat()
        if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError("it belongs to another user or others may write to it")
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        if _private is None:
            _private = Path(tempfile.mkdtemp(prefix="seqparc-"))
            warnings.warn(
                f"the cache folder {found} cannot be used ({error}); kernels of this process go to {_private} and are compiled anew "
                "next time. Name another folder in SEQPARC_CACHE.",
                SeqparcWarning,
                stacklevel=2,
            )
        return _private


def remembered(name: str, key: str, make: Callable[[], Any]) -> Any:
    """A JSON value that `make` gives, from the folder if it was made before under the same key."""
    found = recall(name, key)
    if found is None:
        found = make()
        keep(name, key, found)
    return found


def recall(name: str, key: str) -> Any:
    """What was kept under a key; None if nothing was, or it is spoilt."""
    try:
        return json.loads(_path(name, key).read_text())
    except (OSError, ValueError):
        return None


def keep(name: str, key: str, value: Any) -> None:
    """Keep a JSON value under a key, for this and other processes."""
    path = _path(name, key)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="write-", delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)


def _path(name: str, key: str) -> Path:
    return folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
