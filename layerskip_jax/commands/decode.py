"""``python decode.py --checkpoint RUN --prompt TEXT [--setting value ...]``"""

import dataclasses
import json
import statistics
import sys
from typing import TYPE_CHECKING, Any

from layerskip_jax.command_line import add_settings, apply_overrides, given_settings, integer, make_parser
from layerskip_jax.commands.prompts import add_prompt_options, read_prompts
from layerskip_jax.config import DecodeConfig
from layerskip_jax.errors import UserError, run_command

if TYPE_CHECKING:
    from layerskip_jax.decoding.text import Answer, TextGenerator

REPEATS = 3
"""--compare times each way of decoding so often, in turn, and reports medians."""


def main(argv: list[str] | None = None) -> None:
    """Load a checkpoint, generate, and report; with ``--compare`` also against plain decoding."""
    parser = make_parser(
        "Generate text from a checkpoint of train.py or a Hugging Face Llama. Settings not given here are those that "
        "python -m layerskip_jax sweep found best and stored with the checkpoint, or else the checkpoint's own config."
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN", required=True, help="run folder, one checkpoint in it, or a Hugging Face folder"
    )
    add_prompt_options(parser)
    parser.add_argument("--batch_size", metavar="N", type=integer, default=1, help="prompts generated together")
    parser.add_argument("--compare", action="store_true", help="time plain decoding too, and compare the texts")
    parser.add_argument("--quiet", action="store_true", help="print the numbers only, not the texts")
    parser.add_argument("--json", action="store_true", help="print JSON lines: one a prompt, then one of numbers")
    add_settings(parser, DecodeConfig())
    options = parser.parse_known_options(argv)
    given = given_settings(options, DecodeConfig)

    # After parsing, so that --help and mistakes answer at once.
    from layerskip_jax.checkpoint.reading import load_model, swept_settings
    from layerskip_jax.commands import terminal
    from layerskip_jax.data.load_tokenizer import load_tokenizer
    from layerskip_jax.decoding.quantization import with_weights
    from layerskip_jax.decoding.text import TextGenerator

    model, config, tokenizer_path = load_model(options.checkpoint, unstacked=True)
    settings = apply_overrides(config.decode, swept_settings(options.checkpoint, given) | given)
    tokenizer = load_tokenizer(str(tokenizer_path))
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {options.batch_size}")
    prompts = read_prompts(options.prompt, options.prompts, options.held_out, config)
    model = with_weights(model, settings.weights)
    generator = TextGenerator(model, tokenizer, settings)
    batches = [prompts[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]

    streams = not (options.json or options.compare or options.quiet) and len(prompts) == 1
    answers = []
    for number, batch in enumerate(batches):
        if streams:
            answers.append(terminal.stream(generator, batch[0], settings))
        else:
            answers.append(generator.generate(batch, first=number * options.batch_size))
            for completion in [] if options.quiet else answers[-1].completions:
                print(json.dumps(dataclasses.asdict(completion)) if options.json else terminal.shown(completion))
                sys.stdout.flush()
    report = terminal.Report.of(answers, model.config, settings)
    if options.compare:
        plain = TextGenerator(model, tokenizer, dataclasses.replace(settings, mode="autoregressive"))
        report = dataclasses.replace(report, **_compare(generator, plain, batches))
    print(json.dumps(report.as_dict()) if options.json else report.text())


def _compare(generator: "TextGenerator", plain: "TextGenerator", batches: list[list[str]]) -> dict[str, Any]:
    """Time both ways in turn over all prompts; return the medians and whether all texts are identical.

    Drawn texts are not compared: the two ways spend their random numbers otherwise.
    """
    ours: list[float] = []
    theirs: list[float] = []
    identical = True
    for repeat in range(REPEATS + 1):  # the first compiles and is not counted
        own, other = ([g.generate(batch) for batch in batches] for g in (generator, plain))
        if repeat:
            ours.append(_rate(own))
            theirs.append(_rate(other))
            pairs = zip(own, other, strict=True)
            identical &= all(a.completions == b.completions for a, b in pairs)
    return {
        "tokens_per_second": statistics.median(ours),
        "plain_tokens_per_second": statistics.median(theirs),
        "speedup": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "identical": None if generator.config.temperature > 0 else identical,
    }


def _rate(answers: "list[Answer]") -> float:
    return sum(a.generation.new_tokens for a in answers) / sum(a.generation.seconds for a in answers)


def run() -> None:
    """The installed command ``layerskip-decode``."""
    run_command(main)
