"""The loop of `benchmarks.variants` computes the steps of training, and each variant does what its docstring says."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from models import tiny_config

from benchmarks.variants import VARIANTS, Run, main
from layerskip_jax.config import Config, DataConfig, EarlyExitConfig, LayerDropoutConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.errors import UserError
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import auto_mesh
from layerskip_jax.training.optimizer import matrix_axes
from layerskip_jax.training.step import Trainer

EXIT = 2
ONE_DEVICE = auto_mesh(np.reshape(jax.devices()[:1], (1, 1, 1, 1)))
CONFIG = Config(
    model=tiny_config(vocab_size=64),
    data=DataConfig(sequence_length=16),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    early_exit=EarlyExitConfig(
        "fixed", exits=(EXIT,), distillation="kl", distillation_weight=0.75, agreement_weight=0.1
    ),
    train=TrainConfig(steps=9, batch_size=8, loss_chunk=4),
)
TAUGHT = ["--early_exit.curriculum=fixed", "--early_exit.exits=3", "--early_exit.distillation=kl"]
DROPOUT = dataclasses.replace(CONFIG, layer_dropout=LayerDropoutConfig(p_max=0.5, time_scale="decaying", rescale=True))


def batch(seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (8, 17), 0, 64)
    mask = jax.random.bernoulli(jax.random.key(9), 0.8, (8, 16)).astype(jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((8, 16), int), mask)


def trained(name, config=CONFIG, steps=3):
    run = Run(VARIANTS[name], config)
    state = run.init()
    for step in range(steps):
        state, _ = run.step(state, batch(step))
    return state.parameters


@pytest.mark.parametrize("tied", [False, True])
def test_the_recipe_takes_the_steps_of_training(tied):
    """At step 7 of 9, where the drop rates of the decaying time scale are small but not 0."""
    sgd = OptimizerConfig(name="sgd", learning_rate=1.0, warmup_steps=0, clip_norm=1e9)
    config = dataclasses.replace(DROPOUT, model=tiny_config(vocab_size=64, tied_embedding=tied), optimizer=sgd)
    trainer, run = Trainer(config, Recipe.from_config(config), ONE_DEVICE), Run(VARIANTS["recipe"], config)
    state = run.init()
    training = dataclasses.replace(trainer.init(state.parameters[0]), step=jnp.int32(7))
    training, metrics = trainer.step(training, batch())
    state, value = run.step(state._replace(step=jnp.int32(7)), batch())
    np.testing.assert_allclose(value, metrics.objective, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.parameters[0], training.model)


def exit_gradients(name, parameters):
    """Return the gradients of sum(sin(logits of exit E)) for the model and the extra parameters."""
    run = Run(VARIANTS[name], CONFIG)
    return jax.grad(lambda parameters: jnp.sum(jnp.sin(run.logits(parameters, batch())[0])))(parameters)


def test_an_exit_block_leaves_the_plain_model_as_it_is():
    plain, unused = trained("plain")
    model, extra = trained("exit_block")
    # They are two programs, which round differently.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-4), model, plain)
    assert not jnp.array_equal(extra.blocks.gate_DF, unused.blocks.gate_DF)
    gradient, extra_gradient = exit_gradients("exit_block", (model, extra))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert jnp.any(extra_gradient.blocks.gate_DF[...] != 0)


def test_a_late_exit_starts_with_the_last_exit_alone_and_ends_as_the_recipe():
    """Without layer dropout, it starts as the plain model; with it, the last exit alone has a loss there."""
    parameters = trained("recipe")
    late, plain, recipe = (Run(VARIANTS[name], CONFIG).objective for name in ("late_exit", "plain", "recipe"))
    assert late(parameters, batch(), 2) == plain(parameters, batch(), 2)
    assert late(parameters, batch(), 3) == recipe(parameters, batch(), 3)
    alone = dataclasses.replace(DROPOUT, early_exit=EarlyExitConfig())
    trainer = Trainer(alone, Recipe.from_config(alone), ONE_DEVICE)
    state = dataclasses.replace(trainer.init(parameters[0]), step=jnp.int32(2))
    value = Run(VARIANTS["late_exit"], DROPOUT).objective(trained("recipe"), batch(), 2)
    np.testing.assert_allclose(value, trainer.step(state, batch())[1].objective, rtol=1e-5)


def test_muon_trains_the_matrices_of_the_exit_block():
    _, extra = Run(VARIANTS["exit_block"], CONFIG).init().parameters
    assert matrix_axes(extra).blocks.gate_DF.get_value() is not None
    assert matrix_axes(extra).gain_D.get_value() is None


@pytest.mark.parametrize(("name", "learns"), [("recipe", True), ("frozen_head", False)])
def test_a_frozen_head_learns_from_the_last_exit_alone(name, learns):
    gradient, _ = exit_gradients(name, trained("recipe"))
    assert [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient.head())] == [learns, learns]
    assert jnp.any(gradient.blocks.down_FD[...][:EXIT] != 0)


def test_a_gain_of_one_changes_nothing_and_is_trained():
    parameters = trained("recipe")
    recipe, gain = (Run(VARIANTS[name], CONFIG) for name in ("recipe", "exit_gain"))
    jax.tree.map(np.testing.assert_array_equal, gain.logits(parameters, batch()), recipe.logits(parameters, batch()))
    assert jnp.all(trained("exit_gain")[1].gain_D[...] != 1)


def test_variants_are_trained_and_compared(corpus, capsys, tmp_path):
    model = {"num_layers": 4, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": VOCABULARY}
    settings = {f"model.{name}": value for name, value in model.items()}
    settings |= {f"data.{name}": getattr(corpus, name) for name in ("source", "path", "sequence_length")}
    settings |= {"train.steps": 3, "train.loss_chunk": 8, "optimizer.warmup_steps": 1}
    settings |= {"train.run_dir": tmp_path, "early_exit.curriculum": "fixed", "early_exit.exits": 2}
    settings |= {"early_exit.distillation": "kl"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    file = tmp_path / "results.json"
    main(["exit_block", "late_exit", "exit_block", "--json", str(file), *words])
    *_, head, _, block, late = capsys.readouterr().out.strip().split("\n")
    assert head == "| variant | exit E: loss | last exit: loss | against plain | agreement |"
    assert block.startswith("| exit_block | ")
    assert "| +0.0 % |" in block
    assert late.startswith("| late_exit | ")
    results = json.loads(file.read_text())["results"]
    assert results["exit"] == 2
    assert list(results["variants"]) == ["exit_block", "late_exit"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["other"], "no variant is called other: choose from plain, recipe"),
        ([], "the variants need one early exit with a teacher, such as --early_exit.curriculum fixed"),
        ([*TAUGHT, "--early_exit.exits", "3", "6"], "the variants need one early exit with a teacher"),
        ([*TAUGHT, "--early_exit.exits", "1"], "exit_block needs early_exit.exits of at least 2"),
        ([*TAUGHT, "--train.skip_spikes", "2"], "benchmarks.variants does not read train.skip_spikes: remove it"),
    ],
)
def test_unknown_variants_and_unfit_recipes_are_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        main(words)
