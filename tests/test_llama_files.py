"""Which files and tensors of a Llama's folder are read: tied heads, indexes, shards, links, hostile names, sizes."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, write_llama
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz import split_weights
from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface import weights
from layerskip_jax.checkpoint.huggingface.config_json import read_model_config
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.checkpoint.reading import initial_model, load_model, open_model_folder
from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read(folder):
    """Return the named arrays of a model, as numpy arrays."""
    return {name: np.asarray(array) for name, array in named_arrays(load_model(str(folder))[0]).items()}


def change_tensors(folder, change):
    file = str(folder / "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_index(folder, weight_map):
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def untied(tmp_path):
    model = tiny_model(1)
    return write_llama(tmp_path / "untied", model.config, named_arrays(model))


@pytest.fixture
def tied(tmp_path):
    model = tiny_model(1, tied_embedding=True)
    return write_llama(tmp_path / "tied", model.config, named_arrays(model))


# Tied and untied heads


@pytest.mark.parametrize("unstacked", [False, True])
def test_the_head_of_the_files_wins_over_a_config_that_ties_it(untied, unstacked, capsys):
    """As in transformers: both tensors are there and differ, so the model is not tied, and a line says so."""
    expected, _, _ = load_model(str(untied), unstacked=unstacked)
    assert capsys.readouterr().err == ""
    set_config(untied, tie_word_embeddings=True)
    model, config, _ = load_model(str(untied), unstacked=unstacked)
    warning = capsys.readouterr().err
    assert warning.startswith("WARNING: ")
    assert "says tie_word_embeddings, but the files have a head that differs" in warning
    assert warning.count("\n") == 1
    assert not config.model.tied_embedding
    np.testing.assert_array_equal(model.head_DV, expected.head_DV)
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(model(tokens), expected(tokens))


@pytest.mark.parametrize("row", [0, 30, 60])
@pytest.mark.parametrize("compared", [32, 1 << 24])
def test_one_different_row_unties(tied, row, compared, monkeypatch):
    monkeypatch.setattr(weights, "COMPARED_VALUES", compared)

    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][row, 3] += 1

    change_tensors(tied, add_head)
    assert not open_model_folder(str(tied)).config.model.tied_embedding


def test_an_equal_head_stays_tied(tied, capsys):
    expected = read(tied)
    change_tensors(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    found = read(tied)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["embedding_VD"], expected["embedding_VD"])
    assert capsys.readouterr().err == ""


def test_a_head_of_another_shape_is_refused(tied):
    change_tensors(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:5].copy()}))
    with pytest.raises(UserError, match=r"lm_head\.weight in .* has shape \[5, 32\]"):
        load_model(str(tied))


@pytest.mark.parametrize("unstacked", [False, True])
def test_a_tied_matrix_may_be_stored_as_the_head(tied, unstacked):
    expected, _, _ = load_model(str(tied), unstacked=unstacked)
    change_tensors(tied, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    model, _, _ = load_model(str(tied), unstacked=unstacked)
    np.testing.assert_array_equal(model.embedding_VD, expected.embedding_VD)


def test_an_untied_model_needs_both(untied, tied):
    change_tensors(untied, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(UserError, match=r"lacks 1 tensors .* such as model\.embed_tokens\.weight"):
        load_model(str(untied))
    set_config(tied, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight: if .* set tie_word_embeddings to true"):
        load_model(str(tied))
    change_tensors(tied, lambda tensors: tensors.pop(EMBEDDING))
    set_config(tied, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lacks 1 tensors .* such as model\.embed_tokens\.weight"):
        load_model(str(tied))


@pytest.mark.parametrize("value", ["false", 1, 0, []])
def test_tying_is_true_or_false(tied, value):
    set_config(tied, tie_word_embeddings=value)
    with pytest.raises(UserError, match=r"tie_word_embeddings .* is not supported, it must be true or false or absent"):
        read_model_config(tied)


def test_training_starts_with_the_head_of_the_files(untied, tied, corpus):
    """`train.init_from` takes the same decision, and names the setting where the config says otherwise."""
    expected, tokenizer = read(untied), load_tokenizer(corpus.tokenizer)
    set_config(untied, tie_word_embeddings=True)
    model = tiny_model(2)
    started = initial_model(Config(model=model.config, train=TrainConfig(init_from=str(untied))), tokenizer, model)
    np.testing.assert_array_equal(started().head_DV, expected["head_DV"])
    missing = untied.parent / "missing"
    shutil.copytree(untied, missing)
    names = split_weights(missing, 3)
    (missing / names[EMBEDDING]).unlink()
    config = Config(model=model.config, train=TrainConfig(init_from=str(missing)))
    with pytest.raises(UserError, match="safetensors"):  # before any process reads the weights
        initial_model(config, tokenizer, model)
    wrong = Config(
        model=dataclasses.replace(model.config, tied_embedding=True), train=TrainConfig(init_from=str(untied))
    )
    with pytest.raises(UserError, match=r"have model\.tied_embedding False, .* set --model\.tied_embedding False"):
        initial_model(wrong, tokenizer, model)

    expected = read(tied)
    change_tensors(tied, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    model = tiny_model(2, tied_embedding=True)
    started = initial_model(Config(model=model.config, train=TrainConfig(init_from=str(tied))), tokenizer, model)
    np.testing.assert_array_equal(started().embedding_VD, expected["embedding_VD"])


# Files and indexes


def test_a_single_file_wins_over_an_index(untied):
    """As in transformers: the index and its files may be older, or gone."""
    expected = load_file(str(untied / "model.safetensors"))
    names = split_weights(untied, 3)
    for file in set(names.values()):
        change = load_file(str(untied / file))
        save_file({name: -values for name, values in change.items()}, str(untied / file))
    save_file(expected, str(untied / "model.safetensors"))
    np.testing.assert_array_equal(read(untied)["embedding_VD"], expected[EMBEDDING])
    for file in set(names.values()):
        (untied / file).unlink()
    np.testing.assert_array_equal(read(untied)["embedding_VD"], expected[EMBEDDING])


@given(files=st.integers(1, 5), data=st.data())
@settings(max_examples=10)
def test_the_files_decide_which_tensors_they_have(tmp_path_factory, files, data):
    """An index with tensors in the wrong one of its files, without some, or with others that are nowhere."""
    model = tiny_model(1, num_layers=2)
    folder = write_llama(tmp_path_factory.mktemp("sharded") / "x", model.config, named_arrays(model))
    expected = read(folder)
    names = split_weights(folder, files)
    shards = sorted(set(names.values()))
    listed = dict(zip(shards, shards)) | {
        name: data.draw(st.sampled_from(shards)) for name in data.draw(st.sets(st.sampled_from(sorted(names))))
    }
    write_index(folder, listed)
    found = read(folder)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_a_tensor_that_no_file_has_is_named(untied):
    names = split_weights(untied, 3)
    for name in (HEAD, EMBEDDING, "model.layers.2.mlp.up_proj.weight"):
        file = str(untied / names[name])
        tensors = load_file(file)
        save_file({other: values for other, values in tensors.items() if other != name}, file)
        with pytest.raises(UserError, match=rf"lacks .*{name}"):
            load_model(str(untied))
        save_file(tensors, file)


@pytest.mark.parametrize(
    "index",
    [
        [],
        None,
        "x",
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": {}},
        {"weight_map": {HEAD: 1}},
        {"weight_map": {HEAD: None}},
        {"weight_map": {HEAD: ["model-00001.safetensors"]}},
    ],
)
def test_an_index_of_another_form_is_refused(untied, index):
    split_weights(untied, 3)
    (untied / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"needs a weight_map|must be a JSON object"):
        load_model(str(untied))


def test_a_missing_file_of_the_index_is_named(untied):
    names = split_weights(untied, 3)
    (untied / names[HEAD]).unlink()
    with pytest.raises(UserError, match=rf"lacks the file {names[HEAD]}, which its .* names: download it too"):
        load_model(str(untied))


# Paths and links


@pytest.mark.parametrize(
    "name",
    [
        "../{}",
        "/tmp/../{}",
        "{}",
        "sub/../../{}",
        "link.safetensors",
        "linked/model.safetensors",
        "a\0b",
        "\ud800",
        "x" * 300,
    ],
)
def test_an_index_leads_to_no_file_outside(untied, tmp_path, name):
    secret = tmp_path / "secret"
    secret.mkdir()
    os.replace(untied / "model.safetensors", secret / "model.safetensors")
    (untied / "link.safetensors").symlink_to(secret / "model.safetensors")
    (untied / "linked").symlink_to(secret)
    absolute = str(secret / "model.safetensors")
    write_index(untied, {HEAD: name.format(absolute if name == "{}" else "secret/model.safetensors")})
    with pytest.raises(UserError, match=r"leads out of the folder|which is not a valid path|lacks the file"):
        load_model(str(untied))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", weights.INDEX])
def test_a_link_out_of_the_folder_is_refused(untied, tmp_path, file):
    if file == weights.INDEX:
        split_weights(untied, 3)
    os.replace(untied / file, tmp_path / "elsewhere")
    (untied / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        load_model(str(untied))


def test_links_within_the_folder_and_to_it_are_followed(untied, tmp_path):
    expected = read(untied)
    names = split_weights(untied, 3)
    (untied / "data").mkdir()
    for file in set(names.values()):
        os.replace(untied / file, untied / "data" / file)
        (untied / file).symlink_to(Path("data") / file)
    (tmp_path / "with a space é").symlink_to(untied)
    np.testing.assert_array_equal(read(tmp_path / "with a space é")["head_DV"], expected["head_DV"])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("repository", ["models--org--name", "cache"])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_snapshot_of_the_cache_is_read(untied, tmp_path, corpus, sharded, repository, kind):
    """huggingface_hub stores a repository's files in ``blobs``, and a snapshot of links to them."""
    expected = read(untied)
    if sharded:
        split_weights(untied, 3)
    tokenizer = load_tokenizer(corpus.tokenizer)
    for name, content in tokenizer.files.items() if kind == "tokenizer.model" else tokenizer_files(tokenizer).items():
        (untied / name).write_bytes(content)
    tokenizer = load_tokenizer(str(untied / kind))
    blobs, snapshot = tmp_path / repository / "blobs", tmp_path / repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(untied.iterdir())):
        os.replace(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    np.testing.assert_array_equal(read(snapshot)["head_DV"], expected["head_DV"])
    assert load_tokenizer(str(load_model(str(snapshot))[2])).files == tokenizer.files
    (tmp_path / "latest").symlink_to(snapshot)
    assert load_tokenizer(str(load_model(str(tmp_path / "latest"))[2])).files == tokenizer.files


def test_a_circle_of_links_is_an_error(untied):
    (untied / "model.safetensors").unlink()
    (untied / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(UserError, match=r"which is not a valid path|no weights"):
        load_model(str(untied))


@given(parts=st.lists(st.sampled_from(["..", ".", "a", "b", "", "link", "out"]), max_size=6), absolute=st.booleans())
def test_every_name_stays_inside_or_is_refused(tmp_path_factory, parts, absolute):
    root = tmp_path_factory.mktemp("names", numbered=True)
    folder = root / "models--x"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "link").symlink_to("a")
    (folder / "out").symlink_to("..")
    name = ("/" if absolute else "") + "/".join(parts)
    real = Path(os.path.realpath(os.path.join(folder, name)))
    try:
        found = file_inside(folder, name)
    except UserError:
        assert not real.is_relative_to(folder)
    else:
        assert Path(os.path.realpath(found)).is_relative_to(folder)
