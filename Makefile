# One word runs everything. Each target makes .venv and installs the pinned packages first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := kasa pipeline ray_jobs benchmarks tests
# In the order that tests/conftest.py gives them: the long ones first.
TWO_PROCESSES := -n 2 --dist loadgroup --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1

.PHONY: demo hello test quick soak checks bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/kasa run recipes/quickstart.yaml

hello: $(VENV)/.installed
	$(BIN)/kasa run hello

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO_PROCESSES) --durations 25

quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m "not cluster and not soak and not processes"

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "soak or cluster"

checks: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ONLY)

docs: $(VENV)/.installed-dev
	$(BIN)/python -m pipeline.apps.recipe_docs
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
