"""Compare our training step with other projects' on a CPU: ``python -m benchmarks.train_peers [--turns 4]``.

The plain step is compared with a transformers Llama in PyTorch, and the LayerSkip step with torchtune (layer dropout
0.2, rotational exits with R = 8). All use the same model (12 layers x 256, vocabulary 4,096), batch (8 x 256 random
tokens), AdamW, float32, machine and run. Each runs ``--steps`` steps per turn after a warm-up; medians are reported.
Needs ``pip install torch transformers torchtune torchao`` and an idle machine. ``--maxtext PYTHON`` adds MaxText's
plain step, which runs in a process of that Python because MaxText needs another version of jax.
"""

import argparse
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.common import Timings, add_json_option, called_in_turn, header, write_json
from benchmarks.maxtext_tpu import model_settings
from benchmarks.step_cost import PLAIN, CompiledStep, random_batch
from layerskip_jax.checkpoint.huggingface.config_json import config_json
from layerskip_jax.command_line import positive
from layerskip_jax.config import Config, EarlyExitConfig, LayerDropoutConfig
from layerskip_jax.errors import UserError, run_command

try:
    import torch
    import transformers

    # torchtune 0.6.1 imports a quantized type that later versions of torchao lack. Nothing here uses it.
    stub = types.ModuleType("torchao.dtypes.nf4tensor")
    stub.__dict__.update(
        NF4Tensor=type("NF4Tensor", (torch.Tensor,), {}), to_nf4=None, linear_nf4=None, implements=lambda _: lambda f: f
    )
    sys.modules.setdefault("torchao.dtypes.nf4tensor", stub)
    from torchtune.models.llama3 import llama3
    from torchtune.modules.early_exit_loss import RotationalEarlyExitCurriculum, early_exit_loss, sum_l_loss_scale
    from torchtune.modules.layer_dropout import ScaleType, prepare_layer_dropout
except ImportError as error:
    raise SystemExit(
        f"{error}: this benchmark compares with PyTorch: pip install torch transformers torchtune torchao"
    ) from None

R, DROPOUT = 8, 0.2
LAYERSKIP = dataclasses.replace(
    PLAIN,
    layer_dropout=LayerDropoutConfig(p_max=DROPOUT, time_scale="constant"),
    early_exit=EarlyExitConfig(curriculum="rotational", dilation=R, e_scale=0.2),
)
SKIPPING = dataclasses.replace(LAYERSKIP, layer_dropout=dataclasses.replace(LAYERSKIP.layer_dropout, form="skipping"))
MAXTEXT = "MaxText plain"
BARS = [
    ("ours plain", "transformers plain", 1.0),
    ("ours plain", MAXTEXT, 1.3),
    ("ours LayerSkip", "torchtune LayerSkip", 1.1),
    ("ours LayerSkip, skipping", "torchtune LayerSkip", 1.1),
]
Step = Callable[[], Any]
"""Runs a training step, and may return metrics to wait for."""


def in_torch(config: Config, model: torch.nn.Module, loss_of: Callable[..., torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, betas=(0.9, 0.95))
    batch = random_batch(config)
    inputs_BT, targets_BT = (torch.tensor(array, dtype=torch.long) for array in (batch.inputs_BT, batch.targets_BT))

    def step() -> None:
        loss_of(inputs_BT, targets_BT).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_plain(config: Config) -> Step:
    fields = config_json(config.model, config.data.sequence_length, "float32", 1, 2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(fields | {"use_cache": False}))
    cross_entropy = torch.nn.CrossEntropyLoss()

    def loss_of(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return cross_entropy(llama(inputs_BT).logits.flatten(0, 1), targets_BT.flatten())

    return in_torch(config, llama.train(), loss_of)


def torchtune_layerskip(config: Config) -> Step:
    model = config.model
    decoder = llama3(
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        embed_dim=model.dim,
        intermediate_dim=model.ffn_dim,
        max_seq_len=config.data.sequence_length,
    )
    prepare_layer_dropout(decoder.layers, prob_max=DROPOUT, prob_layer_scale=ScaleType.EXP)
    curriculum = RotationalEarlyExitCurriculum([layer % R == 0 for layer in range(model.num_layers)], max_steps=10_000)
    cross_entropy = torch.nn.CrossEntropyLoss()

    def loss_of(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        # As in torchtune's recipe: the curriculum includes the last exit, and the returned logits are not used.
        decoder.output_hidden_states = np.flatnonzero(curriculum.get()).tolist()
        *hidden, _ = decoder(inputs_BT)
        curriculum.step()
        by_exit = dict(zip(decoder.output_hidden_states, hidden, strict=True))
        return early_exit_loss(decoder, by_exit, targets_BT.flatten(), cross_entropy, 0.2, sum_l_loss_scale)

    return in_torch(config, decoder.train(), loss_of)


def seconds_per_step(step: Step, steps: int) -> float:
    jax.block_until_ready(step())  # lets the threads of the previous framework go idle
    began = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(step())
    return (time.perf_counter() - began) / steps


def maxtext_plain(python: str, config: Config, steps: int) -> float:
    """Return the mean seconds of MaxText's last ``steps`` steps, from its log; the first steps compile.

    Its ``minimal`` remat recomputes no matmul.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = model_settings(config.model) | {
            "run_name": "peer",
            "base_output_directory": folder,
            "hardware": "cpu",
            "skip_jax_distributed_system": "true",
            "dataset_type": "synthetic",
            "steps": steps + 4,
            "max_target_length": config.data.sequence_length,
            "per_device_batch_size": config.train.batch_size,
            "dtype": "float32",
            "weight_dtype": "float32",
            "enable_checkpointing": "false",
            "remat_policy": "minimal",
            "attention": "dot_product",
        }
        completed = subprocess.run(
            [python, "-m", "maxtext.trainers.pre_train.train", *(f"{key}={value}" for key, value in settings.items())],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    seconds = [float(number) for number in re.findall(r"completed step: \d+, seconds: ([\d.]+)", completed.stderr)]
    if len(seconds) != steps + 4:
        last = (completed.stderr.strip() or completed.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"MaxText ended early: {last}")
    return statistics.fmean(seconds[-steps:])


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # where torch and MaxText run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=positive, default=4, help="turns of each (default: 4)")
    parser.add_argument("--steps", type=positive, default=8, help="steps in a turn (default: 8, a rotation)")
    parser.add_argument("--maxtext", metavar="PYTHON", help="a Python that has MaxText (0.2.5), to compare with too")
    add_json_option(parser)
    options = parser.parse_args()
    about = header("torch", "transformers", "torchtune")
    print(f"{torch.get_num_threads()} threads for torch")
    steps: dict[str, Step] = {
        "transformers plain": transformers_plain(PLAIN),
        "ours plain": CompiledStep(PLAIN),
        "torchtune LayerSkip": torchtune_layerskip(LAYERSKIP),
        "ours LayerSkip": CompiledStep(LAYERSKIP),
        "ours LayerSkip, skipping": CompiledStep(SKIPPING),
    }
    ways = {name: partial(seconds_per_step, step, options.steps) for name, step in steps.items()}
    if options.maxtext:
        ways[MAXTEXT] = partial(maxtext_plain, options.maxtext, PLAIN, options.steps)
    timings = Timings(called_in_turn(ways, options.turns))
    tokens = PLAIN.train.batch_size * PLAIN.data.sequence_length
    rows: dict[str, Any] = {name: {"tokens_per_second": tokens / timings.median(name)} for name in ways}
    for name, peer, bar in BARS:
        if peer in ways:
            rows[name][f"of {peer}, bar {bar}"] = timings.ratio(peer, name)
    write_json(options.json, about, rows)
    for name, row in rows.items():
        print(f"{name:26}" + "  ".join(f"{key} {value:,.2f}" for key, value in row.items()))


if __name__ == "__main__":
    run_command(main)
