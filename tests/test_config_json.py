"""Variants of a Hugging Face config.json: null values and other spellings."""

import json

from etils import epath
from models import tiny_model, write_llama

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.config_json import read_model_config


def test_null_means_the_default(tmp_path):
    """transformers writes null for settings that are not set."""
    model = tiny_model(1)
    write_llama(tmp_path, model.config, named_arrays(model))
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):
        values.pop(name)
    file.write_text(json.dumps(values | {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}))
    absent = read_model_config(epath.Path(tmp_path))
    assert (absent.rope_scaling, absent.rope_base) == ("linear", 10_000.0)
    values |= {"rms_norm_eps": None, "max_position_embeddings": None, "rope_theta": None}
    file.write_text(json.dumps(values | {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": None}}))
    assert read_model_config(epath.Path(tmp_path)) == absent
