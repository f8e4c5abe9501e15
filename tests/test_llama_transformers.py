"""Comparison with transformers' models, if torch is installed (extra ``benchmarks``).

tests/test_llama.py compares with stored logits, and needs no torch.
``python -m benchmarks.parity`` compares 256 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama_files import EMBEDDING, HEAD, change_tensors

PEERS = "pip install -e '.[benchmarks]'"
torch = pytest.importorskip("torch", reason=PEERS)

import transformers  # noqa: E402

from benchmarks.parity import LLAMA3, SHAPES, compare, make, random_folder, stored_tensors  # noqa: E402
from layerskip_jax.checkpoint.arrays import named_arrays  # noqa: E402
from layerskip_jax.checkpoint.reading import load_model  # noqa: E402

transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_text_and_bytes_equal_those_of_transformers(name):
    row = compare(SHAPES[name], tokens=40)
    print(row)
    assert row["logit_difference"] < 1e-4
    assert row["equal_tokens"] == 40
    assert row["same_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types_round_trip_bit_for_bit(dtype):
    row = compare(SHAPES["grouped"], tokens=1, dtype=dtype)
    assert row["same_bytes"]
    assert row["logit_difference"] < 1e-4


@given(seed=st.integers(0, 2**32))
@settings(max_examples=4)
def test_random_folders_equal_those_of_transformers(seed):
    """``python -m benchmarks.parity --random 40`` compares more."""
    shape, dtype, saving = random_folder(seed)
    row = compare(shape, 24, dtype, **saving)
    assert row["logit_difference"] < 1e-4
    assert row["equal_tokens"] == 24
    assert row["same_bytes"]


@pytest.mark.parametrize("case", ["both", "head only", "single file and index"])
def test_ties_and_stale_files_are_read_as_by_transformers(tmp_path, case, caplog):
    folder = tmp_path / "model"
    make(SHAPES["tied_grouped"], str(folder))
    if case == "both":
        change_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][::-1].copy()}))
    elif case == "head only":
        change_tensors(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    else:
        make(SHAPES["tied_grouped"] | {"initializer_range": 0.3}, str(tmp_path / "old"), max_shard_size="30KB")
        for file in (tmp_path / "old").glob("model*"):
            file.rename(folder / file.name)
    tokens = np.arange(30)[None]
    theirs = transformers.LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model, config, _ = load_model(str(folder))
    assert config.model.tied_embedding == (case != "both")
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 2048},
    ],
)
def test_logits_at_4096_positions(tmp_path, rotary):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "rope_parameters": rotary}
    make(shape | {"num_hidden_layers": 2, "max_position_embeddings": 4096}, str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 256, (1, 4096))
    theirs = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model, _, _ = load_model(str(tmp_path))
    np.testing.assert_allclose(jax.jit(lambda model, tokens: model(tokens))(model, tokens), expected, atol=5e-5)


def test_files_with_an_index_are_read(tmp_path):
    for name, size in (("one", "1GB"), ("many", "30KB")):
        make(SHAPES["tied_grouped"], str(tmp_path / name), max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert stored_tensors(tmp_path / "one") == stored_tensors(tmp_path / "many")
    one, many = (named_arrays(load_model(str(tmp_path / name))[0]) for name in ("one", "many"))
    assert all((one[name] == many[name]).all() for name in one)
