"""Continual pretraining of Llama2 13B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 39, e_scale 0.1, 52B tokens.

Command:  python train.py --config configs/continual_llama2_13b.py --train.run_dir gs://BUCKET/runs/continual_llama2_13b
          --data.path gs://BUCKET/tokens --train.init_from Llama-2-13b-hf
          --data.tokenizer Llama-2-13b-hf/tokenizer.model
Weights:  hf download meta-llama/Llama-2-13b-hf --local-dir Llama-2-13b-hf, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama2_13b.py --topology v5p:4x4x4
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA2_13B, continual_pretraining


def get_config() -> Config:
    base = continual_pretraining(LLAMA2_13B, chips=64, tokenizer="Llama-2-13b-hf/tokenizer.model")
    return replace(
        base,
        early_exit=replace(base.early_exit, dilation=39),
        optimizer=replace(base.optimizer, learning_rate=2e-5),
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/continual_llama2_13b",
            init_from="Llama-2-13b-hf",
        ),
        decode=DecodeConfig(exit_layer=15, draft_length=12),
    )
