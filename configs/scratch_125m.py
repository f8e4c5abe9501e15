"""A 125M model from scratch on a single TPU host of 8 chips.

The shape of the small GPT-3, and LayerSkip's recipe for training from scratch (table 1, 1.5B).

Command:  python train.py --config configs/scratch_125m.py --train.run_dir gs://BUCKET/runs/scratch_125m
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_125m.py --topology v5e:2x4
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
            num_layers=12,
            dim=768,
            num_heads=12,
            num_kv_heads=12,
            ffn_dim=2048,
            vocab_size=32_000,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=11, e_scale=0.2),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="gs://your-bucket/tokenizer.model",
            sequence_length=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=1000),
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/scratch_125m",
            steps=20_000,
            batch_size=256,
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=3, draft_length=4),
    )
