"""Continual pretraining of Llama2 7B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 8, e_scale 0.2, 52B tokens.

Command:  python train.py --config configs/continual_llama2_7b.py --train.run_dir gs://BUCKET/runs/continual_llama2_7b
          --data.path gs://BUCKET/tokens --train.init_from Llama-2-7b-hf --data.tokenizer Llama-2-7b-hf/tokenizer.model
Weights:  hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama2_7b.py --topology v5p:4x4x4
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA2_7B, continual_pretraining


def get_config() -> Config:
    base = continual_pretraining(LLAMA2_7B, chips=64, tokenizer="Llama-2-7b-hf/tokenizer.model")
    return replace(
        base,
        early_exit=replace(base.early_exit, e_scale=0.2),
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/continual_llama2_7b",
            init_from="Llama-2-7b-hf",
        ),
        decode=DecodeConfig(exit_layer=8, draft_length=12),
    )
