# The commands of the README. Each sets itself up: a fresh clone needs nothing but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

OUT ?= build/demo
SEEDS ?= 1000
# Processes that test at once. Many tests wait for a clock: one more than there are cores fills it.
WORKERS ?= 2
# Every commit has worlds of its own, and always the same ones; 0 where there is no commit.
FIRST ?= $(shell printf %d 0x0$$(git rev-parse HEAD 2>/dev/null | cut -c1-6))

# Images often forbid bytecode. The tests start a thousand processes of ours, and each of them would
# compile again what it imports: a quarter of what it costs to start one.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test swarm lint bench format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,s3,encryption,dev]'
	touch $@

# A supervised run with faults, the same run without, and whether a bit differs.
demo: setup
	rm -rf $(OUT)
	HOLDFAST_HOME=$(OUT)/home $(BIN)/holdfast drill deploy/examples/demo.yaml \
		--faults deploy/examples/demo-faults.yaml --out $(OUT)

# Ratios measured in one run each; about half an hour on two cores, which should be idle.
bench: setup
	$(BIN)/python -m tests.bench.recovery
	$(BIN)/python -m tests.bench.overhead
	$(BIN)/python -m tests.bench.false_alarms
	$(BIN)/python -m tests.bench.hangs
	$(BIN)/python -m tests.bench.stragglers
	$(BIN)/python -m tests.bench.copy
	$(BIN)/python -m tests.bench.checkpoint
	$(BIN)/python -m tests.bench.controller
	$(BIN)/python -m tests.bench.takeover
	$(BIN)/python -m tests.bench.reduction
	$(BIN)/python -m tests.bench.detection
	$(BIN)/python -m tests.bench.trainer
	$(BIN)/python -m tests.bench.data

# What is in tests/alone judges how fast processes are, and runs when no other test does.
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --ignore tests/alone
	$(BIN)/python -m pytest tests/alone

# Worlds that no test has tried. A seed that fails is named with the command that replays it.
swarm: setup
	$(BIN)/holdfast simulate swarm --first $(FIRST) --seeds $(SEEDS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell orchestrator trainer storage tests docs README.md

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
