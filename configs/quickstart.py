"""A small LayerSkip model of Python code, trained from scratch on this machine's own standard library.

Command:  make quickstart    (once there is a tokenizer: python train.py --config configs/quickstart.py)
Result:   README.md
"""

from dataclasses import replace

from layerskip_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.presets import pretraining, trained_to_draft


def get_config() -> Config:
    base = pretraining(ModelConfig(num_layers=12, dim=192, num_heads=3, num_kv_heads=3, ffn_dim=528, vocab_size=2048))
    return replace(
        # The run is too short to train every exit in turn, so exit 2, which drafts, has a loss at every step. It and
        # the last exit teach each other, because speculation accepts a draft if both predict the same token.
        trained_to_draft(base, exit_layer=2),
        data=DataConfig(source="python_stdlib", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        train=TrainConfig(
            run_dir="runs/quickstart",
            steps=650,
            batch_size=4,  # small, so that there are many steps
            loss_chunk=64,
            evaluate_every=130,
            evaluate_batches=32,  # as `layerskip evaluate`, so that the plots show the same losses
            checkpoint_every=130,
        ),
        decode=DecodeConfig(draft_length=4, max_new_tokens=128),
    )
