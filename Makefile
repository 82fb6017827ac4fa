# `make demo` and `make test` set up what they need in .venv; nothing outside this folder changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all test-without-torch test-tpu test-cuda eval-check lint types wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; pass its path: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Python's venv module is needed (on Debian: python3-venv)."; exit 1; }

$(VENV)/.base: pyproject.toml | $(BIN)/python
	@echo "Installing jaxprune into $(VENV) ..."
	@$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing the test tools and the PyTorch oracle into $(VENV) ..."
	@$(BIN)/python -m pip install -q -e '.[test,oracle]'
	@touch $@

IMAGE := jaxprune/assets/demo.png
QUESTION := What shape is the blue object?

demo: $(VENV)/.base  ## ask the small model about the shipped picture, with and without pruning
	@for method in none prumerge prumerge_plus; do \
		echo "$$ jaxprune generate --image $(IMAGE) --prompt '$(QUESTION)' --method $$method"; \
		$(BIN)/jaxprune generate --image $(IMAGE) --prompt '$(QUESTION)' --method $$method || exit 1; \
	done

test: $(VENV)/.dev  ## the test suite, against PyTorch, without the longer checks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev  ## the longer checks
	$(BIN)/python -m pytest -n 2 -m slow

test-all: $(VENV)/.dev  ## every test, with XLA's full optimisation
	JAXPRUNE_TEST_OPTIMISED=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-without-torch:  ## the test suite in a new environment of PYTHON, without the oracle
	@rm -rf $(VENV)-without-torch
	@$(PYTHON) -m venv $(VENV)-without-torch
	@$(VENV)-without-torch/bin/python -m pip install -q -e '.[test]'
	$(VENV)-without-torch/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

test-tpu:  ## what the TPU's own compiler makes of the programs; no TPU is needed
	@test -x $(VENV)-tpu/bin/python || $(PYTHON) -m venv $(VENV)-tpu
	@$(VENV)-tpu/bin/python -m pip install -q -e '.[test,tpu-compile]'
	JAX_PLATFORMS=cpu JAXPRUNE_TEST_OPTIMISED=1 $(VENV)-tpu/bin/python -m pytest tests/compilers/test_tpu.py

test-cuda:  ## the same of CUDA's compiler; no GPU is needed, half a gigabyte of wheels is
	@test -x $(VENV)-cuda/bin/python || $(PYTHON) -m venv $(VENV)-cuda
	@$(VENV)-cuda/bin/python -m pip install -q -e '.[test]'
	@version=$$($(VENV)-cuda/bin/python -c 'import jax; print(jax.__version__)') && \
		$(VENV)-cuda/bin/python -m pip install -q --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	JAX_PLATFORMS=cpu JAXPRUNE_TEST_OPTIMISED=1 $(VENV)-cuda/bin/python -m pytest tests/compilers/test_cuda.py

# What lmms-eval 0.7.3 needs for tasks that generate; its own list has half a gigabyte more. No
# torchvision; filelock before 4, which no longer has the module _api that lmms-eval imports.
LMMS_EVAL := torch==2.13.0 'filelock<4' transformers datasets accelerate evaluate sacrebleu scikit-learn \
	numexpr loguru tenacity pytablewriter jsonlines nltk pydantic pyyaml python-dotenv zstandard sympy

eval-check:  ## lmms-eval's command line and scorers against ours, in .venv-eval; 2.3 GB
	@test -x $(VENV)-eval/bin/python || $(PYTHON) -m venv $(VENV)-eval
	@$(VENV)-eval/bin/python -m pip install -q $(LMMS_EVAL) -e . pytest hypothesis beartype
	@$(VENV)-eval/bin/python -m pip install -q --no-deps lmms-eval==0.7.3
	JAX_PLATFORMS=cpu $(VENV)-eval/bin/python -m pytest tests/evaluate/test_lmms_eval.py

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

wheel: $(VENV)/.dev  ## build the wheel and try it from another directory, without torch
	$(BIN)/python -m pip install -q build
	PYTHON="$(PYTHON)" sh tests/smoke_wheel.sh $(BIN)/python

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-without-torch $(VENV)-tpu $(VENV)-cuda $(VENV)-eval build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
