"""Comparison with transformers, if it is installed (extra ``benchmarks``); tests/test_llama.py uses stored logits.

``python -m benchmarks.parity`` compares 256 tokens.
"""

import pytest

PEERS = "pip install -e '.[benchmarks]'"
pytest.importorskip("torch", reason=PEERS)
transformers = pytest.importorskip("transformers", reason=PEERS)

from benchmarks.parity import SHAPES, compare, make, stored_tensors  # noqa: E402
from layerskip_jax.checkpoint.arrays import named_arrays  # noqa: E402
from layerskip_jax.checkpoint.reading import load_model  # noqa: E402

transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_text_and_bytes_equal_those_of_transformers(name):
    row = compare(name, tokens=40)
    print(row)
    assert row["logit_difference"] < 1e-4
    assert row["equal_tokens"] == 40
    assert row["same_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types_round_trip_bit_for_bit(dtype):
    row = compare("grouped", tokens=1, dtype=dtype)
    assert row["same_bytes"]
    assert row["logit_difference"] < 1e-4


def test_files_with_an_index_are_read(tmp_path):
    for name, size in (("one", "1GB"), ("many", "30KB")):
        make(SHAPES["tied_grouped"], str(tmp_path / name), max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert stored_tensors(tmp_path / "one") == stored_tensors(tmp_path / "many")
    one, many = (named_arrays(load_model(str(tmp_path / name))[0]) for name in ("one", "many"))
    assert all((one[name] == many[name]).all() for name in one)
