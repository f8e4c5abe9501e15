"""LayerSkip's Llama2 7B from scratch.

LayerSkip table 1: p_max 0.2, exponential S(t), rotational R = 31, e_scale 0.2, 26B tokens.
The paper gives no optimizer and no warmup: those are Llama's.

Command:  python train.py --config configs/scratch_7b.py --train.run_dir gs://BUCKET/runs/scratch_7b
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_7b.py --topology v5p:4x4x4
Result:   none, the step has only been compiled ahead of time (docs/tpu_step.md)
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA2_7B, pretraining_on_tpu


def get_config() -> Config:
    base = pretraining_on_tpu(LLAMA2_7B, chips=64, name="scratch_7b")
    return replace(
        base,
        layer_dropout=replace(base.layer_dropout, p_max=0.2),
        decode=DecodeConfig(exit_layer=8, draft_length=12),
    )
