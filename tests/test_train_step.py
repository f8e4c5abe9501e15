"""The optimizer step: microbatches, meshes, remat and the skipping form equal the plain step; one compilation."""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo import device_groups
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import tiny_config

from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.data.batch import Batch
from layerskip_jax.errors import UserError
from layerskip_jax.recipe.recipe import LossSpike, Recipe, Skipping
from layerskip_jax.sharding import AXES, batch_sharding, make_mesh
from layerskip_jax.training import step as train_step
from layerskip_jax.training.step import Trainer

ONE_DEVICE = Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1, 1),
    ("data", "fsdp", "sequence", "tensor"),
    axis_types=(AxisType.Auto,) * 4,
)
PLAIN = Config(
    model=tiny_config(vocab_size=64),
    data=DataConfig(sequence_length=16),
    # SGD at rate 1 without clipping: the parameters change by exactly the gradient.
    optimizer=OptimizerConfig(name="sgd", learning_rate=1.0, warmup_steps=0, clip_norm=1e9),
    train=TrainConfig(steps=40, batch_size=16, loss_chunk=4),
)
LAYERSKIP = dataclasses.replace(
    PLAIN,
    layer_dropout=LayerDropoutConfig(p_max=0.5, time_scale="constant", rescale=True, row_groups=2),
    early_exit=EarlyExitConfig(curriculum="rotational", dilation=3, e_scale=0.5),
)

FIXED = EarlyExitConfig(
    "fixed",
    exits=(1, 3),
    exit_weights=(0.5, 0.25),
    distillation="kl",
    distillation_weight=0.75,
    agreement_weight=0.1,
)
DISTILLED = dataclasses.replace(LAYERSKIP, early_exit=FIXED)

REMATS = ["dots", "full", "offload"]


def changed(config, **groups):
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()}
    )


def make_trainer(config, mesh=ONE_DEVICE):
    """Equal configs share their compiled programs, because a trainer is hashed by value."""
    return Trainer(config, Recipe.from_config(config), mesh)


def test_a_recipe_of_another_config_is_refused():
    longer = changed(LAYERSKIP, train={"steps": LAYERSKIP.train.steps + 1})
    with pytest.raises(UserError, match=r"the recipe is for \(\d+, \d+\) \(layers, steps\), not \(\d+, \d+\)"):
        Trainer(longer, Recipe.from_config(LAYERSKIP), ONE_DEVICE)


def make_batch(config, seed=0):
    size, length = config.train.batch_size, config.data.sequence_length
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = np.asarray(jax.random.randint(keys[0], (size, length + 1), 0, config.model.vocab_size))
    segments = np.sort(np.asarray(jax.random.randint(keys[1], (size, length), 1, 4)), axis=1)
    mask = np.asarray(jax.random.uniform(keys[2], (size, length)) < 0.8, np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, mask)


def is_param(leaf):
    return isinstance(leaf, nnx.Variable)


def step_once(config, mesh=ONE_DEVICE, seed=0):
    trainer = make_trainer(config, mesh)
    batch = jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh)), make_batch(config, seed))
    state, metrics = trainer.step(trainer.init(), batch)
    return jax.device_get((state.model, metrics)), int(state.step)


def assert_same(ours, theirs, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), ours, theirs)


@pytest.fixture(scope="module")
def layerskip_step():
    return step_once(LAYERSKIP)[0]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_microbatches_equal_the_large_batch(layerskip_step, accumulate):
    """Masks and drops differ by row, so a mean of the microbatches' means would differ."""
    split, steps = step_once(changed(LAYERSKIP, train={"accumulate": accumulate}))
    assert_same(split, layerskip_step, 1e-5)
    assert steps == 1  # a microbatch is not a step


@pytest.mark.parametrize("remat", REMATS)
def test_remat_equals_no_remat(layerskip_step, remat):
    assert_same(step_once(changed(LAYERSKIP, train={"remat": remat}))[0], layerskip_step, 1e-5)


@pytest.mark.parametrize("remat", ["none", *REMATS])
def test_the_skipping_form_equals_the_masked_form(layerskip_step, remat):
    skipping = changed(LAYERSKIP, layer_dropout={"form": "skipping"}, train={"remat": remat})
    assert_same(step_once(skipping)[0], layerskip_step, 1e-5)


MESHES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (2, 2, 2, 1), (1, 1, 1, 2), (1, 1, 2, 1)]


@pytest.mark.parametrize(
    ("shape", "config"),
    [*((shape, LAYERSKIP) for shape in MESHES), (MESHES[1], DISTILLED), (MESHES[3], DISTILLED)],
    ids=[*map(str, MESHES), f"{MESHES[1]} distilled", f"{MESHES[3]} distilled"],
)
def test_every_mesh_equals_1_device(shape, config, monkeypatch):
    """Loss, gradients and metrics with exits and dropout: skipping on the mesh equals masked on one device."""
    batch_shards = shape[0] * shape[1]
    seeded = changed(config, train={"seed": 7})
    skipping = changed(seeded, layer_dropout={"form": "skipping"}, mesh=dict(zip(AXES, shape, strict=True)))
    sharded = step_once(skipping, make_mesh(skipping, jax.devices()[: math.prod(shape)]))[0]
    # Every shard of the batch gets the same mask, so the single device must draw for as many shards.
    monkeypatch.setattr(train_step, "batch_shards", lambda mesh: batch_shards)
    # Of its mesh only that number reaches the program, so equal numbers share a program.
    assert_same(sharded, step_once(changed(seeded, mesh={"data": batch_shards}))[0], 1e-5)


def test_a_loop_over_kept_rows_communicates_along_tensor_only():
    """Its body moves no row to another device, and does not reduce gradients over the batch."""
    config = changed(
        LAYERSKIP, layer_dropout={"form": "skipping"}, mesh={"data": 2, "fsdp": 2, "tensor": 2}, train={"batch_size": 8}
    )
    text = make_trainer(config, make_mesh(config)).compile_step().as_text()
    sent = [line for line in text.splitlines() if "shard_map/while" in line and COLLECTIVE.search(line)]
    assert sent  # tensor parallelism reduces over the parts of a row
    for line in sent:
        assert device_groups(line, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]], line


def test_the_loop_over_chunks_of_the_loss_has_no_collective():
    """Each device computes the logits of its own positions, and the head's gradient is summed after the loop."""
    config = changed(LAYERSKIP, mesh={"data": 2, "fsdp": 2, "sequence": 2})
    text = make_trainer(config, make_mesh(config)).compile_step().as_text()
    lines = [line for line in text.splitlines() if "inner_exit_loss" in line and COLLECTIVE.search(line)]
    assert lines  # the sums that follow the loop
    assert not [line for line in lines if "shard_map/while" in line]


COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


def test_parameters_and_moments_are_sharded_by_the_table():
    config = changed(PLAIN, mesh={"data": 2, "fsdp": 2, "tensor": 2}, optimizer={"name": "adamw"})
    mesh = make_mesh(config)
    state = make_trainer(config, mesh).init()

    def sharded(param, *axes):
        return param[...].sharding.is_equivalent_to(NamedSharding(mesh, P(*axes)), param.ndim)

    assert sharded(state.model.blocks.query_DNH, None, "fsdp", "tensor", None)
    assert sharded(state.model.embedding_VD, "tensor", "fsdp")
    assert not sharded(state.model.embedding_VD, "fsdp", "tensor")
    moments = jax.tree.leaves(state.opt_state, is_leaf=lambda leaf: hasattr(leaf, "blocks"))
    model_like = [moment for moment in moments if hasattr(moment, "blocks")]
    assert len(model_like) == 2  # Adam's two moments
    for moment in model_like:
        assert sharded(moment.blocks.gate_DF, None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "product of its axes must be 8"),
        ({"fsdp": 16}, "product of its axes must be 8"),
        ({"tensor": 8}, "num_heads 4 is not divisible by mesh.tensor = 8"),
    ],
)
def test_a_mesh_that_does_not_fit_raises(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(changed(PLAIN, mesh=mesh))


def test_a_batch_that_does_not_divide_over_the_mesh_raises():
    with pytest.raises(UserError, match=r"microbatch of 4 sequences .* is not divisible by .* 8 devices"):
        make_mesh(changed(PLAIN, train={"batch_size": 4}))


def skipping_recipe(config, groups):
    return dataclasses.replace(Recipe.from_config(config), apply_dropout=Skipping(groups))


def test_row_groups_that_do_not_divide_raise_whoever_makes_the_recipe():
    """In ``config`` dropout is masked, so only the recipe knows of the row groups."""
    with pytest.raises(UserError, match=r"row_groups 3 must divide the 16 sequences of a microbatch on a device"):
        Trainer(LAYERSKIP, skipping_recipe(LAYERSKIP, 3), ONE_DEVICE)
    on_mesh = changed(LAYERSKIP, layer_dropout={"form": "skipping", "row_groups": 4})
    with pytest.raises(UserError, match=r"row_groups 4 must divide the 2 sequences of a microbatch on a device"):
        make_trainer(on_mesh, make_mesh(on_mesh))
    Trainer(LAYERSKIP, dataclasses.replace(skipping_recipe(LAYERSKIP, 3), p_max=0.0), ONE_DEVICE)


def test_the_recipe_alone_decides_about_dropout():
    """A config without rescaling, and a recipe with it, equal a config with it."""
    batch, plain = make_batch(LAYERSKIP), changed(LAYERSKIP, layer_dropout={"p_max": 0.0, "rescale": False})
    ours, theirs = Trainer(plain, Recipe.from_config(LAYERSKIP), ONE_DEVICE), make_trainer(LAYERSKIP)
    stepped = [jax.device_get(trainer.step(trainer.init(), batch)) for trainer in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *stepped)


@contextlib.contextmanager
def compilations():
    """Collect the XLA compilations in the body."""
    seen = []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual"])
def test_one_compilation_over_a_whole_curriculum(curriculum):
    config = changed(LAYERSKIP, early_exit={"curriculum": curriculum, "dilation": 4}, train={"steps": 9})
    trainer = make_trainer(config)
    state, on, compiled = trainer.init(), [], []
    for seed in range(9):
        batch = make_batch(config, seed)
        with compilations() as during:
            state, metrics = trainer.step(state, batch)
        compiled.append(len(during))
        on.append(np.flatnonzero(metrics.exit_weight_L).tolist())
    assert compiled == [1] + [0] * 8
    assert len({tuple(exits) for exits in on}) > 1
    if curriculum == "rotational":  # exit 0 has weight 0 in eq. 6
        assert on == [[3], [1, 3], [2, 3], [3], [3], [1, 3], [2, 3], [3], [3]]


def test_metrics_report_the_step(layerskip_step):
    model, metrics = layerskip_step
    assert metrics.tokens == make_batch(LAYERSKIP).mask_BT.sum()
    np.testing.assert_allclose(metrics.objective, np.sum(metrics.exit_weight_L * metrics.exit_loss_L), rtol=1e-5)
    np.testing.assert_allclose(metrics.drop_rate_L, 0.5 * (2 ** (np.arange(4) / 3) - 1), rtol=1e-5)
    start = jax.device_get(make_trainer(LAYERSKIP).init().model)
    gradient = jax.tree.map(lambda a, b: a - b, start, model)
    norms = [np.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradient.blocks)]
    np.testing.assert_allclose(metrics.gradient_norm_L, np.sqrt(sum(norms)), rtol=1e-3)
    whole = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.gradient_norm, whole, rtol=1e-3)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_step_needs_no_more_memory_than_the_plain_one(remat):
    """With the exits of the paper's recipe, or a fixed one, temporary memory of the compiled step is at most 1.05x.

    With teachers, the logits of both exits exist for one chunk at a time. Their share of the memory does not depend on
    the number of layers, but falls with the size of a chunk: `configs/evidence.py` has a sixteenth of the sequence.
    """
    shape = {"num_layers": 12, "dim": 64, "ffn_dim": 128, "vocab_size": 1024}
    fixed = {"curriculum": "fixed", "exits": (2,), "distillation": "kl"}
    chunks = {
        16: {"rotational": {"curriculum": "rotational", "dilation": 11, "e_scale": 0.2}, "fixed": fixed},
        4: {"both teach": fixed | {"agreement_weight": 0.1}},
    }

    def temporary(config):
        return make_trainer(config).compile_step().memory_analysis().temp_size_in_bytes

    for chunk, recipes in chunks.items():
        train = {"loss_chunk": chunk, "remat": remat}
        plain = changed(PLAIN, model=shape, data={"sequence_length": 64}, train=train)
        base = temporary(plain)
        ratios = {name: temporary(changed(plain, early_exit=recipe)) / base for name, recipe in recipes.items()}
        print(f"temporary memory, remat {remat}, chunk {chunk}: {ratios}")
        assert max(ratios.values()) <= 1.05


def test_a_custom_spike_rule_skips_updates():
    recipe = dataclasses.replace(
        Recipe.from_config(LAYERSKIP), is_spike=lambda objective, gradient_norm, loss_ema: loss_ema > 0
    )
    trainer, batch = Trainer(LAYERSKIP, recipe, ONE_DEVICE), make_batch(LAYERSKIP)
    state, first = trainer.step(trainer.init(), batch)
    before = jax.device_get(state.model)
    state, second = trainer.step(state, batch)
    assert (bool(first.applied), bool(second.applied)) == (True, False)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.model))
    assert float(state.loss_ema) == float(first.objective)


@given(
    factor=st.sampled_from([0.0, 1.5, 4.0]),
    objective=st.floats(0, 100, width=32),
    loss_ema=st.sampled_from([0.0, 0.25, 8.0]),
)
def test_a_spike_exceeds_the_moving_average_by_the_factor(factor, objective, loss_ema):
    expected = factor > 0 and loss_ema > 0 and np.float32(objective) > np.float32(factor) * np.float32(loss_ema)
    assert bool(LossSpike(factor)(jnp.float32(objective), jnp.float32(1), jnp.float32(loss_ema))) == expected


def test_a_diverging_run_reports_its_loss():
    config = changed(PLAIN, optimizer={"learning_rate": 1e30})
    trainer = make_trainer(config)
    state = trainer.init()
    for _ in range(3):
        state, metrics = trainer.step(state, make_batch(config))
    assert not jnp.isfinite(metrics.objective)
