"""Compare imported and exported Llamas with transformers: ``python -m benchmarks.parity [--tokens 256] [--json FILE]``.

transformers creates and saves twelve random Llamas of different shapes, and `load_model` loads them. Compares float32
logits, greedy texts, and the bytes of an exported copy with those that transformers saved. ``--random 40`` compares
folders of random shapes, types, shards, rotary scalings and ties instead. Needs
``pip install layerskip_jax[huggingface] torch transformers``.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import add_json_option, equal_tokens, header, write_json
from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.checkpoint.reading import load_model, open_model_folder
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.rounds import Autoregressive
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command

try:
    import torch
    import transformers
    from safetensors import safe_open
except ImportError as error:
    raise SystemExit(f"{error}: parity needs transformers; pip install torch transformers safetensors") from None

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ODD = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 3.5, "low_freq_factor": 0.7, "high_freq_factor": 6.0}
SHAPES: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1, "vocab_size": 513},
    "tied": {"tie_word_embeddings": True, "vocab_size": 311},
    "tied_grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "wide_heads": {"head_dim": 24, "num_key_value_heads": 2},
    "narrow_heads": {"head_dim": 6, "vocab_size": 97},
    "base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "num_hidden_layers": 5},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "llama3_tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16, "vocab_size": 1021},
    "llama3_odd": {"rope_parameters": ODD | {"original_max_position_embeddings": 50}, "num_attention_heads": 6},
}
PROMPT = 12
POSITIONS = 64


def make(shape: dict[str, Any], folder: str, dtype: str = "float32", **saving: Any) -> None:
    """Create a random Llama with transformers and save it."""
    values = {
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,  # about 1 / sqrt(hidden_size), so that activations keep their scale
        "bos_token_id": 1,
        "eos_token_id": None,  # no token ends the text
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | shape))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)


def stored_tensors(folder: str) -> dict[str, bytes]:
    """Return type, shape and bytes of every tensor in the safetensors files of a folder."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                tensor = opened.get_tensor(name)
                found[name] = f"{tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes()
    return found


def random_folder(seed: int) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return shape, dtype and options of saving of a random Llama."""
    draw = random.Random(seed)
    key_heads = draw.choice([1, 2, 3])
    heads, head_dim = key_heads * draw.choice([1, 2, 4]), draw.choice([4, 6, 8, 16, 24])
    explicit = draw.random() < 0.5
    kind, theta = draw.choice(["default", "linear", "llama3"]), draw.choice([1e4, 5e5, 1e6, 12_345.678])
    rotary: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rotary["factor"] = draw.choice([1.5, 2.0, 8.0, 32.0])
    if kind == "llama3":
        low = draw.choice([0.7, 1.0, 2.0])
        rotary |= {"low_freq_factor": low, "high_freq_factor": low + draw.choice([0.5, 3.0, 8.0])}
        rotary["original_max_position_embeddings"] = draw.choice([16, 50, 256])
    shape = {
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "hidden_size": heads * (draw.choice([4, 6, 10, 16]) if explicit else head_dim),
        "head_dim": head_dim if explicit else None,
        "intermediate_size": draw.choice([8, 40, 72, 131]),
        "num_hidden_layers": draw.choice([1, 2, 3, 5]),
        "vocab_size": draw.choice([61, 256, 311, 1021]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "rope_parameters": rotary,
    }
    saving = {"max_shard_size": draw.choice(["1GB", "30KB", "4KB"])}
    return shape, draw.choice(["float32", "bfloat16", "float16"]), saving


def compare(shape: dict[str, Any], tokens: int, dtype: str = "float32", **saving: Any) -> dict[str, Any]:
    """Compare a random Llama: difference of logits, equal leading tokens of a greedy text, equal bytes."""
    with tempfile.TemporaryDirectory() as folder:
        make(shape, f"{folder}/theirs", dtype, **saving)
        theirs = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/theirs", dtype=torch.float32).eval()
        config = open_model_folder(f"{folder}/theirs").config.model
        model, _, _ = load_model(f"{folder}/theirs")
        inputs = np.random.default_rng(0).integers(0, config.vocab_size, (2, POSITIONS))
        with torch.no_grad():
            expected = theirs(torch.tensor(inputs)).logits.numpy()
            prompt = inputs[:1, :PROMPT]
            text = theirs.generate(
                torch.tensor(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0, use_cache=True
            )[0, PROMPT:].tolist()
        ours = np.asarray(jax.jit(lambda model, inputs: model(inputs))(model, jnp.asarray(inputs)))
        unstacked, _, _ = load_model(f"{folder}/theirs", unstacked=True)
        new = generate(unstacked, prompt.tolist(), tokens, Autoregressive(Greedy())).tokens[0]
        back = Path(folder) / "back"
        back.mkdir()
        write_weights(back, config, named_arrays(model), jnp.dtype(dtype))
        return {
            "shape": shape,
            "largest_logit": float(np.abs(expected).max()),
            "logit_difference": float(np.abs(ours - expected).max()),
            "equal_tokens": equal_tokens(new, text),
            "tokens": tokens,
            "same_bytes": stored_tensors(str(back)) == stored_tensors(f"{folder}/theirs"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of the greedy text (default: 256)")
    parser.add_argument("--random", type=int, default=0, help="compare this many random folders instead")
    add_json_option(parser)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # torch runs there too
    folders = {name: (shape, "float32", {}) for name, shape in SHAPES.items()}
    if args.random:
        folders = {f"random {seed}": random_folder(seed) for seed in range(args.random)}
    transformers.utils.logging.disable_progress_bar()
    about = header("torch", "transformers")
    print("shape          largest logit  difference  equal greedy tokens  round trip")
    rows = []
    for name, (shape, dtype, saving) in folders.items():
        row = {"name": name, "dtype": dtype, **saving} | compare(shape, args.tokens, dtype, **saving)
        rows.append(row)
        print(
            f"{name:14} {row['largest_logit']:13.1f}  {row['logit_difference']:10.1e}  "
            f"{row['equal_tokens']:15} of {row['tokens']}  {'same bytes' if row['same_bytes'] else 'DIFFERS'}",
            flush=True,
        )
    write_json(args.json, about, rows)


if __name__ == "__main__":
    run_command(main)
