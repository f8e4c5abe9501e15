"""``layerskip decode RUN --prompt TEXT [--setting value ...]`` generates text."""

import argparse
import dataclasses
import json
from typing import Any

from layerskip_jax.command_line import (
    OneLineParser,
    add_json,
    add_prompt_options,
    add_settings,
    add_tensor_parallel,
    given_settings,
    make_parser,
    positive,
)
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import DecodeConfig
from layerskip_jax.errors import UserError


def _parser() -> OneLineParser:
    parser = make_parser(
        "Generate text from a run of layerskip train or a Hugging Face Llama. The default settings are those of "
        "the run's config, with those that layerskip sweep stored on top.",
        "decode",
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="run folder, one checkpoint in it, or a Hugging Face folder"
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="the same as the argument RUN")
    add_prompt_options(parser)
    parser.add_argument("--batch_size", metavar="N", type=positive, default=1, help="prompts per batch (default: 1)")
    add_tensor_parallel(parser)
    parser.add_argument("--compare", action="store_true", help="also time plain decoding, and compare the texts")
    parser.add_argument("--quiet", action="store_true", help="print the numbers only, not the texts")
    add_json(parser, "one per prompt, then one of numbers")
    add_settings(parser, DecodeConfig())
    return parser


def _given_run(options: argparse.Namespace) -> str:
    runs = [run for run in (options.run, options.checkpoint) if run is not None]
    if len(runs) != 1:
        given = f", not {' and '.join(runs)}" if runs else ""
        raise UserError(f"give one run, as RUN or as --checkpoint RUN{given}")
    return runs[0]


def main(argv: list[str] | None = None) -> None:
    """Load a checkpoint, generate, and report; with ``--compare`` also against plain decoding."""
    options = _parser().parse_known_options(argv)
    run, given = _given_run(options), given_settings(options, DecodeConfig)

    from layerskip_jax.sharding import tensor_parallel  # after parsing, so that --help and errors are immediate

    with tensor_parallel(options.tensor_parallel):
        _decode(options, run, given)


def _decode(options: argparse.Namespace, run: str, given: dict[str, Any]) -> None:
    from layerskip_jax.checkpoint.reading import load_model, open_model_folder, warn_beyond_context
    from layerskip_jax.checkpoint.swept import decode_settings
    from layerskip_jax.commands import terminal
    from layerskip_jax.data.load_tokenizer import load_tokenizer
    from layerskip_jax.decoding.configure import check_exits
    from layerskip_jax.decoding.cost import measured_bandwidth
    from layerskip_jax.decoding.quantization import with_weights
    from layerskip_jax.decoding.summary import Summary, compare
    from layerskip_jax.decoding.text import TextGenerator, encode

    folder = open_model_folder(run)
    config = folder.config
    settings = decode_settings(folder, config, given)
    check_exits(settings, config.model.num_layers)
    prompts = read_prompts(options.prompt, options.prompts, options.held_out, config)
    terminal.warn_untrained_exit(config, settings)
    tokenizer = load_tokenizer(str(folder.tokenizer))
    longest = max(len(encode(tokenizer, settings, prompt)) for prompt in prompts)
    # The input is checked: now read the weights, which takes a while.
    model = with_weights(load_model(folder, unstacked=True)[0], settings.weights)
    generator = TextGenerator(model, tokenizer, settings, longest)
    warn_beyond_context(config, longest + settings.max_new_tokens, "the longest prompt and max_new_tokens are")
    batches = [prompts[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]

    streams = not (options.json or options.compare or options.quiet) and len(prompts) == 1
    answers = []
    for number, batch in enumerate(batches):
        if streams:
            answers.append(terminal.stream(generator, batch[0], settings))
        else:
            answers.append(generator.generate(batch, first=number * options.batch_size))
            if not options.quiet:
                for completion in answers[-1].completions:
                    text = terminal.format_completion(completion, settings.chat)
                    print(json.dumps(dataclasses.asdict(completion)) if options.json else text, flush=True)
    bandwidth = measured_bandwidth() * options.tensor_parallel
    summary = Summary.from_answers(answers, model.config, settings, bandwidth)
    if options.compare:
        plain = TextGenerator(model, tokenizer, dataclasses.replace(settings, mode="autoregressive"), longest)
        summary = dataclasses.replace(summary, **compare(generator, plain, batches))
    print(json.dumps(summary.as_dict()) if options.json else terminal.summary_text(summary))
