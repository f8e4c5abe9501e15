"""Sizes are checked before memory is allocated for a Llama's folder, and pipes are not waited for."""

import os
import shutil

import pytest
from models import tiny_model, write_llama
from test_llama_files import set_config

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface import weights
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.swept import swept_settings
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError


@pytest.fixture
def untied(tmp_path):
    model = tiny_model(1)
    return write_llama(tmp_path / "untied", model.config, named_arrays(model))


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", [-1, 10**6, 10**9, 2**31 - 2, 2**31, 10**30, 1.5, True, "4", [4], {"a": 1}])
@pytest.mark.parametrize("unstacked", [False, True])
def test_a_config_allocates_nothing_that_the_files_do_not_have(untied, key, value, unstacked):
    set_config(untied, **{key: value})
    with pytest.raises(UserError):
        load_model(str(untied), unstacked=unstacked)


def grow(file):
    with file.open("r+b") as opened:
        opened.truncate(1 << 40)  # sparse: it takes no space


def test_files_have_maximum_sizes(untied, tmp_path, corpus):
    (untied / "decode.json").touch()
    for name, message in (("config.json", "as JSON: it has 1,099,511,627,776 bytes"), ("decode.json", "has 1,099,")):
        grow(untied / name)
        with pytest.raises(UserError, match=message):
            swept_settings(str(untied), []) if name == "decode.json" else load_model(str(untied))
    shutil.copy(corpus.tokenizer, tmp_path / "tokenizer.model")
    grow(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="is too large for a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        ("config.json", load_model, "no checkpoint at"),
        ("model.safetensors", load_model, "no weights in"),
        (weights.INDEX, load_model, "no weights in"),
        ("decode.json", lambda folder: swept_settings(folder, []), "it is missing, or not a file"),
        ("tokenizer.json", lambda folder: load_tokenizer(f"{folder}/tokenizer.json"), "has no tokenizer"),
    ],
)
def test_pipes_are_not_waited_for(untied, name, read, message):
    (untied / name).unlink(missing_ok=True)
    if name == weights.INDEX:
        (untied / "model.safetensors").unlink()
    os.mkfifo(untied / name)
    with pytest.raises(UserError, match=message):
        read(str(untied))


def test_a_pointer_of_git_lfs_is_named(untied):
    (untied / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS: run `git lfs pull`"):
        load_model(str(untied))
