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
    layers = 16  # deep and narrow: the draft runs few layers of many
    return Config(
        model=ModelConfig(num_layers=layers, dim=128, num_heads=2, num_kv_heads=2, ffn_dim=352, vocab_size=2048),
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        # One exit a step, without the last layer beside it: in a run this short the early exits need the whole weight.
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=layers - 1, always_last=False, e_scale=1.0),
        data=DataConfig(source="python_stdlib", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(
            run_dir="runs/quickstart",
            steps=500,
            batch_size=8,
            loss_chunk=64,
            log_every=8,  # prime to the rotation, so that every exit is seen
            evaluate_every=125,
            checkpoint_every=125,
            sample_every=250,
            sample_prompt="def ",
        ),
        decode=DecodeConfig(exit_layer=3, draft_length=3, max_new_tokens=128),
    )
