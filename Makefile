# make demo   sets up .venv and runs the main job on data that ships with a dependency
# make test   sets up .venv and runs the suite
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-slow lint format bench docs lock clean

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "gossamer needs Python 3.11 or newer: make PYTHON=python3.11 setup"'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked dependencies into .venv (PyTorch is large: a few minutes)"
	@$(BIN)/pip install --quiet --no-deps -r requirements.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/gossamer demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/quantization.py

docs: setup
	$(BIN)/mkdocs build --strict

lock: setup
	$(BIN)/python .ci/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache
