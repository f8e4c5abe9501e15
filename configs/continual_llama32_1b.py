"""Continual pretraining of Llama3.2 1B.

LayerSkip table 1: p_max 0.1, S = 1, rotational R = 8, e_scale 0.1. The paper trains on 839B tokens;
50,000 steps of this batch are 52B: train.steps 800,000 would be all.
The paper gives no learning rate and no batch for it; those of Llama2 7B stand in.

Command:  python train.py --config configs/continual_llama32_1b.py --train.run_dir gs://BUCKET/runs/continual_llama32_1b
          --data.path gs://BUCKET/tokens --train.init_from Llama-3.2-1B --data.tokenizer Llama-3.2-1B/tokenizer.json
Weights:  hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B, on every host (docs/huggingface.md)
Fits:     python tpu/compile_ahead.py --config configs/continual_llama32_1b.py --topology v5e:4x8
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
            num_layers=16,
            dim=2048,
            num_heads=32,
            num_kv_heads=8,
            ffn_dim=8192,
            vocab_size=128_256,
            rope_base=500_000.0,
            tied_embedding=True,
            rope_scaling="llama3",
            rope_factor=32.0,
            context_length=131_072,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=8, e_scale=0.1),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="Llama-3.2-1B/tokenizer.json",
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=32),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/continual_llama32_1b",
            init_from="Llama-3.2-1B",
            steps=50_000,
            batch_size=256,
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=4, draft_length=6),
    )
