"""Compile programs for TPUs with libtpu on any machine; skipped if libtpu is not installed.

``pip install -e '.[tpu]'``, then ``python -m pytest tests/test_tpu_compiler.py``. CI runs it with the
newest versions that the default Python can install, and with those of tpu/requirements.txt.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from layerskip_jax.compiler_options import STEP_OPTIONS, compile_step
from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import UserError
from layerskip_jax.locations import keep_compiled_programs
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import AXES, arrange_devices, auto_mesh, make_mesh, spec
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS
from layerskip_jax.training.step import Trainer
from tpu.compile_ahead import topology_devices
from tpu.decode_ahead import ChipCompiler, Pass

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
ROOT = Path(__file__).parent.parent
DECODER = ModelConfig(num_layers=3, dim=512, num_heads=4, num_kv_heads=2, ffn_dim=1024, vocab_size=2048)
MODEL = ModelConfig(num_layers=4, dim=512, num_heads=4, num_kv_heads=2, ffn_dim=256, vocab_size=256)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence_length=128),
    mesh=MeshConfig(1, 2, 1, 2),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(batch_size=8),
)

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.fixture(scope="module")
def mesh():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(devices).reshape(1, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_sharded_step_compiles_for_every_chip_without_a_warning(topology, slices):
    """With all options of `STEP_OPTIONS`: a refused option raises a warning, which fails the test."""
    devices = topology_devices(topology, slices)
    config = dataclasses.replace(
        CONFIG,
        model=ModelConfig(num_layers=2, dim=256, num_heads=2, num_kv_heads=2, ffn_dim=256, vocab_size=256),
        data=DataConfig(sequence_length=128),
        early_exit=EarlyExitConfig("all"),
        layer_dropout=LayerDropoutConfig(0.1),
        mesh=MeshConfig(data=slices, fsdp=len(devices) // slices),
        train=TrainConfig(batch_size=len(devices), remat="full", loss_chunk=128),
    )
    assert devices[0].device_kind in STEP_OPTIONS
    assert devices[0].device_kind in PEAK_FLOPS
    compiled = Trainer(config, Recipe.from_config(config), make_mesh(config, devices)).compile_step()
    assert compiled.memory_analysis().temp_size_in_bytes > 0


def test_a_whole_cube_gathers_around_its_rings():
    """Without the links that close the rings, libtpu would make an all-reduce of twice the bytes of this gather."""
    mesh = auto_mesh(arrange_devices((1, 64, 1, 1), 1, topology_devices("v5p:4x4x4", 1)))
    split, whole = NamedSharding(mesh, spec(("embed",))), NamedSharding(mesh, PartitionSpec())
    weight_DF = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=split)
    text = jax.jit(lambda weight_DF: 2 * weight_DF, out_shardings=whole).lower(weight_DF).compile().as_text()
    assert "all-gather(" in text
    assert "all-reduce" not in text


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_decode_loop_runs_its_matmuls_on_the_matrix_unit_of_every_chip(topology):
    """Drafting and verification in one while loop on one chip, in bfloat16, for one text.

    A matmul on the vector unit is a fusion that multiplies a weight matrix and sums the products.
    """
    compiler = ChipCompiler(DECODER, topology.split(":")[0], rows=1, capacity=1024)
    text, model = compiler.rounds(SelfSpeculative(Greedy(), Fixed(1, 3))).as_text(), compiler.model
    assert "while(" in text
    matrices = [leaf for leaf in jax.tree.leaves((model.blocks, model.head_DV)) if leaf.ndim > 1]
    shapes = {f"bf16[{leaf.shape[0]},{leaf.size // leaf.shape[0]}]" for leaf in matrices}
    fusions = re.findall(r"^%fused_computation[^\n]*\{$.*?^\}", text, re.MULTILINE | re.DOTALL)
    with_weights = [fusion for fusion in fusions if any(shape in fusion.split("\n")[0] for shape in shapes)]
    assert any(" convolution(" in fusion for fusion in with_weights)
    assert all(" convolution(" in fusion for fusion in with_weights if " reduce(" in fusion)
    # No call copies the cache or the weights into another layout: a stream makes a call every few rounds. S(1) is the
    # chip's vector memory, into which weights this small are copied ahead. For a tpu7x, libtpu 0.0.42 changes the
    # tiles of one matrix.
    copies = re.findall(r"= (bf16\S+) copy\(", text.split("\nENTRY")[1])
    assert len([shape for shape in copies if "S(1)" not in shape]) <= (1 if "tpu7x" in topology else 0)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_two_chips_exchange_two_sums_per_block(chip):
    """After attention and after the feed-forward part. The embedding and the choice of a token need at most four more.

    Nothing gathers the cache: each chip writes and reads the keys and values of its own heads.
    """
    compiler = ChipCompiler(DECODER, chip, rows=1, capacity=1024, chips=2)
    estimate = compiler.estimate(Pass(0, DECODER.num_layers, 1, head=True))
    assert 2 * DECODER.num_layers <= estimate.collectives <= 2 * DECODER.num_layers + 4
    assert estimate.transfers < 0.1 * estimate.reading
    prefill = compiler.estimate(Pass(0, DECODER.num_layers, 64, head=False, prefill=True))
    assert prefill.collectives == 2 * DECODER.num_layers
    assert "all-gather" not in compiler.rounds(SelfSpeculative(Greedy(), Fixed(1, 3))).as_text()


def tiny_program():
    """A matmul with a sharded weight, lowered for four v6e chips."""
    mesh = Mesh(np.array(topology_devices("v6e:2x2", 1)), ("x",))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharded)
    return jax.jit(jnp.matmul).lower(x, x)


def test_an_option_unknown_to_this_compiler_is_omitted_with_a_warning(monkeypatch):
    monkeypatch.setitem(
        STEP_OPTIONS, "TPU v6 lite", {"xla_tpu_of_next_year": "1", "xla_tpu_scoped_vmem_limit_kib": "65536"}
    )
    with pytest.warns(UserWarning, match=r"without xla_tpu_of_next_year: .*No such compile option") as warned:
        assert compile_step(tiny_program(), "TPU v6 lite").as_text()
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("xla_tpu_nonsense=1", "No such compile option"),
        ("xla_tpu_scoped_vmem_limit_kib=much", "Failed to parse 'much'"),
    ],
)
def test_an_invalid_option_of_the_user_is_an_error(chosen, message):
    with pytest.raises(UserError, match=rf"train.compiler_options: the compiler rejects .*{message}"):
        compile_step(tiny_program(), "TPU v6 lite", chosen)


def test_continuation_fusion_is_not_an_option():
    """According to libtpu 0.0.44 and newer, it may give wrong results on every chip except v5e."""
    assert [name for options in STEP_OPTIONS.values() for name in options if "async_collective_fusion" in name] == []


def compiled_step(config, mesh):
    return Trainer(config, Recipe.from_config(config), mesh).compile_step()


SPLASH = ("splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented")


def test_a_step_for_a_tpu_has_the_splash_kernel_forward_and_backward(mesh):
    text = compiled_step(CONFIG, mesh).as_text()
    assert "tpu_custom_call" in text
    assert [kernel for kernel in SPLASH if kernel not in text] == []
    # The mesh chooses bfloat16, although the compiling machine is a CPU.
    assert "bf16[" in text


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_skipping_form_compiles_around_the_kernel(mesh, remat):
    dropout = LayerDropoutConfig(0.5, "linear", "constant", form="skipping", row_groups=4)
    train = dataclasses.replace(CONFIG.train, remat=remat)
    text = compiled_step(dataclasses.replace(CONFIG, layer_dropout=dropout, train=train), mesh).as_text()
    assert [kernel for kernel in SPLASH if kernel not in text] == []


def compile_ahead(*options, script="compile_ahead", dim=1024):
    heads = dim // 128
    model = f"--model.num_layers 4 --model.dim {dim} --model.num_heads {heads} --model.num_kv_heads {heads}"
    settings = [*model.split(), f"--model.ffn_dim={4 * dim}", "--early_exit.dilation", "3", *options]
    command = [sys.executable, f"tpu/{script}.py", "--config", "configs/quickstart.py", *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_compile_ahead_agrees_with_the_formula_and_the_data_sheet():
    done = compile_ahead("--topology", "v5e:2x2", "--mesh.fsdp", "4", "--json", dim=512)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["chips"] == 4
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["formula"], rel=0.03)
    # No step beats the data sheet, and the cost model includes more than the matmuls.
    assert 0 < found["seconds"]["matmuls"] <= found["seconds"]["bound"] <= found["seconds"]["estimate"]
    # The longest operation comes first, and no matmul exceeds the peak.
    shares = [one["share"] for one in found["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert all(0 <= one["of_peak"] <= 1 for one in found["operations"])


def test_decode_ahead_predicts_from_the_passes():
    options = (
        "--chip",
        "v5e",
        "--exit_layer",
        "1",
        "--draft_length",
        "2",
        "--choices",
        "1",
        "4",
        "--length",
        "100",
        "--json",
    )
    done = compile_ahead(*options, "--early_exit.exits", "1", "--model.num_layers", "2", script="decode_ahead")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    passes, (one, branching) = found["passes"], found["rounds"]
    parts = [passes[name]["seconds"] for name in ("draft", "draft", "last early pass", "verify 3 positions")]
    assert one["seconds"] == pytest.approx(sum(parts))
    # Four choices at each of three positions: the weights are read once for all of them.
    assert passes["verify 12 positions"]["seconds"] < 1.2 * passes["verify 3 positions"]["seconds"]
    assert branching["seconds"] < 1.2 * one["seconds"]
    # Two blocks, the head of 1,024 x 2,048, and keys and values of half of 128 positions; bfloat16 at 0.819e12 bytes/s.
    numbers = 2 * (3 * 1024 * 4096 + 4 * 1024 * 1024) + 1024 * 2048 + 2 * 64 * 2 * 1024
    assert passes["plain"]["reading"] == pytest.approx(2 * numbers / 0.819e12, rel=1e-3)
    assert all(part["seconds"] == max(part["operations"], part["reading"]) for part in passes.values())
    # The prefill reads the blocks once for half of the text.
    prefill = passes["prefill of 50 tokens"]
    assert prefill["reading"] == pytest.approx(2 * 2 * (3 * 1024 * 4096 + 4 * 1024 * 1024) / 0.819e12, rel=1e-3)
    assert prefill["seconds"] < 3 * passes["plain"]["seconds"]
    tokens = 1 + 0.5 + 0.5**2
    assert one["predictions"][0]["speedup"] == pytest.approx(tokens * passes["plain"]["seconds"] / sum(parts))
    # Blocks on the vector unit would take four times the time to read them.
    assert passes["plain"]["seconds"] < 2 * passes["plain"]["reading"]


def test_decode_ahead_needs_an_exit_below_the_last():
    done = compile_ahead("--chip", "v5e", "--exit_layer", "4", "--early_exit.exits", "1", script="decode_ahead")
    assert done.returncode == 2
    assert "--exit_layer must be in 1..3, not 4" in done.stderr


@pytest.mark.parametrize(
    ("topology", "message"), [("v9:2x2", "must look like v5e:4x8"), ("v5e:3x5", "does not know the topology")]
)
def test_an_unknown_topology_is_an_error(topology, message):
    done = compile_ahead("--topology", topology)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_offloaded_inputs_are_in_host_memory(mesh):
    train = dataclasses.replace(CONFIG.train, remat="offload")
    memory = compiled_step(dataclasses.replace(CONFIG, train=train), mesh).memory_analysis()
    rows = CONFIG.train.batch_size // 2  # per device; bfloat16
    assert memory.host_temp_size_in_bytes == 2 * MODEL.num_layers * rows * CONFIG.data.sequence_length * MODEL.dim


def test_the_step_is_stored_for_a_run(mesh, tmp_path):
    """Under the name that JAX looks for. Whether a pod then loads it is not tested."""
    keep_compiled_programs(str(tmp_path))
    # Another shape than in the tests above, whose programs JAX has in memory.
    small = dataclasses.replace(
        CONFIG, model=dataclasses.replace(MODEL, num_layers=2, vocab_size=256), data=DataConfig(sequence_length=128)
    )
    try:
        compiled_step(small, mesh)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    assert [file.name for file in (tmp_path / "compiled").iterdir() if file.name.startswith("jit__step-")]
