# Start with `make quickstart`; develop with `make check` and `make test`. All targets need Python 3.11 or newer; test-newest needs 3.12.
PYTHON ?= python3
VENV ?= .venv
RUN = runs/quickstart
CONFIG = configs/quickstart.py
BIN = $(VENV)/bin
LAYERSKIP = $(BIN)/python -m layerskip_jax
export JAX_PLATFORMS ?= $(if $(ACCELERATOR),,cpu)

# The newest installed Python, for `make test-newest`.
NEWEST_PYTHON ?= $(firstword $(foreach python,python3.14 python3.13 python3.12,$(shell $(python) --version >/dev/null 2>&1 && echo $(python))))
NEWEST_VENV ?= .venv-newest
# Run these with the newest jax: all tests of compiled TPU programs, numerics and sharding, and of decoding, sampling,
# losses and resuming one test for each kind of compiled program.
NEWEST_TESTS = $(addprefix tests/test_,tpu_compiler.py numerics.py sharding.py \
	decoding_lossless.py::test_speculation_equals_autoregressive_decoding[1] \
	decoding_lossless.py::test_autoregressive_equals_a_plain_loop_without_a_cache \
	decoding_sampling.py::test_every_policy_samples_the_full_models_distribution[ConfidenceStop] \
	decoding_sampling.py::test_a_draft_with_the_same_distribution_is_always_accepted \
	losses.py::test_gradients_equal_those_of_cut_models losses.py::test_flops_of_an_exit \
	losses.py::test_full_remat_repeats_every_matmul_of_a_block_but_the_down_projection \
	training.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit)

# Fast tests of most packages; modules that train a model or start many processes are left to `make test`.
CHECK_TESTS = $(addprefix tests/test_,config.py structure.py reading_cost.py benchmark_common.py early_exit.py \
	layer_dropout.py data.py digests.py pairs.py position.py hlo.py maxtext_tpu.py tpu_files.py \
	decoding_lossless.py::test_autoregressive_equals_a_plain_loop_without_a_cache \
	decoding_lossless.py::test_drafts_that_are_always_accepted_take_the_fewest_rounds \
	decoding_lossless.py::test_drafts_that_are_always_rejected_change_no_token)

# `worksteal` gives each worker a contiguous half of the tests, so that only one of them compiles what a module shares.
PARALLEL = -n 2 --dist worksteal

.PHONY: help quickstart check test test-newest lint format docs bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# pip is quiet twice, because a single --quiet prints a warning of setuptools about every editable installation.
$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable .
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --quiet --editable '.[dev]'
	@touch $@

# Large pages make a training step on a CPU about 1.2 times as fast (docs/training.md).
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(BIN)/.installed  ## train a small LayerSkip model and generate text (BASELINE=1: also train a plain model)
	$(LAYERSKIP) data prepare --config $(CONFIG)
	$(LAYERSKIP) data tokenizer --config $(CONFIG)
	$(LAYERSKIP) train --config $(CONFIG) --train.run_dir $(RUN)
ifdef BASELINE
	$(LAYERSKIP) train --config $(CONFIG) --early_exit.curriculum none --early_exit.exits --early_exit.exit_weights --early_exit.agreement_weight 0 --layer_dropout.p_max 0 --train.run_dir $(RUN)_plain
endif
	$(LAYERSKIP) evaluate $(RUN) $(if $(BASELINE),$(RUN)_plain)
	$(LAYERSKIP) plots $(RUN)
	$(LAYERSKIP) decode $(RUN) --prompt 'import os' --temperature 0.8 --top_p 0.95
	$(LAYERSKIP) decode $(RUN) --held_out 8 --ignore_eos --compare --quiet
	@echo
	@echo 'Next:'
	@echo '  your own prompt      $(LAYERSKIP) decode $(RUN) --prompt "class "'
	@echo '  another exit         $(LAYERSKIP) decode $(RUN) --held_out 8 --compare --quiet --exit_layer 4'
	@echo '  also a plain model   make quickstart BASELINE=1'
	@echo '  all settings         $(LAYERSKIP) train --help'
	@echo '  plots                $(RUN)/plots'

check: lint  ## the linters and a fast subset of the tests (about 2 minutes on 2 cores)
	$(BIN)/python -m pytest $(PARALLEL) $(CHECK_TESTS)

test: $(BIN)/.installed-dev  ## the whole test suite (15 to 30 minutes on 2 cores)
	$(BIN)/python -m pytest $(PARALLEL)

$(BIN)/.installed-tpu: $(BIN)/.installed-dev
	$(BIN)/python -m pip install --quiet --quiet --editable '.[tpu]'
	@touch $@

$(NEWEST_VENV)/.installed: pyproject.toml tpu/requirements.txt
	@test -n '$(NEWEST_PYTHON)' || { echo 'error: make test-newest needs Python 3.12 or newer; set NEWEST_PYTHON to one'; exit 1; }
	$(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -m pip install --quiet --quiet --constraint tpu/requirements.txt --editable '.[dev,tpu]'
	@touch $@

test-newest: $(NEWEST_VENV)/.installed  ## the tests that depend most on jax, with the versions for TPUs (tpu/requirements.txt)
	$(NEWEST_VENV)/bin/python -m pytest $(PARALLEL) $(NEWEST_TESTS)

lint: $(BIN)/.installed-dev  ## ruff, mypy, import-linter and shellcheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources --check-sourced tpu/pod tpu/worker.sh .ci/run

format: $(BIN)/.installed-dev  ## format the code, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(BIN)/.installed-dev  ## build the documentation into build/docs; warnings are errors
	$(BIN)/python -m pip install --quiet --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

bench: $(BIN)/.installed  ## the cost of an optimizer step with early exits and layer dropout
	$(BIN)/python -m benchmarks.step_cost

clean:  ## remove environments and build outputs
	rm -rf $(VENV) $(NEWEST_VENV) build dist *.egg-info
