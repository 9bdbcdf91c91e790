# make demo: environment, installs, the six scripts, the table. make test: the same environment, lint and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs
SCRIPTS := 01_baseline 02_finetune_roberta 03_finetune_mistral 04a_distill_from_roberta 04b_distill_from_mistral 05_benchmark

.PHONY: demo test test-slow lint install clean

demo: install
	@set -e; for script in $(SCRIPTS); do $(BIN)/python $$script.py --preset demo --output-dir $(OUTPUT); done

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
