"""Continual pretraining of Llama2 13B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 39, e_scale 0.1, 52B tokens.

Command:  python train.py --config configs/continual_llama2_13b.py --train.run_dir gs://BUCKET/runs/continual_llama2_13b
          --data.path gs://BUCKET/tokens --train.init_from Llama-2-13b-hf
          --data.tokenizer Llama-2-13b-hf/tokenizer.model
Weights:  hf download meta-llama/Llama-2-13b-hf --local-dir Llama-2-13b-hf, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama2_13b.py --topology v5p:4x4x4
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
            num_layers=40,
            dim=5120,
            num_heads=40,
            num_kv_heads=40,
            ffn_dim=13_824,
            vocab_size=32_000,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=39, e_scale=0.1),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="Llama-2-13b-hf/tokenizer.model",
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=64),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/continual_llama2_13b",
            init_from="Llama-2-13b-hf",
            steps=50_000,
            batch_size=256,
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=15, draft_length=12),
    )
