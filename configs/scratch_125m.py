"""A 125M model from scratch on a single TPU host of 8 chips.

The shape of the small GPT-3, with LayerSkip's recipe for pretraining (table 1, 1.5B).

Command:  python train.py --config configs/scratch_125m.py --train.run_dir gs://BUCKET/runs/scratch_125m
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_125m.py --topology v5e:2x4
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig, MeshConfig, OptimizerConfig
from layerskip_jax.presets import GPT3_125M, pretraining_on_tpu


def get_config() -> Config:
    base = pretraining_on_tpu(GPT3_125M, chips=8, name="scratch_125m", rows=256)
    return replace(
        base,
        data=replace(base.data, sequence_length=2048),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=1000),
        mesh=MeshConfig(fsdp=1),  # a copy of the model on each chip
        train=replace(base.train, steps=20_000),
        decode=DecodeConfig(exit_layer=3, draft_length=4),
    )
