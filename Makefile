# Everything a newcomer needs: `make quickstart` and `make test`. Only Python 3.11 or newer is asked for.
PYTHON ?= python3
VENV ?= .venv
RUN = runs/quickstart
CONFIG = configs/quickstart.py
BIN = $(VENV)/bin
export JAX_PLATFORMS ?= $(if $(ACCELERATOR),,cpu)

# The newest Python that is installed here, for `make test-newest`.
NEWEST_PYTHON ?= $(firstword $(foreach python,python3.14 python3.13 python3.12,$(shell $(python) --version >/dev/null 2>&1 && echo $(python))))
NEWEST_VENV ?= .venv-newest
# What differs most between versions of jax: compiled TPU programs, numerics, sharding, losses, decoding, resuming.
NEWEST_TESTS = $(addprefix tests/test_,tpu_compiler.py numerics.py sharding.py losses.py train_step.py \
	decoding_lossless.py decoding_sampling.py training.py)

.PHONY: help quickstart test test-newest lint format docs bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Large pages for what a step allocates: on a CPU it is 1.2 times as fast (docs/training.md).
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(BIN)/.installed  ## train a small LayerSkip model and generate with it (BASELINE=1: and a plain one beside it)
	$(BIN)/python -m layerskip_jax data prepare --config $(CONFIG)
	$(BIN)/python -m layerskip_jax data tokenizer --config $(CONFIG)
	$(BIN)/python train.py --config $(CONFIG)
ifdef BASELINE
	$(BIN)/python train.py --config $(CONFIG) --early_exit.curriculum none --layer_dropout.p_max 0 --train.run_dir $(RUN)_plain
endif
	$(BIN)/python -m layerskip_jax evaluate $(RUN) $(if $(BASELINE),$(RUN)_plain)
	$(BIN)/python decode.py --checkpoint $(RUN) --prompt 'import os'
	$(BIN)/python decode.py --checkpoint $(RUN) --held_out 8 --ignore_eos --compare --quiet
	@echo
	@echo 'Next:'
	@echo '  your own prompt     $(BIN)/python decode.py --checkpoint $(RUN) --prompt "class "'
	@echo '  another exit        $(BIN)/python decode.py --checkpoint $(RUN) --held_out 8 --compare --quiet --exit_layer 4'
	@echo '  a plain model too   make quickstart BASELINE=1'
	@echo '  every setting       $(BIN)/python train.py --help'
	@echo '  pictures            $(RUN)/plots'

test: $(BIN)/.installed-dev  ## run the suite (under 30 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2

$(BIN)/.installed-tpu: $(BIN)/.installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[tpu]'
	@touch $@

$(NEWEST_VENV)/.installed: pyproject.toml tpu/requirements.txt
	@test -n '$(NEWEST_PYTHON)' || { echo 'error: make test-newest needs Python 3.12 or newer; set NEWEST_PYTHON to one'; exit 1; }
	$(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -m pip install --quiet --constraint tpu/requirements.txt --editable '.[dev,tpu]'
	@touch $@

test-newest: $(NEWEST_VENV)/.installed  ## run the tests that depend on jax under the versions for TPUs (tpu/requirements.txt)
	$(NEWEST_VENV)/bin/python -m pytest -n 2 $(NEWEST_TESTS)

lint: $(BIN)/.installed-dev  ## ruff, mypy, import-linter and shellcheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources --check-sourced tpu/pod tpu/worker.sh .ci/run

format: $(BIN)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(BIN)/.installed-dev  ## build the site of docs/ into build/docs; warnings are errors
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

bench: $(BIN)/.installed  ## what a step with exits costs, and how many lines there are to read
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/lines_to_read.py

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist *.egg-info
