"""A small LayerSkip model of Python code, trained from scratch on this machine's own standard library.

Command:  make quickstart    (or: python train.py --config configs/quickstart.py, once the tokenizer is there)
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
    return Config(
        model=ModelConfig(num_layers=8, dim=192, num_heads=4, num_kv_heads=4, ffn_dim=512, vocab_size=4096),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=4, e_scale=1.0),
        data=DataConfig(source="python_stdlib", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(
            run_dir="runs/quickstart",
            steps=200,
            batch_size=16,
            loss_chunk=64,
            evaluate_every=100,
            checkpoint_every=100,
            sample_every=100,
            sample_prompt="def ",
        ),
        decode=DecodeConfig(exit_layer=2, draft_length=4, max_new_tokens=128),
    )
