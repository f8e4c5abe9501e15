"""Continual pretraining of Llama3.2 1B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 8, e_scale 0.1. The paper trains on 839B tokens; the 50,000 steps
here are 52B (800,000 steps would be 839B). It gives no learning rate and no batch: those are Llama2 7B's.

Command:  python train.py --config configs/continual_llama32_1b.py --train.run_dir gs://BUCKET/runs/continual_llama32_1b
          --data.path gs://BUCKET/tokens --train.init_from Llama-3.2-1B --data.tokenizer Llama-3.2-1B/tokenizer.json
Weights:  hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama32_1b.py --topology v5e:4x8
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA32_1B, continual_pretraining


def get_config() -> Config:
    base = continual_pretraining(LLAMA32_1B, chips=32, tokenizer="Llama-3.2-1B/tokenizer.json")
    return replace(
        base,
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/continual_llama32_1b",
            init_from="Llama-3.2-1B",
        ),
        decode=DecodeConfig(exit_layer=4, draft_length=6),
    )
