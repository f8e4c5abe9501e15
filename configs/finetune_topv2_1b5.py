"""Finetuning of the 1.5B model of configs/scratch_1b5.py on a task: TOPv2, from an utterance to its semantic parse.

LayerSkip table 1: p_max 0.2, S = 1, gradual, e_scale 1.0, learning rate 1e-4, 256 sequences a step, 5.8k steps.
Sequence length and warmup are not in the paper. The loss is on the responses alone. Another task is another folder of
JSON lines: train.jsonl and validation.jsonl, with a prompt and a response on each.

Command:  python train.py --config configs/finetune_topv2_1b5.py --train.run_dir gs://BUCKET/runs/finetune_topv2_1b5
          --data.path gs://BUCKET/topv2 --train.init_from gs://BUCKET/runs/scratch_1b5
          --data.tokenizer gs://BUCKET/runs/scratch_1b5/checkpoints/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/finetune_topv2_1b5.py --topology v5e:4x8
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
        layer_dropout=LayerDropoutConfig(p_max=0.2, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="gradual", e_scale=1.0),
        data=DataConfig(
            source="jsonl",
            path="gs://your-bucket/topv2",
            prompt_key="prompt",
            text_key="response",
            tokenizer="gs://your-bucket/runs/scratch_1b5/checkpoints/tokenizer.model",
            sequence_length=512,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        mesh=MeshConfig(fsdp=32),
        train=TrainConfig(
            run_dir="gs://your-bucket/runs/finetune_topv2_1b5",
            init_from="gs://your-bucket/runs/scratch_1b5",
            steps=5_800,
            batch_size=256,
            remat="full",
            evaluate_every=200,
            checkpoint_every=200,
        ),
        decode=DecodeConfig(exit_layer=6, draft_length=8),
    )
