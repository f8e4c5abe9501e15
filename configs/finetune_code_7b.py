"""Finetuning of Llama1 7B on code.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 16, e_scale 1.0, learning rate 1e-4, 5.2B tokens.
The paper gives no warmup. The corpus is yours: any source of code, pretokenized with Llama's tokenizer.

Command:  python train.py --config configs/finetune_code_7b.py --train.run_dir gs://BUCKET/runs/finetune_code_7b
          --data.path gs://BUCKET/code_tokens --train.init_from llama-7b --data.tokenizer llama-7b/tokenizer.model
Weights:  a Llama 1 7B in Hugging Face's format in the folder llama-7b, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/finetune_code_7b.py --topology v5p:4x4x4
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.presets import LLAMA1_7B, finetuning


def get_config() -> Config:
    base = finetuning(LLAMA1_7B, chips=64, tokenizer="llama-7b/tokenizer.model")
    return replace(
        base,
        early_exit=replace(base.early_exit, dilation=16),
        data=replace(base.data, path="gs://your-bucket/code_tokens"),
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/finetune_code_7b",
            init_from="llama-7b",
            steps=10_000,
            batch_size=128,
            loss_chunk=512,  # x 2 sequences per chip = 1,024 tokens per chunk
        ),
        decode=DecodeConfig(exit_layer=6, draft_length=12),
    )
