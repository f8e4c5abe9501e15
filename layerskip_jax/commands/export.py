"""``layerskip export RUN FOLDER`` writes a run as a Hugging Face folder.

The reverse needs no command: `layerskip_jax.checkpoint.reading.load_model` opens Hugging Face folders.
"""

import json
import typing
from typing import Literal

import jax.numpy as jnp
from etils import epath

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, config_json
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.checkpoint.reading import context_length, load_model
from layerskip_jax.command_line import add_run, make_parser, typed
from layerskip_jax.config import Config
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.errors import UserError
from layerskip_jax.locations import new_folder

DType = Literal["float32", "bfloat16", "float16"]


def export_model(run: str, folder: str, dtype: DType = "float32") -> Config:
    """Write the newest checkpoint of a run, or one checkpoint, as a new ``folder`` that transformers opens.

    ``dtype`` is that of the files; checkpoints hold float32. The folder gets its name when it is complete. Returns the
    config of the run. Raises `UserError` if the folder exists.
    """
    target = epath.Path(folder).expanduser()
    if target.exists():
        raise UserError(f"{folder} exists: name a new folder, or remove it first")
    model, config, tokenizer_path = load_model(run)
    tokenizer = load_tokenizer(str(tokenizer_path))
    files = tokenizer.companions | tokenizer_files(tokenizer)
    bos, (eos, *others) = tokenizer.bos_id, tokenizer.settings.end_ids or (tokenizer.eos_id,)
    settings = config_json(config.model, context_length(config), dtype, bos, eos)
    generation = json.loads(files.get("generation_config.json", b"{}")) | {
        "bos_token_id": bos,
        "eos_token_id": [eos, *others] if others else eos,
        # transformers reads the draft length for generate(assistant_early_exit=E) only from this file.
        "num_assistant_tokens": config.decode_settings.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    files |= {
        CONFIG: json.dumps(settings, indent=1).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }
    with new_folder(target) as partial:
        write_weights(partial, config.model, named_arrays(model), jnp.dtype(dtype))
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return config


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
    options = parser.parse_known_options(argv)
    config = export_model(options.run, options.folder, options.dtype)
    exit_layer = resolve_exit_layer(config.decode_settings, config.model.num_layers)
    print(f"{options.folder}: open it with transformers' AutoModelForCausalLM.from_pretrained")
    print(f"and draft with generate(..., assistant_early_exit={exit_layer})")
