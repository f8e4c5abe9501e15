"""Schedules by hand; muon on the matrices of the blocks; every optimizer learns, decays and is guarded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import tiny_model
from test_train_step import (
    LAYERSKIP,
    ONE_DEVICE,
    PLAIN,
    assert_same,
    changed,
    compilations,
    is_param,
    make_batch,
    make_trainer,
)

from layerskip_jax.checkpoint.arrays import named_arrays, with_arrays
from layerskip_jax.config import Config, OptimizerConfig, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import summed_losses
from layerskip_jax.sharding import batch_sharding, make_mesh
from layerskip_jax.training.optimizer import decay_mask, learning_rate, make_optimizer, matrix_axes, schedule_count


def rates(at, **settings):
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.2, **settings)
    schedule = learning_rate(Config(optimizer=optimizer, train=TrainConfig(steps=110)))
    return [float(schedule(step)) for step in at]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.1, 0.55, 1.0, 0.6, 0.2]),
        ("linear", [0.1, 0.55, 1.0, 0.6, 0.2]),
        ("constant", [0.1, 0.55, 1.0, 1.0, 1.0]),
        ("wsd", [0.1, 0.55, 1.0, 1.0, 0.2]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    """At the first step, half of the warmup, the peak, halfway from there to the end, and the end."""
    np.testing.assert_allclose(rates([0, 5, 10, 60, 110], schedule=schedule), expected, rtol=1e-6)


def test_wsd_decays_in_the_last_steps_only():
    np.testing.assert_allclose(rates([87, 88, 99, 110], schedule="wsd"), [1.0, 1.0, 0.6, 0.2], rtol=1e-6)
    with pytest.raises(UserError, match=r"decay_fraction 0.95 of 110 train.steps must leave the 10 steps"):
        rates([0], schedule="wsd", decay_fraction=0.95)


def test_muon_takes_the_matrices_of_the_blocks():
    leaves = jax.tree_util.tree_leaves_with_path(
        matrix_axes(tiny_model()),
        is_leaf=lambda leaf: leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers),
    )
    axes = {str(path[-2]): leaf and (leaf.reduction_axis, leaf.output_axis) for path, leaf in leaves}
    assert axes == {
        ".embedding_VD": None,
        ".attention_norm_D": None,
        ".query_DNH": ((1,), (2, 3)),
        ".key_DKH": ((1,), (2, 3)),
        ".value_DKH": ((1,), (2, 3)),
        ".output_NHD": ((1, 2), (3,)),
        ".ffn_norm_D": None,
        ".gate_DF": ((1,), (2,)),
        ".up_DF": ((1,), (2,)),
        ".down_FD": ((1,), (2,)),
        ".final_norm_D": None,
        ".head_DV": None,
    }


def muon_config(**mesh):
    settings = {"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 0}
    return changed(LAYERSKIP, optimizer=settings, mesh=mesh)


def test_a_muon_update_is_nearly_orthogonal_in_every_layer():
    config, model = muon_config(), tiny_model()
    keys = iter(jax.random.split(jax.random.key(0), 100))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), model)
    optimizer = make_optimizer(config)
    updates, _ = jax.jit(lambda m, g: optimizer.update(g, optimizer.init(m), m))(model, gradients)
    for layer in np.asarray(updates.blocks.query_DNH[...]).reshape(4, 32, -1):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2.5
        np.testing.assert_allclose(np.sqrt(np.mean(layer**2)), 0.2 * 1e-2, rtol=0.2)


def test_muon_on_8_devices_equals_1_device():
    def step(config, mesh):
        trainer = make_trainer(config, mesh)
        batch = jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh)), make_batch(config))
        state, metrics = trainer.step(trainer.init(), batch)
        return jax.device_get((state.model, metrics.learning_rate))

    sharded = changed(muon_config(fsdp=4, tensor=2), layer_dropout={"p_max": 0.0})
    single = dataclasses.replace(sharded, mesh=Config().mesh)
    assert_same(step(sharded, make_mesh(sharded)), step(single, ONE_DEVICE), 1e-4)


def test_the_state_of_muon_survives_a_checkpoint_by_names():
    state = make_trainer(muon_config()).init()
    arrays = named_arrays(state.opt_state)
    assert len({id(array) for array in arrays.values()}) == len(jax.tree.leaves(state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, with_arrays(state.opt_state, arrays), state.opt_state)


def test_weight_decay_applies_to_matrices_only():
    """With zero gradients, muon changes a parameter by its decay alone: minus the learning rate times the decay."""
    config, model = changed(muon_config(), optimizer={"weight_decay": 0.5}), tiny_model()
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(lambda m, g: optimizer.update(g, optimizer.init(m), m))(model, zeros)
    for path, update in nnx.to_flat_state(nnx.state(updates)):
        decays = len(str(path[-1]).rpartition("_")[2]) > 1
        values = dict(nnx.to_flat_state(nnx.state(model)))[path][...]
        np.testing.assert_allclose(update[...], -0.5e-2 * values if decays else 0 * values, atol=1e-7)


def with_optimizer(name):
    rate = {"adamw": 1e-2, "lion": 1e-3, "muon": 1e-2, "adafactor": 1e-2, "sgd": 0.3}[name]
    return changed(LAYERSKIP, optimizer={"name": name, "learning_rate": rate, "clip_norm": 1.0})


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_every_optimizer_lowers_the_loss(name):
    trainer = make_trainer(with_optimizer(name))
    config, batch = trainer.config, make_batch(trainer.config)
    state = trainer.init()
    first = np.asarray(summed_losses(state.model, batch, trainer.mesh, config.train.loss_chunk)[0])
    for _ in range(12):
        state, _ = trainer.step(state, batch)
    assert (np.asarray(summed_losses(state.model, batch, trainer.mesh, config.train.loss_chunk)[0]) < first).all()


def test_weight_decay_applies_to_all_parameters_but_norm_scales():
    """The mask follows the names; the axes in the sharding metadata are the oracle."""
    for model in (tiny_model(), tiny_model(tied_embedding=True)):
        params, marks = (jax.tree.leaves(tree, is_leaf=is_param) for tree in (model, decay_mask(model)))
        assert [jax.tree.leaves(mark) for mark in marks] == [[len(p.get_metadata()["axes"]) > 1] for p in params]
    marks = decay_mask(make_trainer(PLAIN).init().model)
    norms = marks.final_norm_D, marks.blocks.attention_norm_D, marks.blocks.ffn_norm_D
    assert jax.tree.leaves(norms) == [False] * 3
    assert jax.tree.leaves(marks).count(True) == len(jax.tree.leaves(marks)) - 3


@pytest.mark.parametrize(("name", "shape"), [("scale", (4,)), ("gate_DF", (4,)), ("norm_D", (2, 3, 4))])
def test_weight_decay_refuses_a_parameter_whose_name_does_not_give_its_axes(name, shape):
    model = tiny_model()
    setattr(model, name, nnx.Param(jnp.ones(shape)))
    with pytest.raises(ValueError, match=f"name a parameter after its axes.*{name}"):
        decay_mask(model)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_the_schedule_count_is_found_in_every_optimizer_or_refused(name):
    config, params = changed(PLAIN, optimizer={"name": name}), tiny_model()
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for updates in range(3):
        assert schedule_count(state) == updates
        _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    with pytest.raises(ValueError, match="one learning-rate schedule, not 2"):
        schedule_count((state, state))
    with pytest.raises(ValueError, match="one learning-rate schedule, not 0"):
        schedule_count(optax.sgd(0.1).init(params))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_a_step_that_is_not_finite_or_has_no_counted_token_changes_only_the_step_count(name):
    trainer, batch = make_trainer(with_optimizer(name)), make_batch(LAYERSKIP)
    state, first = trainer.step(trainer.init(), batch)
    before = jax.device_get(state)
    for done, factor in enumerate(("nan", 0), start=2):
        with compilations() as during:
            state, metrics = trainer.step(state, batch._replace(mask_BT=batch.mask_BT * np.float32(factor)))
        assert during == []
        assert first.applied
        assert not metrics.applied
        assert int(state.step) == done
        after = jax.device_get(state)
        jax.tree.map(np.testing.assert_array_equal, before.replace(step=after.step), after)
    assert metrics.tokens == 0
    state, metrics = trainer.step(state, batch)
    assert metrics.applied
    assert not np.array_equal(jax.device_get(state.model.embedding_VD[...]), after.model.embedding_VD[...])
