"""LayerSkip's 1.5B model from scratch.

LayerSkip table 1: p_max 0.1, exponential S(t), rotational R = 23, e_scale 0.2, 26B tokens.
Width of the feed-forward part, vocabulary, optimizer and warmup are not in the paper: Llama conventions.

Command:  python train.py --config configs/scratch_1b5.py --train.run_dir gs://BUCKET/runs/scratch_1b5
          --data.path gs://BUCKET/tokens --data.tokenizer gs://BUCKET/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/scratch_1b5.py --topology v5e:4x8
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
            num_layers=24,
            dim=2048,
            num_heads=16,
            num_kv_heads=16,
            ffn_dim=5632,
            vocab_size=32_000,
        ),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=23, e_scale=0.2),
        data=DataConfig(
            source="tokens",
            path="gs://your-bucket/tokens",
            tokenizer="gs://your-bucket/tokenizer.model",
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=2000, beta1=0.9, beta2=0.95, final_fraction=0.1),
        mesh=MeshConfig(fsdp=32),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/scratch_1b5",
            steps=50_000,
            batch_size=128,
            loss_chunk=1024,  # with four sequences on a chip, 4,096 tokens at once (tpu/README.md)
            remat="full",
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
        decode=DecodeConfig(exit_layer=8, draft_length=6),
    )
