"""The model of docs/results.md: LayerSkip with the paper's recipe for pretraining, at a size that a CPU trains.

Command:  python -m benchmarks.evidence    (trains configs/evidence.py and its variants, and measures them)
"""

from layerskip_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    layers, batch, length, tokens = 12, 8, 256, 10_000_000
    steps = tokens // (batch * length) + 1
    return Config(
        model=ModelConfig(num_layers=layers, dim=64, num_heads=2, num_kv_heads=2, ffn_dim=176, vocab_size=2048),
        # LayerSkip table 1, pretraining from scratch: p_max 0.1 rising, rotation with R = L - 1, e_scale 0.2.
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=layers - 1, e_scale=0.2),
        data=DataConfig(source="python_stdlib", sequence_length=length),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        train=TrainConfig(
            run_dir="runs/evidence",
            steps=steps,
            batch_size=batch,
            loss_chunk=64,
            log_every=12,  # prime to the rotation, so that every exit is seen
            evaluate_every=steps // 10,
            checkpoint_every=steps // 10,
        ),
        decode=DecodeConfig(exit_layer=3, draft_length=4, max_new_tokens=256),
    )
