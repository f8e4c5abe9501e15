"""The model shapes and training regimes that the files in ``configs/`` share; each file replaces what differs."""

import dataclasses

from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

GPT3_125M = ModelConfig(num_layers=12, dim=768, num_heads=12, num_kv_heads=12, ffn_dim=2048, vocab_size=32_000)
"""The smallest model of GPT-3 (arXiv 2005.14165, table 2.1), with Llama's SwiGLU and vocabulary."""

LAYERSKIP_1B5 = ModelConfig(num_layers=24, dim=2048, num_heads=16, num_kv_heads=16, ffn_dim=5632, vocab_size=32_000)
"""LayerSkip's 1.5B model. The paper gives neither the feed-forward width nor the vocabulary: those are Llama's."""

LLAMA2_7B = ModelConfig(num_layers=32, dim=4096, num_heads=32, num_kv_heads=32, ffn_dim=11_008, vocab_size=32_000)
LLAMA1_7B = dataclasses.replace(LLAMA2_7B, norm_epsilon=1e-6)
LLAMA2_13B = dataclasses.replace(LLAMA2_7B, num_layers=40, dim=5120, num_heads=40, num_kv_heads=40, ffn_dim=13_824)
LLAMA3_8B = dataclasses.replace(LLAMA2_7B, num_kv_heads=8, ffn_dim=14_336, vocab_size=128_256, rope_base=500_000.0)
LLAMA32_1B = dataclasses.replace(
    LLAMA3_8B,
    num_layers=16,
    dim=2048,
    ffn_dim=8192,
    tied_embedding=True,
    rope_scaling="llama3",
    rope_factor=32.0,
    context_length=131_072,
)


def pretraining(model: ModelConfig) -> Config:
    """Train from scratch (LayerSkip table 1): p_max 0.1, exponential S(t), rotational exits, R = L - 1, e_scale 0.2."""
    return Config(
        model=model,
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="exponential"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=model.num_layers - 1, e_scale=0.2),
    )


def pretraining_on_tpu(model: ModelConfig, *, chips: int, name: str, rows: int = 128) -> Config:
    """`pretraining` for 50,000 steps of ``rows`` x 4,096 pretokenized tokens, sharded over ``chips``; 26B by default.

    ``name`` is the run's folder. The paper gives no warmup and no optimizer: those are Llama's.
    """
    return dataclasses.replace(
        pretraining(model),
        data=_tokens("gs://your-bucket/tokenizer.model"),
        optimizer=OptimizerConfig(learning_rate=8e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=chips),
        train=TrainConfig(
            run_dir=f"gs://your-bucket/runs/{name}",
            steps=50_000,
            batch_size=rows,
            remat="full",
            loss_chunk=4096 * chips // rows,  # 4,096 tokens per chunk on each chip (tpu/README.md)
            evaluate_every=1000,
            checkpoint_every=1000,
        ),
    )


def continual_pretraining(model: ModelConfig, *, chips: int, tokenizer: str) -> Config:
    """Continue from a Llama (LayerSkip table 1): p_max 0.1, S = 1, rotational exits with R = 8, e_scale 0.1.

    52B tokens: 50,000 steps of 256 x 4,096, with the paper's learning rate for Llama2 7B.
    """
    return Config(
        model=model,
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=8, e_scale=0.1),
        data=_tokens(tokenizer),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=chips),
        train=TrainConfig(steps=50_000, batch_size=256, remat="full", evaluate_every=1000, checkpoint_every=1000),
    )


def finetuning(model: ModelConfig, *, chips: int, tokenizer: str) -> Config:
    """Finetune a model on a domain or a task (LayerSkip table 1): S = 1, e_scale 1, learning rate 1e-4.

    The paper gives no warmup.
    """
    base = continual_pretraining(model, chips=chips, tokenizer=tokenizer)
    return dataclasses.replace(
        base,
        early_exit=dataclasses.replace(base.early_exit, e_scale=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
    )


def _tokens(tokenizer: str) -> DataConfig:
    return DataConfig(
        source="tokens",
        path="gs://your-bucket/tokens",
        tokenizer=tokenizer,
        sequence_length=4096,
        # Workers read ahead, so that no step waits for a bucket. A worker needs a row, and a host of the largest slices
        # has 4.
        workers=4,
    )


def trained_to_draft(config: Config, exit_layer: int) -> Config:
    """Return ``config`` with one exit that is trained at every step, in place of the paper's curriculum.

    The exit and the last layer teach each other. Of the recipes that docs/results/recipes.md compares, this one has the
    highest acceptance for its loss.
    """
    early_exit = EarlyExitConfig("fixed", exits=(exit_layer,), distillation="kl", agreement_weight=0.1)
    return dataclasses.replace(config, early_exit=early_exit)


def without_layerskip(config: Config) -> Config:
    """Return ``config`` for the plain model to compare with: no layer dropout, and a loss at the last layer only."""
    return dataclasses.replace(config, layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig())
