"""Decoding with a model that is split over several devices gives the texts of one device."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest
from models import tiny_config, tiny_model

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.commands import decode, sweep, tasks
from layerskip_jax.config import DecodeConfig
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.decoding import request as requests
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.engine import begin, generate
from layerskip_jax.decoding.quantization import quantized
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.likelihood import log_likelihoods
from layerskip_jax.sharding import check_tensor_divides, mesh_size, named_shardings, tensor_parallel
from layerskip_jax.training.loop import train

SHAPE = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 64}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
SPECULATIVE = {"mode": "self_speculative", "exit_layer": 1, "draft_length": 2}
SETTINGS = {
    "plain": {"mode": "autoregressive"},
    "sampled": SPECULATIVE | {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "adaptive": SPECULATIVE | {"policy": "adaptive", "exits": (1, 2)},
    "hybrid": SPECULATIVE | {"lookup_length": 3},
    "choices": SPECULATIVE | {"choices": 3},
    "confident exit": {"mode": "early_exit", "exits": (1,), "exit_threshold": 0.05},
}


def split(model):
    """Return an unstacked copy of a stacked model, split over the devices of the current mesh."""
    return jax.device_put(model, named_shardings(model, model, jax.sharding.get_mesh())).unstacked()


def outcome(model, settings):
    """Return the texts, and how they were drafted."""
    model, strategy = configure(settings, model)
    generation = generate(model, PROMPTS, 40, strategy, seed=3)
    return generation.tokens, generation.rounds, generation.exit_rounds, generation.drafted, generation.accepted


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_and_the_drafts_are_those_of_one_device(name):
    settings = dataclasses.replace(DecodeConfig(), **SETTINGS[name])
    model = tiny_model(**SHAPE, tied_embedding="sampled" in name)
    expected = outcome(model.unstacked(), settings)
    with tensor_parallel(2 if "sampled" in name else 4):
        assert outcome(split(model), settings) == expected


def test_a_model_that_was_unstacked_for_another_number_of_devices_is_refused():
    """Each device would attend with the columns of other heads."""
    model, plain = tiny_model(**SHAPE), dataclasses.replace(DecodeConfig(), mode="autoregressive")
    alone, message = model.unstacked(), r"by unstacked\(\) for {} device\(s\) along the tensor axis, and runs on {}"
    with tensor_parallel(2):
        both = split(model)
        with pytest.raises(UserError, match=message.format(1, 2)):
            outcome(alone, plain)
    with pytest.raises(UserError, match=message.format(2, 1)):
        outcome(both, plain)


def test_every_device_holds_its_share_of_the_matrices_and_of_the_cache():
    _, strategy = configure(DecodeConfig(), tiny_model(**SHAPE).unstacked())
    with tensor_parallel(4):
        model = split(tiny_model(**SHAPE))
        state = begin(model, PROMPTS, 40, strategy)
        arrays = [leaf for leaf in jax.tree.leaves((model, state.cache.layers)) if leaf.ndim > 1]
    assert len(arrays) == 3 * (4 + 2) + 2
    for array in arrays:
        assert array.addressable_shards[0].data.size == array.size // 4


def test_int8_weights_are_split_too():
    model, settings = tiny_model(**SHAPE), DecodeConfig(mode="autoregressive")
    expected = outcome(quantized(model.unstacked()), settings)[0]
    with tensor_parallel(4):
        assert outcome(quantized(split(model)), settings)[0] == expected


def test_the_likelihoods_are_those_of_one_device():
    model, pairs = tiny_model(**SHAPE), [([1, 2], [3, 4]), ([5], [6])]
    expected = log_likelihoods(model.unstacked(), pairs, 2, 20, batch_size=2)
    with tensor_parallel(4):
        found = log_likelihoods(split(model), pairs, 2, 20, batch_size=2)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A run whose keys and values can be split over two devices."""
    _, config, tokenizer = load_model(trained_run)
    folder = str(tmp_path_factory.mktemp("split") / "run")
    changes = {"model.num_kv_heads": 2, "train.steps": 1, "train.run_dir": folder, "data.tokenizer": str(tokenizer)}
    train(apply_overrides(config, changes))
    return folder


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("folder", ["run", "llama"])
def test_loading_reads_the_weights_into_shards(folder, unstacked, request):
    path = str(request.getfixturevalue(folder))
    expected, _, _ = load_model(path)
    with tensor_parallel(2):
        model, _, _ = load_model(path, unstacked=unstacked)
        expected = split(expected) if unstacked else expected
    for (name, array), other in zip(named_arrays(model).items(), named_arrays(expected).values(), strict=True):
        np.testing.assert_array_equal(array, other, err_msg=name)
        shards = 2 if array.ndim > (1 if unstacked or not name.startswith("blocks.") else 2) else 1
        assert array.addressable_shards[0].data.size == array.size // shards, name


def test_decode_prints_the_same_text_with_two_devices(llama, capsys):
    printed = []
    for devices in ("1", "2"):
        arguments = [str(llama), "--prompt", "def x", "--max_new_tokens", "8", "--exit_layer", "2", "--json"]
        decode.main([*arguments, "--tensor_parallel", devices])
        printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert printed[0][0] == printed[1][0]
    assert printed[0][1]["accepted_histogram"] == printed[1][1]["accepted_histogram"]
    assert jax.sharding.get_mesh().empty


@pytest.mark.parametrize(("command", "options"), [(sweep, ["--prompt", "def x"]), (tasks, ["--task", "topv2={}"])])
def test_the_other_commands_load_the_model_on_as_many_devices(command, options, llama, tmp_path, monkeypatch):
    def load(*_, **__):
        raise UserError(f"{mesh_size('heads')} devices")

    monkeypatch.setattr(command, "load_model", load)
    file = tmp_path / "topv2.tsv"
    file.write_text("domain\tutterance\tsemantic_parse\nalarm\twake me\t[IN:CREATE_ALARM ]\n")
    with pytest.raises(UserError, match=r"^2 devices$"):
        command.main([str(llama), *(option.format(file) for option in options), "--tensor_parallel", "2"])


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("9", "--tensor_parallel must be in 1..8, the devices of this process, not 9"),
        ("8", "model.num_heads 4 is not divisible by --tensor_parallel = 8 devices: use a divisor"),
        ("0", "--tensor_parallel"),
    ],
)
def test_a_wrong_number_of_devices_is_one_line(llama, devices, message):
    with pytest.raises(UserError, match=re.escape(message)):
        decode.main([str(llama), "--prompt", "def x", "--tensor_parallel", devices])


@pytest.mark.parametrize("name", ["num_heads", "num_kv_heads", "ffn_dim", "vocab_size"])
def test_every_split_dimension_is_checked(name):
    sizes = {"num_heads": 8, "num_kv_heads": 4, "ffn_dim": 48, "vocab_size": 64}
    check_tensor_divides(tiny_config(**sizes), "mesh.tensor", 4)
    wrong = sizes | {name: 50} if name in ("ffn_dim", "vocab_size") else sizes | {"num_heads": 2, "num_kv_heads": 2}
    with pytest.raises(UserError, match=r"is not divisible by mesh.tensor = 4 devices: use a divisor"):
        check_tensor_divides(tiny_config(**wrong), "mesh.tensor", 4)


def test_a_cache_must_fit_into_the_memory_of_each_device(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20}, device_kind="chip")
    monkeypatch.setattr(requests.jax, "local_devices", lambda: [device])
    config = tiny_config(num_kv_heads=4, num_layers=4)  # a position takes 4 layers x 2 x 32 x 4 bytes
    with pytest.raises(UserError, match=r"takes 0.0 GiB, and the device \(chip\)"):
        requests._check_memory(config, 4, 1024)
    monkeypatch.setattr(requests, "mesh_size", lambda axis: 4)
    requests._check_memory(config, 4, 1024)
    with pytest.raises(UserError, match="lower max_new_tokens"):
        requests._check_memory(config, 4, 1025)
