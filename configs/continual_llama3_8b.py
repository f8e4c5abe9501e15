"""Continual pretraining of Llama3 8B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 8, e_scale 0.1. The paper trains on 419B tokens; the 50,000 steps
here are 52B (400,000 steps would be 419B). It gives no learning rate and no batch: the learning rate is Llama2 7B's,
and a step has as many tokens as there, 128 x 8,192.

Command:  python train.py --config configs/continual_llama3_8b.py --train.run_dir gs://BUCKET/runs/continual_llama3_8b
          --data.path gs://BUCKET/tokens
          --train.init_from Meta-Llama-3-8B --data.tokenizer Meta-Llama-3-8B/tokenizer.json
Weights:  hf download meta-llama/Meta-Llama-3-8B --local-dir Meta-Llama-3-8B, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama3_8b.py --topology v5p:4x4x4
Result:   none, the step has only been compiled ahead of time (docs/tpu_step.md)
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA3_8B, continual_pretraining


def get_config() -> Config:
    base = continual_pretraining(LLAMA3_8B, chips=64, tokenizer="Meta-Llama-3-8B/tokenizer.json")
    return replace(
        base,
        data=replace(base.data, sequence_length=8192),
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/continual_llama3_8b",
            init_from="Meta-Llama-3-8B",
            batch_size=128,
            loss_chunk=4096,  # x 2 sequences per chip = 8,192 tokens per chunk; 2048 is 1.4 % slower (docs/tpu_step.md)
        ),
        decode=DecodeConfig(exit_layer=8, draft_length=12),
    )
