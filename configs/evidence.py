"""The model of docs/results/evidence.md: the paper's recipe for pretraining, at a size that a CPU trains.

Command:  python -m benchmarks.evidence    (trains configs/evidence.py and its variants, and measures them)
Result:   loss of the last exit 2.459 (plain: 2.488), perplexity of exit 6 22.2 (plain: 172.3): docs/results/evidence.md
"""

from dataclasses import replace

from layerskip_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.presets import pretraining


def get_config() -> Config:
    model = ModelConfig(num_layers=12, dim=64, num_heads=2, num_kv_heads=2, ffn_dim=176, vocab_size=2048)
    batch, length, tokens = 8, 256, 10_000_000
    steps = tokens // (batch * length) + 1
    return replace(
        pretraining(model),
        data=DataConfig(source="python_stdlib", sequence_length=length),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        train=TrainConfig(
            run_dir="runs/evidence",
            steps=steps,
            batch_size=batch,
            loss_chunk=16,  # the logits fit into the cache of a core: mostly faster than 64 (docs/results/recipes.md)
            log_every=12,  # coprime to the rotation, so that every exit is logged
            evaluate_every=steps // 10,
            checkpoint_every=steps // 10,
        ),
        decode=DecodeConfig(draft_length=4, max_new_tokens=256),
    )
