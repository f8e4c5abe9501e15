"""Measure the peak memory of importing a Llama: ``python -m benchmarks.import_memory [--dtype bfloat16]``.

Writes a random Llama with 99 million parameters as safetensors of ``--dtype``. One new process loads it for training,
another for decoding. Each prints how much its peak resident size grew, as a multiple of the model's 394 MB in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import header
from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, config_json
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.config import DataConfig, ModelConfig
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer, parameter_count

MODEL = ModelConfig(24, 512, 8, 8, 1536, 16_384)
LOADERS = {
    "for training": lambda folder: load_model(f"{folder}/llama"),
    "for decoding": lambda folder: load_model(f"{folder}/llama", unstacked=True),
}


def make(folder: Path, dtype: str) -> None:
    """Write a random Llama with a tokenizer."""
    (folder / "llama").mkdir(parents=True)
    shapes = named_arrays(jax.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(leaf.shape, np.float32) * 0.02 for name, leaf in shapes.items()}
    write_weights(folder / "llama", MODEL, arrays, jnp.dtype(dtype))
    corpus = DataConfig(source="text", path=str(Path(__file__).parent))
    tokenizer = train_tokenizer(open_documents(corpus, "train"), str(folder / "t.model"), 512)
    (folder / "llama" / CONFIG).write_text(json.dumps(config_json(MODEL, 256, dtype, 1, 2)))
    for name, content in tokenizer_files(tokenizer).items():
        (folder / "llama" / name).write_bytes(content)


def resident(key: str) -> int:
    """Return VmRSS (resident size) or VmHWM (its peak) [bytes]."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def measure(loader: str, folder: str) -> None:
    jax.block_until_ready(jnp.ones(8) + 1)
    before = resident("VmRSS")
    model = LOADERS[loader](folder)
    size = 4 * parameter_count(MODEL)
    print(f"{loader:14} {(resident('VmHWM') - before) / size:.2f} x {size / 1e6:.0f} MB", flush=True)
    del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.measure:
        measure(*args.measure)
        return
    header("safetensors")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.dtype)
        for loader in LOADERS:
            subprocess.run([sys.executable, "-m", "benchmarks.import_memory", "--measure", loader, folder], check=True)


if __name__ == "__main__":
    run_command(main)
