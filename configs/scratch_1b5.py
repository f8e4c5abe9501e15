"""LayerSkip's 1.5B model from scratch.

LayerSkip table 1: p_max 0.1, exponential S(t), rotational R = 23, e_scale 0.2, 26B tokens.
The paper gives no feed-forward width, vocabulary, optimizer or warmup: those are Llama's.

Command:  python train.py --config configs/scratch_1b5.py --train.run_dir gs://BUCKET/runs/scratch_1b5
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_1b5.py --topology v5e:4x8
Result:   none, the step has only been compiled ahead of time (docs/tpu_step.md)
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LAYERSKIP_1B5, pretraining_on_tpu


def get_config() -> Config:
    base = pretraining_on_tpu(LAYERSKIP_1B5, chips=32, name="scratch_1b5")
    return replace(base, decode=DecodeConfig(exit_layer=8, draft_length=6))
