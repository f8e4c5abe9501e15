"""The 7B model of configs/scratch_7b.py from scratch, with an exit that is trained to draft.

Exit 8 of 32 has a loss at every step, and it and the last layer teach each other. docs/results/recipes.md compares this
recipe with the paper's on small models. Layer dropout is the paper's (p_max 0.2).

Command:  python train.py --config configs/scratch_7b_drafting.py --train.run_dir gs://BUCKET/runs/scratch_7b_drafting
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_7b_drafting.py --topology v5p:4x4x4
Result:   none, the recipe has only been measured on small models
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA2_7B, pretraining_on_tpu, trained_to_draft


def get_config() -> Config:
    base = pretraining_on_tpu(LLAMA2_7B, chips=64, name="scratch_7b_drafting")
    return replace(
        trained_to_draft(base, exit_layer=8),
        layer_dropout=replace(base.layer_dropout, p_max=0.2),
        decode=DecodeConfig(draft_length=4),
    )
