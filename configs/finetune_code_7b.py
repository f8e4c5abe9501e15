"""Finetuning of Llama1 7B on code.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 16, e_scale 1.0, learning rate 1e-4, 5.2B tokens.
Warmup is not in the paper. The corpus is yours: any source of code, pretokenized with Llama's tokenizer.

Command:  python train.py --config configs/finetune_code_7b.py --train.run_dir gs://BUCKET/runs/finetune_code_7b
          --data.path gs://BUCKET/code_tokens --train.init_from llama-7b --data.tokenizer llama-7b/tokenizer.model
Weights:  a Llama 1 7B in Hugging Face's format in the folder llama-7b, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/finetune_code_7b.py --topology v5p:4x4x4
"""

from layerskip_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=32,
            dim=4096,
            num_heads=32,
            num_kv_heads=32,
            ffn_dim=11_008,
            vocab_size=32_000,
            norm_epsilon=1e-6,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=16, e_scale=1.0),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/code_tokens",
            tokenizer="llama-7b/tokenizer.model",
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        mesh=MeshConfig(fsdp=64),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/finetune_code_7b",
            init_from="llama-7b",
            steps=10_000,
            batch_size=128,
            loss_chunk=512,  # two sequences on a chip: 1,024 tokens (tpu/README.md)
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=6, draft_length=12),
    )
