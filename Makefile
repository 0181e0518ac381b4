# make demo | test | test-fast | lint | bench | gpu-check | clean        make test ARGS="-k softmax -x"        make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
ARGS :=
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-fast lint style types bench gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/minibert compare $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

# Every room and every op on NumPy and Numba, in less than a minute once the kernels are compiled.
test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m fast $(ARGS)

lint: style types

style: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench.ops $(ARGS)

# On a machine with a GPU and perhaps no network: what is installed there is used, and nothing is installed.
gpu-check:
	@if [ -x $(BIN)/python ]; then python=$(BIN)/python; else python="$(PYTHON)"; fi; \
		exec "$$python" -m bench.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) .venv-ci* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of requirements, renewed when pyproject.toml changes. The install is editable: sources need no stamp.
$(VENV)/.installed: extra :=
$(VENV)/.installed-test: extra := [test]
$(VENV)/.installed-lint: extra := [lint]

$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-lint: pyproject.toml | $(VENV)/.made
	@echo "installing minibert$(extra) and what it needs into $(VENV) (up to a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(extra)'
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "minibert needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true): name another, as in 'make PYTHON=python3.12 $(firstword $(MAKECMDGOALS))'" >&2; exit 1; }
	@echo "making the virtual environment $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@
