"""Learning-rate schedules by hand, and muon on the matrices of the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import tiny_model
from test_train_step import LAYERSKIP, ONE_DEVICE, assert_same, changed, make_batch, make_trainer

from layerskip_jax.checkpoint.arrays import named_arrays, with_arrays
from layerskip_jax.config import Config, OptimizerConfig, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.sharding import batch_sharding, make_mesh
from layerskip_jax.training.optimizer import learning_rate, make_optimizer, matrix_axes


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
