PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
THREADS ?= 2
BENCH_SIZES ?= 3.4M 7M 25M
BENCH_REPEATS ?= 3
export HF_HUB_DISABLE_TELEMETRY = 1
export OMP_NUM_THREADS = $(THREADS)

.PHONY: setup quickstart check test test-fast faults bench bench-peers pocket-data pocket-base pocket-study pocket-frontier clean

setup: $(VENV)/.installed  ## a virtual environment with chatalign and everything its tests use

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "chatalign needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup  ## GPT -> ChatGPT on this machine: base -> sft -> reward -> dpo, ppo -> eval
	$(BIN)/chatalign run recipes/quickstart.yaml

check: setup  ## ruff, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

test: setup  ## everything that CI runs, two processes of one thread each
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup  ## without what takes more than a few seconds
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

faults: setup  ## kill -9 at 100 random points of a chain and at every file boundary of its stages, files damaged, disks full: 10 minutes on a free core, an hour on a busy one
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CHATALIGN_KILLS=100 $(BIN)/python -m pytest tests/faults

bench-peers: setup  ## each peer in an environment of its own, under bench/.venvs (about 14 GB)
	$(BIN)/python bench/peers.py

bench: bench-peers  ## chatalign beside its peers on this machine: hours, and bench/RESULTS.md; see bench/README.md
	rm -rf bench/results
	$(BIN)/python bench/run.py --sizes $(BENCH_SIZES) --repeats $(BENCH_REPEATS)
	$(BIN)/python bench/run_ppo.py --sizes $(filter-out 25M,$(BENCH_SIZES)) --repeats $(BENCH_REPEATS)
	$(BIN)/python bench/data_prep.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/scaling.py; kept=$$?; $(BIN)/python bench/report.py && exit $$kept

pocket-data: setup  ## make data/pocket again, from its script
	$(BIN)/python data/pocket/make_pocket.py

pocket-base: setup  ## train the shipped pocket base again, from nothing
	$(BIN)/python data/pocket/make_pocket.py --corpus runs/pocket/corpus
	$(BIN)/chatalign pretrain recipes/pocket/base.yaml from_scratch=true output_dir=runs/pocket/base --force

pocket-study: setup  ## the quickstart at three seeds, and the mean of what they reached
	$(BIN)/python data/pocket/study.py --seeds 1 2 3

pocket-frontier: setup  ## PPO beside DPO and best-of-n by KL, and PPO without a penalty: hours, docs/ppo_*.png
	$(BIN)/python data/pocket/frontier.py --seeds 1 2 3

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
