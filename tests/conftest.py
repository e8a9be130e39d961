"""Every run starts from an empty cache of its own, verifies the IR after every pass, and uses two threads."""

from __future__ import annotations

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the run that starts them
    _CACHE = tempfile.TemporaryDirectory(prefix="seqparc-tests-")
    os.environ["SEQPARC_CACHE"] = _CACHE.name
os.environ["SEQPARC_VERIFY"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
