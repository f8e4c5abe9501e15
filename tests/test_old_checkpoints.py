"""A stored run that an older version wrote: it loads, decodes and resumes with the numbers of that version.

``tests/fixtures/make_run_before_packages.py`` made it, with the code of commit f83d5dd.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from corpora import make_corpus

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.training.loop import train
from layerskip_jax.training.monitoring.metrics import read_records

FOLDER = Path(__file__).parent / "fixtures" / "run_before_packages"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A copy of the stored run: orbax cleans up folders that it opens."""
    shutil.copytree(FOLDER, tmp_path / "run")
    return str(tmp_path / "run")


def test_an_old_run_decodes_the_same_text(run):
    model, config, tokenizer = load_model(run)
    logits_BTV = model(jnp.arange(1, 17)[None])
    np.testing.assert_allclose(logits_BTV[0, :, 7], EXPECTED["logits"], rtol=1e-5, atol=1e-6)
    generator = TextGenerator(model.unstacked(), load_tokenizer(str(tokenizer)), config.decode)
    assert generator.generate(["def x"]).completions[0].tokens == EXPECTED["tokens"]


def test_an_old_run_resumes(run, tmp_path, capsys):
    """The third step reads the same rows, with the same optimizer state, as it did in the old version."""
    config = read_config(find_checkpoint(run))
    corpus = make_corpus(tmp_path / "corpus")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=corpus.path, tokenizer=f"{run}/checkpoints/tokenizer.model"),
        train=dataclasses.replace(config.train, run_dir=run, steps=3),
    )
    state = train(config)
    assert "resuming after step 2" in capsys.readouterr().out
    objectives = [record["train/objective"] for record in read_records(run) if "train/objective" in record]
    np.testing.assert_allclose(objectives, EXPECTED["objectives"], rtol=1e-5)
    norms = {name: jnp.linalg.norm(array) for name, array in named_arrays(state.model).items()}
    assert norms.keys() == EXPECTED["norms"].keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, EXPECTED["norms"][name], rtol=1e-5, err_msg=name)
