"""Continual pretraining of Llama3 8B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 8, e_scale 0.1. The paper trains on 419B tokens;
50,000 steps of this batch are 52B: train.steps 400,000 would be all.
The paper gives no learning rate and no batch for it; those of Llama2 7B stand in.

Command:  python train.py --config configs/continual_llama3_8b.py --train.run_dir gs://BUCKET/runs/continual_llama3_8b
          --data.path gs://BUCKET/tokens
          --train.init_from Meta-Llama-3-8B --data.tokenizer Meta-Llama-3-8B/tokenizer.json
Weights:  hf download meta-llama/Meta-Llama-3-8B --local-dir Meta-Llama-3-8B, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama3_8b.py --topology v5p:4x4x4
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
            num_kv_heads=8,
            ffn_dim=14_336,
            vocab_size=128_256,
            rope_base=500_000.0,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=8, e_scale=0.1),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="Meta-Llama-3-8B/tokenizer.json",
            sequence_length=8192,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=64),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/continual_llama3_8b",
            init_from="Meta-Llama-3-8B",
            steps=50_000,
            batch_size=128,
            loss_chunk=2048,  # with two sequences on a chip, 4,096 tokens at once (tpu/README.md)
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=8, draft_length=12),
    )
