"""What is listed is what is there: a package missing from the list works from a checkout and is absent from the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    folders = SETUPTOOLS["package-dir"]
    known = max((p for p in folders if package == p or package.startswith(p + ".")), key=len)
    return ROOT / folders[known] / package[len(known) :].strip(".").replace(".", "/")


def test_every_package_is_listed() -> None:
    inits = {p.parent for top in ("seqparc", "passes", "codegen") for p in (ROOT / top).rglob("__init__.py")}
    assert {folder_of(p).resolve() for p in SETUPTOOLS["packages"]} == {p.resolve() for p in inits}


def test_data_files_are_packaged() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(folder_of(package).glob(pattern)), (package, pattern)
    loose = {p.suffix for p in (ROOT / "codegen").iterdir() if p.is_file()} - {".py"}
    assert loose == {".h"}


def test_links_lead_to_the_folders_beside() -> None:
    for name in ("passes", "codegen"):
        assert (ROOT / "seqparc" / name).is_symlink()
        assert (ROOT / "seqparc" / name).readlink() == Path("..") / name


def test_passes_are_not_importable_under_another_name() -> None:
    for name in ("passes", "codegen"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"seqparc.{name}" in done.stderr


def test_version_is_said_once() -> None:
    from seqparc import __version__

    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "seqparc.version.__version__"}
    assert f'"{__version__}"' in (ROOT / "seqparc" / "version.py").read_text()
