"""`benchmarks.variants`: its plain loop has the objective of training, and each variant changes what it says."""

import dataclasses
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
DROPOUT = dataclasses.replace(CONFIG, layer_dropout=LayerDropoutConfig(p_max=0.5, time_scale="constant", rescale=True))


def batch(seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (8, 17), 0, 64)
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((8, 16), int), jnp.ones((8, 16)))


def trained(name, config=CONFIG, steps=3):
    run = Run(VARIANTS[name], config)
    state = run.init()
    for step in range(steps):
        state, _ = run.step(state, batch(step))
    return state.parameters


def test_the_recipe_has_the_objective_and_gradients_of_training():
    trainer = Trainer(DROPOUT, Recipe.from_config(DROPOUT), ONE_DEVICE)
    run = Run(VARIANTS["recipe"], DROPOUT)
    state = trainer.init(run.init().parameters[0])
    _, metrics = trainer.step(state, batch())
    value, (gradient, _) = jax.value_and_grad(run.objective)(run.init().parameters, batch(), jnp.int32(0))
    np.testing.assert_allclose(value, metrics.objective, rtol=1e-5)
    norm_L = jnp.sqrt(sum(jnp.sum(leaf**2, range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradient.blocks)))
    np.testing.assert_allclose(norm_L, metrics.gradient_norm_L, rtol=1e-4)


def exit_gradients(name, parameters):
    """Return the gradients of a function of exit E's logits for the model and the extra parameters."""
    run = Run(VARIANTS[name], CONFIG)
    return jax.grad(lambda parameters: jnp.sum(jnp.sin(run.logits(parameters, batch())[0])))(parameters)


def test_an_exit_block_leaves_the_plain_model_as_it_is():
    plain, unused = trained("plain")
    model, extra = trained("exit_block")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-4), model, plain)  # the programs round differently
    assert not jnp.array_equal(extra.block.gate_DF, unused.block.gate_DF)
    gradient, extra_gradient = exit_gradients("exit_block", (model, extra))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert jnp.any(extra_gradient.block.gate_DF[...] != 0)


def test_a_late_exit_starts_as_the_plain_model_and_ends_as_the_recipe():
    parameters = trained("recipe")
    late, plain, recipe = (Run(VARIANTS[name], CONFIG).objective for name in ("late_exit", "plain", "recipe"))
    assert late(parameters, batch(), 2) == plain(parameters, batch(), 2)
    assert late(parameters, batch(), 3) == recipe(parameters, batch(), 3)


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
    settings |= {"data.tokenizer": tmp_path / "tokenizer.model"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    main(["exit_block", "late_exit", *words])
    *_, head, _, block, late = capsys.readouterr().out.strip().split("\n")
    assert head == "| variant | exit E: loss | last exit: loss | against plain | agreement |"
    assert block.startswith("| exit_block | ")
    assert "| +0.0 % |" in block
    assert late.startswith("| late_exit | ")


def test_unknown_variants_and_unfit_recipes_are_refused():
    with pytest.raises(UserError, match="no variant is called other: choose from plain, recipe"):
        main(["other"])
    with pytest.raises(UserError, match=r"the variants need one early_exit\.exits with a weight"):
        main(["--early_exit.exits", "3", "6"])
    with pytest.raises(UserError, match=r"exit_block needs early_exit\.exits of at least 2"):
        main(["--early_exit.exits", "1"])
