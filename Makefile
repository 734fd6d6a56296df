# `make demo` and `make test` work from a fresh clone: each creates what it needs under .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT    ?= benchmarks/results
COMMIT ?= $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
FAST   := not slow and not gpu and not browser

.PHONY: demo test check gpu results bench format clean

# The same training in three precisions, on real data: some 2 minutes. Done twice, it is reused.
demo: $(VENV)/.runtime
	$(BIN)/narrowcast compare fashion --set model=vit --set batch_size=64 \
	    --precisions fp32,fp16,bf16 --seeds 5 --steps 100 --margin 0.02 --output runs/demo

test: $(VENV)/.peers
	$(BIN)/python -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

check: $(VENV)/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "$(FAST)" tests/arch tests/unit

# Runs on a machine with a GPU as it stands: no virtual environment, no installation, no network.
# Under ten minutes; a lent machine says in OUT where records have to go to come back.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --output $(OUT) --commit "$(COMMIT)"

# docs/results.md and its charts, from the records alone.
results:
	PYTHONPATH=src $(PYTHON) benchmarks/render_results.py

bench: $(VENV)/.peers
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/memory_ladder.py

format: $(VENV)/.dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) torch numpy
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PIP) -e '.[peers]'
	touch $@

clean:
	rm -rf $(VENV)
