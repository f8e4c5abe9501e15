"""Strictness for the whole suite, and eight simulated devices."""

import os

if not os.environ.get("ACCELERATOR"):  # as in the Makefile; with it, run single tests that want a chip
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest
from corpora import make_corpus

collect_ignore = ["fixtures"]  # scripts that made them, which want torch

jax.config.update("jax_numpy_rank_promotion", "raise")
# Examples are the same at every run, so a red suite is a change of the code; timing is never asserted.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The settings of a small corpus with its tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Let go of a module's compiled programs: each maps memory, and Linux ends a process at 65,530 maps."""
    yield
    jax.clear_caches()
