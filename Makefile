# Everything a newcomer types. `make quickstart` trains a small model on this machine; `make test` is what CI runs.
PYTHON ?= python3
OVERRIDES ?=  # for quickstart, e.g. OVERRIDES="training.max_steps=50 output.run_dir=runs/short"
CONFIG ?=  # for quickstart, a file of accelerate_configs/: CONFIG=cpu; without it the GPU's where torch sees one, else the CPU's
LAWS_DATA ?=  # for docs/laws.md, e.g. LAWS_DATA="--data DIR" with published runs
BIN := .venv/bin
# One thread for the test processes: several at once on few cores slow one another down many times over.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH"

PYTEST := -n 2 --dist worksteal --durations=25

# In a process of its own: all other tests hide the GPUs, since they state what a CPU does.
TEST_GPU = if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	$(TEST_ENV) ISOFLOP_TEST_GPU=1 $(BIN)/python -m pytest -m gpu tests/gpu; else echo "tests/gpu: torch sees no GPU here"; fi

.PHONY: quickstart setup test test-unit test-all check lint types schema constraints figures pages

quickstart: .venv/installed
	$(BIN)/python scripts/prepare.py recipes/quickstart.yaml $(OVERRIDES)
	config="$(strip $(CONFIG))"; [ -n "$$config" ] || config="$$($(BIN)/python -m isoflop.train.devices)"; \
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/$$config.yaml scripts/pretrain.py recipes/quickstart.yaml $(OVERRIDES)

setup: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), f'Python 3.11 to 3.13 is needed, this is {sys.version}: make PYTHON=python3.12'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval,tracking]'
	touch $@

# The newest transformers of the generation before, for the tests that open what is exported with it.
build/transformers4: tests/unit/publish/transformers4.txt
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ -r $<

test: setup lint types build/transformers4
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST) -m "not slow and not gpu"
	$(TEST_GPU)

# What starts no run of its own: the tests beside each package.
test-unit: setup
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST) -m "not slow and not gpu and not distributed and not processes" tests/unit

test-all: setup lint types build/transformers4
	$(TEST_ENV) ISOFLOP_TEST_REAL=1 $(BIN)/python -m pytest $(PYTEST) -m "not gpu"
	$(TEST_GPU)

check: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	MYPYPATH=src $(BIN)/mypy -p isoflop

schema: setup
	$(BIN)/python -m isoflop.config.loading > recipes/schema.json

# After an upgrade in .venv that passed `make test-all`.
constraints: setup
	(sed -n 1p constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//') > constraints.new
	mv constraints.new constraints.txt

# Pages and figures that are computed; docs/circle.md takes some 35 minutes and docs/ablation.md an hour, all others but docs/reproductions.md some ten each.
pages: setup
	$(BIN)/python benchmarks/pages/reproductions.py
	$(BIN)/python benchmarks/pages/memory.py
	$(BIN)/python benchmarks/pages/roofline.py
	$(BIN)/python benchmarks/pages/reliability.py
	$(BIN)/python -m pip install --quiet --target build/peers --no-deps -r benchmarks/pages/peers.txt
	PYTHONPATH=build/peers $(BIN)/python benchmarks/pages/data.py
	$(BIN)/python benchmarks/pages/performance.py
	$(BIN)/python benchmarks/pages/circle.py
	$(BIN)/python benchmarks/pages/ablation.py
	$(BIN)/python benchmarks/pages/transfer.py
	$(BIN)/python -m pip install --quiet --no-deps --target build/chinchilla chinchilla==0.2.0 attrdictx ordinal seaborn ruamel.yaml
	PYTHONPATH=build/chinchilla $(BIN)/python benchmarks/pages/laws.py $(LAWS_DATA)

figures:
	cp runs/quickstart/loss.png docs/quickstart.png
