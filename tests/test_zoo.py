"""Public cells, unmodified: each compiles and agrees with its plain loop, values and all gradients, or says why it cannot.

The kernels are compiled without optimisation here, which takes half of the time; `python -m tests.zoo` compares optimised ones.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import seqparc

from .zoo import ROWS, Row
from .zoo.compare import Subject, errors, words
from .zoo.page import GRADIENTS, VALUES, look, page
from .zoo.rows import FOLDER, adapter_lines

#: Chunks, so that what is compared has been put together from several; no corrections, whose kernels would have to be compiled too.
OPTIONS = {"strategy": "shooting", "chunks": 4, "warmup": 3, "update": "none"}

RUN = [row for row in ROWS.values() if not row.missing and not row.refused]
REFUSED = [row for row in ROWS.values() if row.refused]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def one_thread(seeded: None) -> None:
    torch.set_num_threads(1)


def present(row: Row) -> None:
    if row.package != "torch" and not FOLDER.is_dir():
        pytest.skip(f"{row.package} is not installed; `make zoo` does that")


def marked(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.title for row in rows])


@marked(RUN)
@pytest.mark.filterwarnings("ignore:mix='head'")
def test_a_public_cell_is_its_plain_loop(row: Row) -> None:
    present(row)
    subject = Subject.of(row, batch=3, steps=37, **OPTIONS)
    mine, right = subject.results(subject.rnn), subject.results(subject.plain)
    assert all(t.double().std() > 0 for name, t in right.items() if name.startswith("y"))  # else there would be nothing to compare
    bounds = {name: GRADIENTS if name.startswith("d") else VALUES for name in right}
    assert {name: e for name, e in errors(mine, right).items() if not e <= bounds[name]} == {}
    stats = subject.rnn.stats
    assert (stats.backend, stats.chunks, stats.fallback) == ("c", 4, None)
    if stats.backward is not None:
        assert (stats.backward.backend, stats.backward.fallback) == ("c", None)
    structure = subject.structure()
    assert words(structure) == row.structure
    assert not (subject.dependence() & ~structure.pattern).any()  # what is proved to be zero is


@marked(REFUSED)
def test_a_public_cell_that_cannot_be_run_in_parallel_says_why(row: Row) -> None:
    present(row)
    subject = Subject.of(row, batch=3, steps=5)
    with warnings.catch_warnings():  # of a cell that runs as its plain loop
        warnings.simplefilter("ignore", seqparc.SeqparcWarning)
        with pytest.raises((seqparc.SeqparcError, AssertionError), match=row.refused):
            subject.structure()


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.missing], ids=lambda row: row.title)
def test_a_cell_that_a_package_does_not_give(row: Row) -> None:
    present(row)
    with pytest.raises((ImportError, AttributeError)):
        row.make()
    pytest.skip(f"{row.title}: {row.missing}")


def test_how_much_of_the_zoo_compiles() -> None:
    assert len(ROWS) == 120 and len(RUN) >= 115
    assert max(map(adapter_lines, ROWS.values())) <= 3
    assert sum(row.call is None for row in RUN) >= 106  # called as they are


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQPARC_CACHE", str(tmp_path))  # which each row sets anew
    titles = ("torch RNNCell", "torch RNNCell, relu", "torchrecurrent RHNCell")
    found = [look(ROWS[title], 40) for title in titles]
    assert [f.kind for f in found] == ["smooth", "kinks", ""] and all(f.agrees for f in found)
    text = page(found, 40)
    assert "3 recurrent cells" in text and "2 compile: 2 on the c backend" in text and "over 40 steps" in text
    assert re.search(r"^\| torch RNNCell \| 1 × 8 \| dense, 100 % \| smooth \| c \| [\d.]+ s \| .*× .* \| .*× .* \|$", text, re.M)
    assert "- torchrecurrent RHNCell: its module" in text
