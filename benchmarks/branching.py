"""Tokens per round with one and with several choices at each position: ``python -m benchmarks.branching RUN``.

RUN is the run folder of a trained model. The prompts are beginnings of held-out documents. For greedy and for sampled
texts and for every draft length, prints what a round emits with 1, 2, 4 and 8 choices, and the speedup over plain
decoding on this machine. On a TPU or GPU a round takes almost the same time with any of them; `tpu/decode_ahead.py
--config configs/scratch_1b5.py --chip v5e --choices 1 4` estimates it. A CPU computes the added positions at nearly
full cost.
"""

import argparse
import dataclasses

from benchmarks.common import header
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.command_line import positive
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.commands.sweep import measure
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.errors import run_command

CHOICES = (1, 2, 4, 8)
KINDS = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--draft_lengths", type=int, nargs="+", default=[2, 4, 8], metavar="D")
    parser.add_argument("--repeats", type=positive, default=1)
    options = parser.parse_args()
    header()
    model, config, tokenizer_path = load_model(options.run, unstacked=True)
    tokenizer, exit_layer = (
        load_tokenizer(str(tokenizer_path)),
        resolve_exit_layer(config.decode_settings, len(model.blocks)),
    )
    prompts = [tokenizer.encode_prompt(text) for text in read_prompts(None, None, options.prompts, config)]
    for kind, settings in KINDS.items():
        print(f"{kind}, exit {exit_layer} of {len(model.blocks)}: choices, tokens a round, against 1 choice, measured")
        for d in options.draft_lengths:
            one = DecodeConfig(
                ignore_eos=True, max_new_tokens=options.new_tokens, exit_layer=exit_layer, draft_length=d, **settings
            )
            configs = [dataclasses.replace(one, choices=C) for C in CHOICES]
            _, *measured = measure(model, prompts, configs, options.repeats)
            for C, m in zip(CHOICES, measured, strict=True):
                gain = m.tokens_per_round / measured[0].tokens_per_round
                differs = "  texts DIFFER" if m.identical is False else ""
                print(
                    f"  d = {d}  {C}  {m.tokens_per_round:5.2f}  {gain:5.3f}x  {m.speedup:5.2f}x{differs}", flush=True
                )


if __name__ == "__main__":
    run_command(main)
