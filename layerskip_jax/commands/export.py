"""``layerskip export RUN FOLDER`` writes a run as a Hugging Face folder.

The reverse needs no command: `layerskip_jax.checkpoint.reading.load_model` opens Hugging Face folders.
"""

import json
import typing
from typing import Literal

import jax.numpy as jnp

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, config_json
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.checkpoint.reading import context_length, open_model_folder
from layerskip_jax.checkpoint.run_folder import RunFolder
from layerskip_jax.checkpoint.swept import decode_settings
from layerskip_jax.checks import require
from layerskip_jax.command_line import add_run, make_parser, not_negative, typed
from layerskip_jax.commands.model_card import CARD, ExitTable, model_card
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import checkpoint_quality
from layerskip_jax.locations import is_remote, locate, new_folder
from layerskip_jax.model import Transformer
from layerskip_jax.training.monitoring.metrics import read_records

DType = Literal["float32", "bfloat16", "float16"]


def export_model(run: str, folder: str, dtype: DType = "float32", batches: int = 0) -> int:
    """Write the newest checkpoint of a run, or one checkpoint, as a new ``folder`` that transformers opens.

    ``dtype`` is that of the files; checkpoints hold float32. The model card shows the loss of each exit that the run
    recorded, or with ``batches`` the loss and agreement measured on that many held-out batches. The folder gets its
    name when it is complete. transformers then drafts from one exit, with a constant draft length: those that
    ``layerskip sweep`` stored, if it found a fixed exit fastest, or else those of the run's config. Returns the exit.
    Raises `UserError` if ``folder`` exists.
    """
    target = locate(folder)
    require(not is_remote(target), f"export writes to a local disk, not to {folder}: copy the folder afterwards")
    if target.exists():
        raise UserError(f"{folder} exists: name a new folder, or remove it first")
    opened = open_model_folder(run)
    config = opened.config
    trained = opened if isinstance(opened, RunFolder) and opened.checkpoint.name.isdigit() else None
    require(trained is not None or not batches, "--batches measures a checkpoint of a run: RUN or RUN/checkpoints/STEP")
    decode = decode_settings(opened, config)
    if (decode.mode, decode.policy) != ("self_speculative", "fixed"):  # transformers has no other
        decode = config.decode_settings
    draft_exit = resolve_exit_layer(decode, config.model.num_layers)
    tokenizer = load_tokenizer(str(opened.tokenizer))
    model = opened.model()
    table = _exit_table(trained, batches, model) if trained else ExitTable({}, {})
    files = tokenizer.companions | tokenizer_files(tokenizer)
    bos, (eos, *others) = tokenizer.bos_id, tokenizer.settings.end_ids or (tokenizer.eos_id,)
    settings = config_json(config.model, context_length(config), dtype, bos, eos)
    generation = json.loads(files.get("generation_config.json", b"{}")) | {
        "bos_token_id": bos,
        "eos_token_id": [eos, *others] if others else eos,
        # transformers reads the draft length for generate(assistant_early_exit=E) only from this file.
        "num_assistant_tokens": decode.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    files |= {
        CONFIG: json.dumps(settings, indent=1).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }
    steps = int(trained.checkpoint.name) if trained else None
    files[CARD] = model_card(target.name, config, steps, table, draft_exit, decode.draft_length).encode()
    with new_folder(target) as partial:
        write_weights(partial, config.model, named_arrays(model), jnp.dtype(dtype))
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return draft_exit


def _exit_table(run: RunFolder, batches: int, model: Transformer) -> ExitTable:
    if batches:
        quality = checkpoint_quality(run, batches, loaded=(model, run.config, run.tokenizer))
        return ExitTable(*(dict(enumerate(map(float, row), 1)) for row in (quality.loss_L, quality.agreement_L)))
    prefix, loss = "validation/exit_loss/", dict[int, float]()
    for record in read_records(str(run.root), last_step=int(run.checkpoint.name)):
        named = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        loss |= {int(name): value for name, value in named.items() if name.isdigit() and isinstance(value, float)}
    return ExitTable(dict(sorted(loss.items())), {})


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Write a run as a folder that Hugging Face transformers, vLLM and lm-eval open.", "export")
    add_run(parser, "run folder, or one checkpoint in it")
    parser.add_argument("folder", metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--dtype",
        metavar="{" + ",".join(typing.get_args(DType)) + "}",
        type=typed(DType),
        default="float32",
        help="type of the written weights (default: float32, which is lossless)",
    )
    parser.add_argument(
        "--batches",
        metavar="N",
        type=not_negative,
        default=0,
        help="held-out batches to measure every exit on, for the model card; 0: use the losses that the run recorded",
    )
    options = parser.parse_known_options(argv)
    exit_layer = export_model(options.run, options.folder, options.dtype, options.batches)
    print(f"{options.folder}: open it with transformers' AutoModelForCausalLM.from_pretrained")
    print(f"and draft with generate(..., assistant_early_exit={exit_layer})")
