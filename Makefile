# Each target makes its own virtual environment in .venv and installs everything into it. A torch that is already in .venv
# (a CUDA build, say) is kept; otherwise TORCH is installed.
TORCH ?= torch==2.13.0
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: test demo lint bench nightly clean

test: .venv/stamp
	$(PY) -m pytest

demo: .venv/stamp
	$(PY) examples/ecg.py

lint: .venv/stamp
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/stamp
	$(PY) benchmarks/run.py

nightly: .venv/stamp
	$(PY) -m pytest -m nightly

clean:
	rm -rf .venv build dist *.egg-info

.venv/stamp: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@
