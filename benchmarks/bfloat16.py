"""Count the greedy speculative texts that differ from plain decoding's in bfloat16 on a CPU, by cause.

    python -m benchmarks.bfloat16 --prompts 500

A model with random weights continues random prompts. The first line of the table uses XLA's defaults. Each later line
adds one setting: round every intermediate result to bfloat16 (`xla_allow_excess_precision` off); do not call YNNPACK;
decode each plain prompt next to a copy of it, so that its matmuls use the kernel for several rows. Decoding uses the
first two (`ROUNDS_OPTIONS`). The strategies decode one after the other, so compare their tokens/s only roughly.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import common
from layerskip_jax import compiler_options
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding import engine
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer

CONFIG = ModelConfig(8, 128, 4, 2, 352, 512, compute_dtype="bfloat16")
EXIT, DRAFT_LENGTHS, PROMPT_TOKENS, NEW_TOKENS = 3, (1, 2, 4, 7), 48, 48
OPTIONS = dict(compiler_options.ROUNDS_OPTIONS["cpu", "bfloat16"])
NO_EXCESS = {name: value for name, value in OPTIONS.items() if "excess_precision" in name}


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of all prompts, and the seconds that their rounds took."""

    tokens: list[list[int]]
    seconds: float


def compile_with(options: dict[str, Any]) -> None:
    """Let `engine.generate` compile its rounds with ``options`` only."""
    compiler_options.ROUNDS_OPTIONS["cpu", "bfloat16"] = options


def decode(model: Transformer, prompts: list[list[int]], strategy: Strategy, copies: int = 1) -> Texts:
    """Continue each prompt alone, or next to copies of itself."""
    results = [engine.generate(model, [prompt] * copies, NEW_TOKENS, strategy) for prompt in prompts]
    return Texts([result.tokens[0] for result in results], sum(result.seconds for result in results))


def differing(a: Texts, b: Texts) -> int:
    return sum(one != other for one, other in zip(a.tokens, b.tokens, strict=True))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500, help="prompts; each gives a text for every draft length")
    options = parser.parse_args()
    common.header()
    random, model = np.random.default_rng(0), Transformer(CONFIG, rngs=nnx.Rngs(0)).unstacked()
    prompts = [random.integers(3, CONFIG.vocab_size, PROMPT_TOKENS).tolist() for _ in range(options.prompts)]
    rows = {
        "as compiled by default": ({}, 1),
        "and no excess precision": (NO_EXCESS, 1),
        "and no YNNPACK": (OPTIONS, 1),
        "and plain decoding with a second row": (OPTIONS, 2),
    }
    print(f"{'':38}  texts that differ   tokens/s: plain  speculative (d = 4)")
    for name, (settings, copies) in rows.items():
        compile_with(settings)
        plain = decode(model, prompts, Autoregressive(Greedy()), copies)
        texts = {d: decode(model, prompts, SelfSpeculative(Greedy(), Fixed(EXIT, d))) for d in DRAFT_LENGTHS}
        count, total = sum(differing(plain, text) for text in texts.values()), len(prompts) * len(texts)
        tokens = NEW_TOKENS * len(prompts)
        print(
            f"{name:38}  {count:5} of {total:5}      {tokens / plain.seconds:10.0f}  {tokens / texts[4].seconds:10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
