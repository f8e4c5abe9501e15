"""The 1.5B model of configs/scratch_1b5.py from scratch, with an exit that is trained to draft.

Exit 6 of 24 has a loss at every step, and it and the last layer teach each other. docs/results/recipes.md compares this
recipe with the paper's on small models. Layer dropout is the paper's (p_max 0.1).

Command:  python train.py --config configs/scratch_1b5_drafting.py --train.run_dir gs://BUCKET/runs/scratch_1b5_drafting
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_1b5_drafting.py --topology v5e:4x8
Result:   none, the recipe has only been measured on small models
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LAYERSKIP_1B5, pretraining_on_tpu, trained_to_draft


def get_config() -> Config:
    base = pretraining_on_tpu(LAYERSKIP_1B5, chips=32, name="scratch_1b5_drafting")
    return replace(trained_to_draft(base, exit_layer=6), decode=DecodeConfig(draft_length=4))
