"""A small LayerSkip model of Python code, trained from scratch on this machine's own standard library.

Command:  make quickstart    (once there is a tokenizer: python train.py --config configs/quickstart.py)
Result:   held-out loss 2.904 at exit 3, 2.739 at exit 8, 2.735 at exit 16; under 15 minutes on 2 cores (README.md)
"""

from dataclasses import replace

from layerskip_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.presets import pretraining


def get_config() -> Config:
    # Deep and narrow, so that a draft runs few of many layers.
    base = pretraining(ModelConfig(num_layers=16, dim=128, num_heads=2, num_kv_heads=2, ffn_dim=352, vocab_size=2048))
    return replace(
        base,
        # One exit at each step, with its whole weight: a run this short needs it for the early exits to learn.
        early_exit=replace(base.early_exit, always_last=False, e_scale=1.0),
        data=DataConfig(source="python_stdlib", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(
            run_dir="runs/quickstart",
            steps=500,
            batch_size=8,
            loss_chunk=64,
            log_every=8,  # coprime to the rotation, so that every exit is logged
            evaluate_every=125,
            checkpoint_every=125,
            sample_every=250,
            sample_prompt="def ",
        ),
        decode=DecodeConfig(exit_layer=3, draft_length=3, max_new_tokens=128),
    )
