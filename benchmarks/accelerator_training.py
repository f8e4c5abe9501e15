"""The parts ``rates``, ``attention`` and ``training`` of `benchmarks.accelerator`."""

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chips import CHIPS

from benchmarks.accelerator_sizes import Bench, ImpossibleHereError, Measured, seconds_of
from benchmarks.common import Timings, timed_in_turn
from benchmarks.step_cost import random_batch
from layerskip_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.document_attention import attend_documents, choose_backend
from layerskip_jax.errors import UserError
from layerskip_jax.model import compute_dtype, parameter_count
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import batch_sharding, make_mesh, target_platform
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS, flops_per_token
from layerskip_jax.training.step import Trainer

PEAK_BANDWIDTH = {
    # bytes/s between a JAX device and its memory, from the data sheet
    **{chip.kind: chip.hbm_bandwidth for chip in CHIPS.values()},
    "TPU v5": CHIPS["v5p"].hbm_bandwidth,  # another name of a v5p
    "NVIDIA A100-SXM4-80GB": 2.04e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
}

BACKENDS = ("xla", "cudnn", "splash")

RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    # name -> settings, given the number of layers; the first is the baseline
    "plain": lambda layers: {},
    "paper": lambda layers: {  # LayerSkip table 1, pretraining from scratch
        "early_exit.curriculum": "rotational", "early_exit.dilation": layers - 1, "early_exit.e_scale": 0.2,
        "layer_dropout.p_max": 0.1,
    },
}  # fmt: skip
BAR = 1.08  # for the time of the paper's step over the plain step
STEPS = 50_000  # length of the schedules; the timed steps start in the middle
WARM_UP = 2  # untimed steps of each recipe


def rates(bench: Bench) -> Measured:
    """Measure the FLOP/s of a matmul and the memory bandwidth of one device.

    The arrays are random, because on constants a GPU draws less power and is faster.
    """
    size, dtype = bench.sizes.matmul, jnp.dtype(bench.sizes.matmul_dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    a_MK, b_KN = (jax.random.normal(key, (size, size), dtype) for key in keys[:2])
    multiply = jax.jit(jnp.matmul)
    matmul = 2 * size**3 / seconds_of(partial(multiply, a_MK, b_KN), calls=10, repeats=5)
    del a_MK, b_KN

    x_RC = jax.random.normal(keys[2], (bench.sizes.megabytes * 2**20 // (4 * 1024), 1024))
    total = jax.jit(jnp.sum)
    read = x_RC.nbytes / seconds_of(lambda: total(x_RC), calls=5, repeats=5)
    negate = jax.jit(jnp.negative, donate_argnums=0)  # in place, to hold only one array

    def copy() -> jax.Array:
        nonlocal x_RC
        x_RC = negate(x_RC)
        return x_RC

    copied = 2 * x_RC.nbytes / seconds_of(copy, calls=5, repeats=5)
    kind = jax.devices()[0].device_kind
    return {
        "matmul_size": size, "matmul_dtype": dtype.name, "flops": matmul, "sheet_flops": PEAK_FLOPS.get(kind),
        "megabytes": bench.sizes.megabytes, "copy_bandwidth": copied, "read_bandwidth": read,
        "bandwidth": max(copied, read), "sheet_bandwidth": PEAK_BANDWIDTH.get(kind),
    }  # fmt: skip


def packed(batch: int, length: int, heads: int, width: int) -> tuple[jax.Array, ...]:
    """Return random queries, keys, values and output weights, and the segments of packed documents."""
    *keys, ends_key = jax.random.split(jax.random.key(0), 5)
    arrays = (jax.random.normal(key, (batch, length, heads, width)) for key in keys)
    ends_BT = jax.random.uniform(ends_key, (batch, length)) < 8 / length
    return *arrays, jnp.cumsum(ends_BT, axis=1).astype(jnp.int32)


@partial(jax.jit, static_argnums=0)
def output_and_gradients(
    backend: str,
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    weight_BTNH: jax.Array,
    segments_BT: jax.Array,
) -> tuple[jax.Array, Any]:
    def objective(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> tuple[jax.Array, jax.Array]:
        out_BTNH = attend_documents(q_BTNH, k_BTNH, v_BTNH, segments_BT, backend)
        return jnp.sum(out_BTNH.astype(jnp.float32) * weight_BTNH.astype(jnp.float32)), out_BTNH

    (_, out_BTNH), gradients = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(q_BTNH, k_BTNH, v_BTNH)
    return out_BTNH, gradients


def attention(backend: str, bench: Bench) -> Measured:
    """Compare a backend in bfloat16 with XLA's attention in float32, and time its forward and backward pass.

    The differences of ``xla`` are due to bfloat16 alone. Raises `ImpossibleHereError` if the device lacks the backend.
    """
    batch, length, heads, width = bench.sizes.attention
    try:
        choose_backend(backend, target_platform(), length, width, jnp.dtype(jnp.bfloat16))
    except UserError as error:
        raise ImpossibleHereError(str(error)) from error
    *arrays, segments_BT = packed(*bench.sizes.attention)
    half = [array.astype(jnp.bfloat16) for array in arrays]
    with jax.default_matmul_precision("highest"):  # the reference starts from the same rounded arrays
        exact = output_and_gradients("xla", *(array.astype(jnp.float32) for array in half), segments_BT)
    run = partial(output_and_gradients, backend, *half, segments_BT)
    out, *gradients = (relative_difference(a, b) for a, b in zip(*map(jax.tree.leaves, (run(), exact)), strict=True))
    seconds = seconds_of(run, calls=5, repeats=5)
    return {
        "shape": {"batch": batch, "length": length, "heads": heads, "head_dim": width},
        "documents": int(segments_BT.max()) + 1, "output_difference": out, "gradient_difference": max(gradients),
        "seconds": seconds,
    }  # fmt: skip


def relative_difference(a: jax.Array, b: jax.Array) -> float:
    """Return the largest absolute difference over the largest absolute value of ``b``."""
    return float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))


def memory_of(device: jax.Device) -> float:
    """Return the bytes that programs on ``device`` can use, or infinity if the backend does not report them."""
    return (device.memory_stats() or {}).get("bytes_limit") or math.inf


def least_bytes(config: Config, devices: int) -> float:
    """Return a lower bound on a step's bytes per device: parameters, moments, gradients and saved activations."""
    model, saved = config.model, config.model.dim
    if config.train.remat == "dots":  # queries, keys, values, attention output, gate and up, and two block outputs
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        saved += heads * model.head_dim + 2 * model.ffn_dim + 2 * model.dim
    positions = config.train.batch_size // devices * config.data.sequence_length
    return 16 * parameter_count(model) / devices + 2 * saved * model.num_layers * positions


def candidates(bench: Bench) -> Iterator[tuple[str, Config]]:
    """Yield configs to try: larger models first, then less rematerialization, then larger batches."""
    devices, sizes = jax.local_device_count(), bench.sizes
    for (name, model), remat, rows in itertools.product(sizes.models.items(), ("dots", "full"), sizes.rows):
        train = TrainConfig(steps=STEPS, batch_size=rows * devices, remat=remat, loss_chunk=min(256, sizes.length))
        config = Config(
            model=model,
            data=DataConfig(sequence_length=sizes.length),
            optimizer=OptimizerConfig(warmup_steps=0),
            mesh=MeshConfig(data=1, fsdp=devices),
            train=train,
        )
        yield name, config


def training(bench: Bench) -> Measured:
    """Time the step of each recipe with the largest model and batch that fit. Steps of the recipes alternate."""
    devices, memory = jax.local_device_count(), memory_of(jax.local_devices()[0])
    refused: list[str] = []
    for name, config in candidates(bench):
        tried = f"{name}, remat {config.train.remat}, {config.train.batch_size} sequences"
        # A step needs more than `least_bytes`: 12 % more for the 1.5B with remat full and 1 row, according to XLA:TPU.
        if least_bytes(config, devices) > 0.85 * memory:
            continue
        try:
            return {"model": name, "out_of_memory": refused} | time_recipes(config, bench)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        print(f"training: out of memory: {tried}", flush=True)
        refused.append(tried)
        gc.collect()  # frees the arrays of the failed step
        jax.clear_caches()
        if bench.left() < 0:
            raise TimeoutError(f"no time is left to try smaller models; out of memory: {'; '.join(refused)}")
    out_of_memory = "; ".join(refused) or "-"
    raise ImpossibleHereError(f"no model fits a device of {memory / 2**30:.1f} GiB; out of memory: {out_of_memory}")


def time_recipes(config: Config, bench: Bench) -> Measured:
    """Compile the step of every recipe, time their steps in turn, and return the figures of each."""
    configs = {name: apply_overrides(config, settings(config.model.num_layers)) for name, settings in RECIPES.items()}
    mesh, compiled, compile_seconds = make_mesh(config, jax.local_devices()), {}, {}
    trainers = {name: Trainer(one, Recipe.from_config(one), mesh) for name, one in configs.items()}
    for name, trainer in trainers.items():
        began = time.perf_counter()
        compiled[name] = trainer.compile_step()
        compile_seconds[name] = time.perf_counter() - began
    timings, objectives = time_steps(trainers[next(iter(RECIPES))], compiled, bench)

    tokens = config.train.batch_size * config.data.sequence_length
    rows = {
        name: {
            "seconds": timings.median(name), "tokens_per_second": tokens / timings.median(name),
            **utilization(config, tokens / timings.median(name), mesh.size, bench),
            "objective": objectives[name], "of_plain": timings.ratio(name, next(iter(RECIPES))),
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "compile_seconds": compile_seconds[name],
        }
        for name in RECIPES
    }  # fmt: skip
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "parameters": parameter_count(config.model), "shape": dataclasses.asdict(config.model),
        "remat": config.train.remat, "attention": attention_backend(config), "batch_size": config.train.batch_size,
        "length": config.data.sequence_length, "mesh": dict(mesh.shape), "peak_bytes": peak, "bar": BAR,
        "steps": len(timings.seconds[next(iter(RECIPES))]), "recipes": rows,
    }  # fmt: skip


def utilization(config: Config, tokens_per_second: float, devices: int, bench: Bench) -> Measured:
    """Return the model FLOP/s over the data sheet's peak (MFU), and over the measured matmul rate."""
    flops = tokens_per_second * flops_per_token(config) / devices
    sheet, measured = PEAK_FLOPS.get(jax.local_devices()[0].device_kind), bench.rate("flops")
    return {"mfu": flops / sheet if sheet else None, "mfu_of_measured": flops / measured if measured else None}


def attention_backend(config: Config) -> str:
    """Return the attention backend of a training step of ``config``."""
    model, dtype = config.model, compute_dtype(config.model)
    return choose_backend(model.attention, target_platform(), config.data.sequence_length, model.head_dim, dtype)


def time_steps(
    trainer: Trainer, compiled: dict[str, jax.stages.Compiled], bench: Bench
) -> tuple[Timings, dict[str, float]]:
    """Return the timings of every recipe's steps, and the last objective of each.

    All recipes update one state in turn, so that the memory for one is enough: the time of a step does not depend on
    the values.
    """
    batch = jax.device_put(random_batch(trainer.config), batch_sharding(trainer.mesh))
    state = trainer.init()
    state = dataclasses.replace(state, step=jax.device_put(np.int32(STEPS // 2), state.step.sharding))
    objectives = {}

    def update(name: str) -> None:
        nonlocal state
        state, metrics = compiled[name](state, batch)
        objectives[name] = float(metrics.objective)  # waits for the step

    updates = {name: partial(update, name) for name in compiled}
    timings = timed_in_turn(updates, bench.sizes.turns, WARM_UP, out_of_time=lambda: bench.left() < 0)
    return timings, objectives
