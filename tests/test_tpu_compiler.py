"""Programs for a TPU, compiled by its own compiler on any machine; skipped where libtpu is not installed.

``pip install libtpu`` in the version that ``jax[tpu]`` names, then
``TPU_SKIP_MDS_QUERY=1 python -m pytest tests/test_tpu_compiler.py``.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from layerskip_jax.config import (
    Config,
    DataConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.locations import keep_compiled_programs
from layerskip_jax.recipe import Recipe
from layerskip_jax.sharding import AXES
from layerskip_jax.train_step import Trainer

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(num_layers=4, dim=512, num_heads=4, num_kv_heads=2, ffn_dim=1024, vocab_size=2048)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence_length=512),
    mesh=MeshConfig(1, 2, 1, 2),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(batch_size=8),
)


@pytest.fixture(scope="module")
def mesh():
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(devices).reshape(1, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)


def compiled_step(config, mesh):
    return Trainer(config, Recipe.from_config(config), mesh).compile_step()


SPLASH = ("splash_mha_fwd_segmented", "splash_mha_dq_segmented", "splash_mha_dkv_segmented")


def test_a_step_for_a_tpu_has_the_splash_kernel_forward_and_backward(mesh):
    text = compiled_step(CONFIG, mesh).as_text()
    assert "tpu_custom_call" in text
    assert [kernel for kernel in SPLASH if kernel not in text] == []
    # bfloat16, chosen by the mesh: the machine that compiles is a CPU.
    assert "bf16[" in text


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_skipping_form_compiles_around_the_kernel(mesh, remat):
    dropout = LayerDropoutConfig(0.5, "linear", "constant", form="skipping", row_groups=4)
    train = dataclasses.replace(CONFIG.train, remat=remat)
    text = compiled_step(dataclasses.replace(CONFIG, layer_dropout=dropout, train=train), mesh).as_text()
    assert [kernel for kernel in SPLASH if kernel not in text] == []


def compile_ahead(*options):
    model = "--model.num_layers 4 --model.dim 1024 --model.num_heads 8 --model.num_kv_heads 8 --model.ffn_dim 4096"
    command = [sys.executable, "tpu/compile_ahead.py", "--config", "configs/quickstart.py", *model.split(), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_config_compiled_ahead_is_set_beside_the_formula_and_the_data_sheet():
    said = compile_ahead("--topology", "v5e:2x2", "--mesh.fsdp", "4", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["fits"]
    assert found["chips"] == 4
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["formula"], rel=0.03)
    # The data sheet's time is one that no step beats, and the cost model knows of more than the products.
    assert 0 < found["seconds"]["products"] <= found["seconds"]["bound"] <= found["seconds"]["estimate"]
    # What takes longest comes first, and no product is above the peak.
    shares = [one["share"] for one in found["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert all(0 <= one["of_peak"] <= 1 for one in found["operations"])


@pytest.mark.parametrize(("topology", "says"), [("v9:2x2", "must look like v5e:4x8"), ("v5e:3x5", "knows no topology")])
def test_a_topology_that_is_none_is_named(topology, says):
    said = compile_ahead("--topology", topology)
    assert said.returncode == 2
    assert says in said.stderr
    assert "Traceback" not in said.stderr


def test_offloaded_inputs_lie_in_the_hosts_memory(mesh):
    train = dataclasses.replace(CONFIG.train, remat="offload")
    memory = compiled_step(dataclasses.replace(CONFIG, train=train), mesh).memory_analysis()
    rows = CONFIG.train.batch_size // 2  # of a device; bfloat16
    assert memory.host_temp_size_in_bytes == 2 * MODEL.num_layers * rows * CONFIG.data.sequence_length * MODEL.dim


def test_the_step_is_kept_for_a_run(mesh, tmp_path):
    """Under the name by which JAX looks for it; whether a pod then takes it, only a pod can show."""
    keep_compiled_programs(str(tmp_path))
    shorter = dataclasses.replace(CONFIG, data=DataConfig(sequence_length=256))  # the other is in JAX's own memory
    try:
        compiled_step(shorter, mesh)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    assert [file.name for file in (tmp_path / "compiled").iterdir() if file.name.startswith("jit_step-")]
