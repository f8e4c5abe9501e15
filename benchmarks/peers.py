"""Compare our decoding with transformers' on a CPU: ``python -m benchmarks.peers [--models small] [--json FILE]``.

Same random weights, prompt and machine; float32, greedy, batch 1, 64 tokens in and 256 out, no EOS. Compares plain
decoding, self-speculation from exit 4 with 6 drafts (ours, and transformers' ``assistant_early_exit``), and prompt
lookup of 6 tokens. ``--tails`` scales what the blocks after the exit add to the residual stream, and so sets the
acceptance. Prefill counts on both sides, compilation on neither (ours is in the warm-up). Needs ``pip install torch
transformers`` and an idle machine: torch's threads spin while they wait for each other, so another busy process slows
them down a lot.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.common import (
    MODELS,
    Timings,
    add_json_option,
    called_in_turn,
    equal_tokens,
    header,
    model_with_tail,
    write_json,
)
from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, config_json
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.command_line import positive
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer

try:
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark compares with transformers; pip install torch transformers") from None

EXIT_LAYER, DRAFT_LENGTH = 4, 6
PROMPT, NEW_TOKENS = 64, 256
CONTEXT = 2048  # maximum length in the exported config [tokens]
STRATEGIES: dict[str, Strategy] = {
    "plain": Autoregressive(Greedy()),
    "speculative": SelfSpeculative(Greedy(), Fixed(exit_layer=EXIT_LAYER, draft_length=DRAFT_LENGTH)),
    "lookup": PromptLookup(Greedy(), DRAFT_LENGTH),
}
THEIR_OPTIONS: dict[str, dict[str, int]] = {
    "plain": {},
    "speculative": {"assistant_early_exit": EXIT_LAYER},
    "lookup": {"prompt_lookup_num_tokens": DRAFT_LENGTH},
}
BARS = {"small": {"plain": 3.5, "speculative": 4.0}, "large": {"plain": 2.0, "speculative": 2.5}}
BAR_TAIL = 0.02  # the tail for which speculation has a bar; at 0 every draft is accepted, as in no trained model


def as_llama(model: Transformer) -> transformers.LlamaForCausalLM:
    """Return a transformers model with the same weights that drafts as we do, and in which no token ends a text."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_json(model.config, CONTEXT, "float32", None, None)
        write_weights(epath.Path(folder), model.config, named_arrays(model), np.float32)
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        llama = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    # transformers reads these from the model's generation_config and silently ignores them as generate() arguments.
    llama.generation_config.num_assistant_tokens = DRAFT_LENGTH
    llama.generation_config.num_assistant_tokens_schedule = "constant"
    llama.generation_config.assistant_confidence_threshold = 0.0  # the default 0.4 ends most drafts after one token
    return llama.eval()


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.no_grad()
def compare(name: str, tail: float, repeats: int) -> list[dict[str, Any]]:
    """Time both libraries and all kinds of decoding in turn, ``repeats`` times after a warm-up."""
    model = model_with_tail(MODELS[name], EXIT_LAYER, tail)
    llama, model = as_llama(model), model.unstacked()
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()
    tokens_BT = torch.tensor([prompt])
    difference = np.abs(llama(tokens_BT).logits.numpy() - np.asarray(model(jnp.array([prompt])))).max()
    if difference > 1e-3:
        raise SystemExit(f"{name}, tail {tail}: the models are not equal, their logits differ by {difference:.2g}")

    # Give torch its best number of threads: on a busy machine, OpenMP barriers can make two threads slower than one.
    threads = {}
    for decoding, options in THEIR_OPTIONS.items():
        trials = {}
        for count in {1, os.cpu_count() or 1}:
            torch.set_num_threads(count)
            trial = partial(llama.generate, tokens_BT, max_new_tokens=48, **options)
            trials[count] = min(_seconds(trial) for _ in range(3))
        threads[decoding] = min(trials, key=lambda count: trials[count])

    texts: dict[str, list[int]] = {}
    generations: dict[str, Generation] = {}

    def theirs(decoding: str) -> float:
        torch.set_num_threads(threads[decoding])
        began = time.perf_counter()
        output_BT = llama.generate(tokens_BT, max_new_tokens=NEW_TOKENS, **THEIR_OPTIONS[decoding])
        texts[decoding] = output_BT[0, PROMPT:].tolist()
        return (time.perf_counter() - began) / NEW_TOKENS

    def ours(decoding: str) -> float:
        generations[decoding] = one = generate(model, [prompt], NEW_TOKENS, STRATEGIES[decoding])
        return (one.seconds + one.prefill_seconds) / one.new_tokens

    ways = {f"their {decoding}": partial(theirs, decoding) for decoding in STRATEGIES}
    ways |= {f"our {decoding}": partial(ours, decoding) for decoding in STRATEGIES}
    timings = Timings(called_in_turn(ways, repeats))  # seconds per token

    return [
        {
            "model": name,
            "tail": tail,
            "their_threads": threads[decoding],
            "decoding": decoding,
            "their_tokens_per_second": 1 / timings.median(f"their {decoding}"),
            "our_tokens_per_second": 1 / timings.median(f"our {decoding}"),
            "ratio": timings.ratio(f"their {decoding}", f"our {decoding}"),
            "bar": BARS[name].get(decoding) if decoding == "plain" or tail == BAR_TAIL else None,
            "our_acceptance": generation.acceptance if generation.drafted else None,
            # Equal leading tokens. Near-ties may separate the two libraries, but not a library from itself.
            "ours_is_theirs": equal_tokens(generation.tokens[0], texts[decoding]),
            "theirs_is_their_plain": equal_tokens(texts[decoding], texts["plain"]),
            "ours_is_our_plain": equal_tokens(generation.tokens[0], generations["plain"].tokens[0]),
        }
        for decoding, generation in generations.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['model']}, tail {rows[0]['tail']:g}: tokens/s; texts by equal leading tokens of {NEW_TOKENS}")
    print("             theirs     ours   ratio     bar  acceptance  ours = theirs  theirs = plain  ours = plain")
    for row in rows:
        bar = f"{row['bar']:.1f}x" if row["bar"] else "-"
        acceptance = f"{row['our_acceptance']:.3f}" if row["our_acceptance"] is not None else "-"
        print(
            f"{row['decoding']:11} {row['their_tokens_per_second']:7.1f}  {row['our_tokens_per_second']:7.1f}  "
            f"{row['ratio']:5.2f}x  {bar:>6}  {acceptance:>10}  "
            f"{row['ours_is_theirs']:13}  {row['theirs_is_their_plain']:14}  {row['ours_is_our_plain']:12}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument(
        "--tails", nargs="+", type=float, default=[0.0, BAR_TAIL], help="scales of the later blocks' outputs"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="timings of each alternative")
    add_json_option(parser)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where torch runs
    transformers.logging.set_verbosity_error()  # its drafting uses its own deprecated API
    about, results = header("torch", "transformers"), []
    print(f"load average {os.getloadavg()[0]:.1f} at the start; {args.repeats} repeats")
    for name in args.models:
        for tail in args.tails:
            rows = compare(name, tail, args.repeats)
            print_table(rows)
            results += rows
    write_json(args.json, about, results)


if __name__ == "__main__":
    run_command(main)
