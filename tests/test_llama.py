"""Hugging Face Llamas, tested without transformers: stored logits, round trips, shards, errors, commands."""

import dataclasses
import json
import math
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from etils import epath
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config, write_llama
from safetensors import safe_open
from safetensors.numpy import save_file

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface import weights
from layerskip_jax.checkpoint.huggingface.config_json import config_json, read_model_config
from layerskip_jax.checkpoint.reading import context_length, initial_model, load_model, open_model_folder
from layerskip_jax.checkpoint.swept import swept_settings
from layerskip_jax.commands import decode
from layerskip_jax.commands.export import export_model
from layerskip_jax.config import Config, DecodeConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.loop import train
from layerskip_jax.training.step import Trainer

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "llama_reference.npz")
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 37,
}
REFERENCE_CONFIGS = {
    "multi_head": {"hidden_act": "silu", "sliding_window": None},
    "grouped": {"num_key_value_heads": 2, "rope_theta": 5000.0, "rope_scaling": None, "attention_bias": False},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "head_dim": 8},
}


def write_reference(folder, name="grouped", **changes):
    """Write a model in the format of transformers; return tokens and their logits, computed by transformers."""
    prefix = f"{name}/"
    tensors = {key.removeprefix(prefix): REFERENCE[key] for key in REFERENCE.files if key.startswith(prefix)}
    tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | REFERENCE_CONFIGS[name] | changes))
    save_file(tensors, str(folder / "model.safetensors"))
    return jnp.asarray(tokens), logits


# Logits


@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
@pytest.mark.parametrize("unstacked", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, name, unstacked):
    tokens, logits = write_reference(tmp_path, name)
    model, _, _ = load_model(str(tmp_path), unstacked=unstacked)
    np.testing.assert_allclose(model(tokens), logits, atol=1e-4, rtol=1e-4)


# Round trips


@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    width=st.sampled_from([0, 6]),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    file_bytes=st.sampled_from([1, 4000, 1 << 30]),
)
@settings(max_examples=12)
def test_weights_round_trip_bit_for_bit(tmp_path_factory, layers, heads, width, tied, dtype, file_bytes):
    """Write, read and write again, in one file or many."""
    folder = tmp_path_factory.mktemp("trip")
    config = tiny_config(
        num_layers=layers, dim=24, num_heads=heads[0], num_kv_heads=heads[1], head_width=width, tied_embedding=tied
    )
    shapes = named_arrays(jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(layers)
    arrays = {name: random.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
    first = write_llama(folder / "first", config, arrays, dtype=dtype)
    read, _, _ = load_model(str(first))
    for name, array in named_arrays(read).items():
        np.testing.assert_array_equal(array, arrays[name].astype(dtype).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "FILE_BYTES", file_bytes)
        second = write_llama(folder / "second", config, jax.device_get(named_arrays(read)), dtype=dtype)
    assert stored_tensors(first) == stored_tensors(second)
    assert (len(list(second.glob("*.safetensors"))) > 1) == (file_bytes < 1 << 30)
    for old, new in zip(jax.tree.leaves(read), jax.tree.leaves(load_model(str(second))[0]), strict=True):
        np.testing.assert_array_equal(old, new)


def stored_tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                found[name] = opened.get_slice(name).get_dtype(), opened.get_tensor(name).tobytes()
    return found


@given(
    changes=st.fixed_dictionaries(
        {
            "num_kv_heads": st.sampled_from([1, 2, 4]),
            "head_width": st.sampled_from([0, 6, 10]),
            "rope_base": st.sampled_from([1e4, 5e5]),
            "tied_embedding": st.booleans(),
            "norm_epsilon": st.sampled_from([1e-5, 1e-6]),
            "context_length": st.integers(1, 1 << 20),
        }
    ),
    scaling=st.sampled_from(
        [
            {},
            {"rope_scaling": "linear", "rope_factor": 2.5},
            {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_low_freq_factor": 2.0, "rope_original_length": 64},
        ]
    ),
    newer=st.booleans(),
)
def test_a_config_round_trips(tmp_path_factory, changes, scaling, newer):
    folder, config = tmp_path_factory.getbasetemp(), tiny_config(**changes, **scaling)
    values = config_json(config, config.context_length, "float32", 1, 2)
    if newer:  # the spelling of transformers 5
        values["rope_parameters"] = (values.pop("rope_scaling") or {"rope_type": "default"}) | {
            "rope_theta": values.pop("rope_theta")
        }
    (folder / "config.json").write_text(json.dumps(values))
    assert read_model_config(epath.Path(folder)) == dataclasses.replace(config, compute_dtype="auto")


@pytest.mark.parametrize("shape", [(1, 4, 1, 2), (2, 4, 1, 1)])
def test_each_device_reads_its_shards(llama, model, shape, monkeypatch):
    """The values on a mesh equal those on one device, and no sharded array is read whole."""
    config = Config(
        model=dataclasses.replace(model.config, vocab_size=VOCABULARY),
        mesh=MeshConfig(*shape),
        train=TrainConfig(batch_size=8),
    )
    target = named_arrays(Trainer(config, Recipe.from_config(config), make_mesh(config)).abstract_state().model)
    sizes = []
    aligned = weights._aligned
    monkeypatch.setattr(
        weights, "_aligned", lambda shape, dtype: sizes.append(math.prod(shape)) or aligned(shape, dtype)
    )
    arrays = open_model_folder(str(llama)).weights(target)
    for name, array in named_arrays(model).items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].sharding == target[name].sharding
    assert max(sizes) == max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in target.values())


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, 'model_type "qwen2" is not supported, it must be "llama"'),
        ({"attention_bias": True}, "attention_bias true is not supported, it must be false or absent"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported, it must be absent"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported'),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rotary scaling "dynamic" is not supported'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rotary scaling "yarn" is not supported'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number, not null"),
        ({"rope_scaling": "linear"}, 'rotary scaling must be a JSON object, not "linear"'),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps must be a number, not "small"'),
        ({"hidden_size": None}, r"hidden_size must be a whole number below 2\^31, not null"),
        ({"num_hidden_layers": 4}, r"lacks 9 tensors .* such as model\.layers\.3\.input_layernorm\.weight"),
        (
            {"num_hidden_layers": 2},
            r"has tensors that do not belong to the Llama .*, such as model\.layers\.2\.input_layernorm",
        ),
        ({"intermediate_size": 48}, r"mlp\.gate_proj.* has shape \[40, 32\], but its config.json implies \[48, 32\]"),
    ],
)
def test_models_that_compute_differently_are_refused(tmp_path, changes, message):
    write_reference(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


def test_unreadable_files_are_errors(tmp_path):
    write_reference(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors as safetensors"):
        load_model(str(tmp_path))
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights in .*\(\.bin files are not read\)"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"cannot read .*config\.json as JSON"):
        load_model(str(tmp_path))


def test_integer_weights_are_refused(tmp_path):
    write_reference(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"model.norm.weight": np.ones(32, np.int8)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="is of type I8: only F64, F32, BF16, F16 can be read"):
        load_model(str(tmp_path))


# Commands


def test_a_folder_stores_its_context_length(model, tmp_path):
    """Evaluations use it, because the folder does not store the sequence length of training."""
    write_llama(tmp_path / "long", dataclasses.replace(model.config, context_length=4096), named_arrays(model))
    assert context_length(open_model_folder(str(tmp_path / "long")).config) == 4096


def test_decode_takes_a_folder(llama, capsys):
    arguments = [
        "--checkpoint",
        str(llama),
        "--prompt",
        "def x",
        "--max_new_tokens",
        "24",
        "--json",
        "--exit_layer",
        "2",
    ]
    tokens = {}
    for kind in ("full", "int8"):
        decode.main([*arguments, "--weights", kind])
        tokens[kind] = json.loads(capsys.readouterr().out.splitlines()[0])["tokens"]
    model, _, tokenizer_path = load_model(str(llama))
    settings = DecodeConfig(exit_layer=2, max_new_tokens=24)
    generator = TextGenerator(model.unstacked(), load_tokenizer(str(tokenizer_path)), settings)
    assert tokens["full"] == generator.generate(["def x"]).completions[0].tokens
    assert tokens["int8"]
    assert swept_settings(str(llama), []) == {}


def test_a_folder_without_a_tokenizer_is_an_error(model, tmp_path):
    write_llama(tmp_path, model.config, named_arrays(model))
    _, _, tokenizer_path = load_model(str(tmp_path))
    with pytest.raises(UserError, match=r"has no tokenizer: put its tokenizer\.json or tokenizer\.model next to"):
        load_tokenizer(str(tokenizer_path))


def test_training_starts_from_a_folder_and_exports_to_one(corpus, tokenizer, llama, model, tmp_path):
    """With almost no learning rate, the exported weights are the imported ones."""
    config = Config(
        model=model.config,
        data=dataclasses.replace(corpus, tokenizer=str(llama / "tokenizer.model")),
        optimizer=OptimizerConfig(learning_rate=1e-30, warmup_steps=0, weight_decay=0.0),
        train=TrainConfig(
            run_dir=str(tmp_path / "run"),
            steps=1,
            batch_size=8,
            loss_chunk=32,
            evaluate_batches=1,
            init_from=str(llama),
        ),
    )
    state = train(config)
    for name, array in named_arrays(model).items():
        np.testing.assert_allclose(named_arrays(state.model)[name], array, atol=1e-20)
    export_model(config.train.run_dir, str(tmp_path / "exported"))
    assert stored_tensors(tmp_path / "exported") == stored_tensors(llama)
    assert read_model_config(epath.Path(tmp_path / "exported")).context_length == config.data.sequence_length
    with pytest.raises(UserError, match="exists: name a new folder"):
        export_model(config.train.run_dir, str(tmp_path / "exported"))
    # A resumed run needs no `init_from`, and another run can start from that run too.
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from="")))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.model
    )
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=config.train.run_dir))
    for old, new in zip(jax.tree.leaves(state.model), jax.tree.leaves(initial_model(again, tokenizer, abstract)())):
        np.testing.assert_array_equal(old, new)


def test_weights_that_do_not_fit_the_config_are_refused(corpus, tokenizer, llama, model, tmp_path):
    def check(**changes):
        config = Config(model=dataclasses.replace(model.config, **changes), train=TrainConfig(init_from=str(llama)))
        initial_model(config, tokenizer, model)

    check(compute_dtype="bfloat16", context_length=8)
    with pytest.raises(
        UserError, match=r"have model\.num_kv_heads 2, but the config says 4: set --model\.num_kv_heads 2"
    ):
        check(num_kv_heads=4)
    with pytest.raises(UserError, match=r"have model\.rope_scaling none, but the config says llama3"):
        check(rope_scaling="llama3")
    other = dataclasses.replace(tokenizer, model=tokenizer.model + b"\0")
    with pytest.raises(UserError, match=r"differs from the tokenizer of .*set --data\.tokenizer .*tokenizer\.model"):
        initial_model(Config(model=model.config, train=TrainConfig(init_from=str(llama))), other, model)
    # A tokenizer of the other kind cannot be compared.
    folder = Path(shutil.copytree(llama, tmp_path / "llama"))
    (folder / "tokenizer.json").unlink()
    json_tokenizer = types.SimpleNamespace(files={"tokenizer.json": b"{}"})
    with pytest.raises(UserError, match=r"differs from the tokenizer of .*set --data\.tokenizer .*tokenizer\.model"):
        initial_model(Config(model=model.config, train=TrainConfig(init_from=str(folder))), json_tokenizer, model)


def test_impossible_shapes_are_refused():
    with pytest.raises(UserError, match=r"model\.head_width must be even"):
        tiny_config(head_width=7)
    with pytest.raises(UserError, match=r"rope_low_freq_factor 4.0 must be less than model.rope_high_freq_factor 4.0"):
        ModelConfig(rope_low_freq_factor=4.0)
