# Each target makes its own virtual environment in .venv and installs everything into it. A torch that is already in .venv
# (a CUDA build, say) is kept; otherwise TORCH is installed.
TORCH ?= torch==2.13.0
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: test demo lint bench nightly docs package oldest zoo clean

test: .venv/stamp
	$(PY) -m pytest -n auto --dist worksteal

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

# The site, in site/; a warning is an error. The generator's news of its successor are no warning of ours.
docs: .venv/stamp
	$(PY) -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# The wheel and the source distribution in dist/, and the wheel installed into an environment of its own, where it must run.
package: .venv/stamp
	rm -rf dist build .venv/package
	$(PY) -m pip install --quiet build twine
	$(PY) -m build --quiet
	$(PY) -m twine check --strict dist/*
	$(PYTHON) -m venv .venv/package
	.venv/package/bin/pip install --quiet "$(TORCH)"
	.venv/package/bin/pip install --quiet dist/*.whl
	cd /tmp && $(CURDIR)/.venv/package/bin/python -m seqparc doctor

# The oldest Triton we support, beside the newest: with it there the interpreter's tests run on one, and what compiles on the other.
oldest: .venv/oldest

.venv/oldest: .venv/stamp
	$(PY) -m pip install --quiet --no-deps --target $@ triton==3.6.0 "numpy<2.4"  # whose interpreter knows no later numpy

# Public packages whose cells the tests compile; without them those tests are skipped. Pages of it: `python -m tests.zoo`.
zoo: .venv/zoo/stamp

.venv/zoo/stamp: tests/zoo/requirements.txt | .venv/stamp
	rm -rf .venv/zoo
	$(PY) -m pip install --quiet --no-deps --target .venv/zoo --requirement $<
	touch $@

clean:
	rm -rf .venv build dist *.egg-info

.venv/stamp: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@
