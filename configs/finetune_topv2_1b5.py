"""Finetuning of the 1.5B model of configs/scratch_1b5.py on a task: TOPv2, from an utterance to its semantic parse.

LayerSkip table 1: p_max 0.2, S = 1, gradual, e_scale 1.0, learning rate 1e-4, 256 sequences a step, 5.8k steps.
The paper gives no sequence length and no warmup. Only the responses have a loss. For another task, pass another folder
of JSON lines: train.jsonl and validation.jsonl, with a prompt and a response on each line.

Command:  python train.py --config configs/finetune_topv2_1b5.py --train.run_dir gs://BUCKET/runs/finetune_topv2_1b5
          --data.path gs://BUCKET/topv2 --train.init_from gs://BUCKET/runs/scratch_1b5
          --data.tokenizer gs://BUCKET/runs/scratch_1b5/checkpoints/tokenizer.model
Fits:     python tpu/compile_ahead.py --config configs/finetune_topv2_1b5.py --topology v5e:4x8
Result:   none, the step has only been compiled ahead of time
"""

from dataclasses import replace

from layerskip_jax.config import Config, DecodeConfig, EarlyExitConfig
from layerskip_jax.presets import LAYERSKIP_1B5, finetuning


def get_config() -> Config:
    tokenizer = "gs://your-bucket/runs/scratch_1b5/checkpoints/tokenizer.model"
    base = finetuning(LAYERSKIP_1B5, chips=32, tokenizer=tokenizer)
    return replace(
        base,
        layer_dropout=replace(base.layer_dropout, p_max=0.2),
        early_exit=EarlyExitConfig(curriculum="gradual", e_scale=1.0),
        data=replace(
            base.data,
            source="jsonl",
            path="gs://your-bucket/topv2",
            prompt_key="prompt",
            text_key="response",
            sequence_length=512,
        ),
        train=replace(
            base.train,
            run_dir="gs://your-bucket/runs/finetune_topv2_1b5",
            init_from="gs://your-bucket/runs/scratch_1b5",
            steps=5_800,
            evaluate_every=200,
            checkpoint_every=200,
        ),
        decode=DecodeConfig(exit_layer=6, draft_length=8),
    )
