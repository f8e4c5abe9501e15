"""Hugging Face Llamas to runs of ours and back.

``python -m layerskip_jax.huggingface import DIR RUN`` and ``python -m layerskip_jax.huggingface export RUN DIR``;
`layerskip_jax.llama` reads and writes the files.
"""

import dataclasses
import json

import jax.numpy as jnp
from etils import epath

from layerskip_jax.checkpoint import checkpoint_folder, load_model, named_arrays, save_weights
from layerskip_jax.command_line import make_parser, one_of
from layerskip_jax.config import Config
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.configure import exit_layer_of
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.llama.config_json import CONFIG, config_json, is_llama_folder
from layerskip_jax.llama.tokenizer_files import tokenizer_files
from layerskip_jax.llama.weights import write_weights
from layerskip_jax.model import parameter_count

DTYPES = ("float32", "bfloat16", "float16")


def import_model(folder: str, run: str) -> Config:
    """Write the Llama in ``folder`` as the checkpoint of a new run, with its tokenizer; return its config.

    The run holds weights alone: decode from it, or train a new run with ``train.init_from``. Raises `UserError` where
    there is no such model, or a run is there already.
    """
    if not is_llama_folder(folder):
        raise UserError(f"no Hugging Face model at {folder}: expected a folder with {CONFIG} and safetensors files")
    model, config, tokenizer_path = load_model(folder)
    tokenizer = Tokenizer.load(str(tokenizer_path))
    tokenizer.check_vocabulary(config.model.vocab_size, padded=True)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run))
    kept = str(checkpoint_folder(config) / tokenizer_path.name)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=kept))
    save_weights(config, named_arrays(model), tokenizer)
    return config


def export_model(run: str, folder: str, dtype: str = "float32") -> Config:
    """Write a run's newest checkpoint, or one checkpoint, as a new ``folder`` that transformers opens.

    ``dtype`` is that of the files; a run holds float32. The folder appears under its name when it is complete. Returns
    the run's config. Raises `UserError` if the folder exists.
    """
    target = epath.Path(folder).expanduser()
    if target.exists():
        raise UserError(f"{folder} exists: name a new folder, or remove it first")
    model, config, tokenizer_path = load_model(run)
    tokenizer = Tokenizer.load(str(tokenizer_path))
    files = tokenizer_files(tokenizer)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    said = config_json(config.model, config.model.context_length or config.data.sequence_length, dtype, bos, eos)
    drafts = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        # With these, transformers drafts as we do: generate(assistant_early_exit=E) reads them from here alone.
        "num_assistant_tokens": config.decode.draft_length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    partial = target.parent / f"{target.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    write_weights(partial, config.model, named_arrays(model), jnp.dtype(dtype))
    files |= {CONFIG: json.dumps(said, indent=1).encode(), "generation_config.json": json.dumps(drafts).encode()}
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.rename(target)
    return config


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Import a local folder of a Hugging Face Llama as a run (import DIR RUN), or export a run.")
    parser.add_argument("command", metavar="import|export", type=one_of(("import", "export")))
    parser.add_argument("source", metavar="FROM", help="import: the folder; export: a run, or one checkpoint in it")
    parser.add_argument("target", metavar="TO", help="import: the new run; export: the new folder")
    parser.add_argument(
        "--dtype",
        metavar="{" + ",".join(DTYPES) + "}",
        type=one_of(DTYPES),
        default="float32",
        help="export: type of the written weights (default: float32, which loses nothing)",
    )
    options = parser.parse_known_options(argv)
    if options.command == "import":
        model = import_model(options.source, options.target).model
        print(f"{options.target}: {model.num_layers} blocks, {parameter_count(model):,} parameters")
        print(f"decode: python decode.py --checkpoint {options.target} --prompt ...")
        print(f"train on: python train.py --train.init_from {options.target} ...")
    else:
        config = export_model(options.source, options.target, options.dtype)
        exit_layer = exit_layer_of(config.decode, config.model.num_layers)
        print(f"{options.target}: opens with transformers' AutoModelForCausalLM.from_pretrained")
        print(f"draft there with generate(..., assistant_early_exit={exit_layer})")


if __name__ == "__main__":
    run_command(main)
