# make demo: environment, installs, the six scripts, the table. make test: the same environment, lint and tests.
# make drill: damaged files, kills, full disks, two copies, read-only folders; about half an hour, not timed yet.
# make kaggle-check: both in a second environment, with the versions of Kaggle's image.
# make results DATASET=path/to/imdb: the tables of results/ that CPUs make; 45 core hours; run it again to continue.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
OUTPUT ?= outputs/demo_run
SCRIPTS := 01_baseline 02_finetune_roberta 03_finetune_mistral 04a_distill_from_roberta 04b_distill_from_mistral 05_benchmark

.PHONY: demo test test-slow drill kaggle-check results lint install clean

demo: install
	$(BIN)/python demo/make.py
	@set -e; for script in $(SCRIPTS); do $(BIN)/python $$script.py --preset demo --output-dir $(OUTPUT); done

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: lint
	$(BIN)/python -m pytest

drill: install
	$(BIN)/python tests/drill.py $(DRILL)

kaggle-check:
	$(MAKE) VENV=.venv-kaggle CONSTRAINTS=constraints-kaggle.txt OUTPUT="$$(mktemp -d)" test demo

results: install
	@test -d "$(DATASET)" || { echo "error: pass DATASET=path/to/imdb, a folder of the reviews"; exit 2; }
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r experiments/requirements.txt
	$(BIN)/python experiments/real_weights.py --output-dir outputs/weights
	PATH="$(CURDIR)/$(BIN):$$PATH" bash experiments/run.sh "$(DATASET)"
	$(MAKE) demo
	cp $(OUTPUT)/05_benchmark/benchmark.csv results/demo/
	$(BIN)/python experiments/readme.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-kaggle
