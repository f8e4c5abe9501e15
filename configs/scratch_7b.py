"""LayerSkip's Llama2 7B from scratch.

LayerSkip table 1: p_max 0.2, exponential S(t), rotational R = 31, e_scale 0.2, 26B tokens.
Optimizer and warmup are not in the paper: Llama conventions.

Command:  python train.py --config configs/scratch_7b.py --train.run_dir gs://BUCKET/runs/scratch_7b
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_7b.py --topology v5p:4x4x4
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
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.2, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=31, e_scale=0.2),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="gs://your-bucket/tokenizer.model",
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=2000, beta1=0.9, beta2=0.95, final_fraction=0.1),
        mesh=MeshConfig(fsdp=64),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/scratch_7b",
            steps=50_000,
            batch_size=128,
            loss_chunk=2048,  # with two sequences on a chip, 4,096 tokens at once (tpu/README.md)
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=8, draft_length=12),
    )
