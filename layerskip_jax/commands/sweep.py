"""``layerskip sweep RUN`` finds the fastest exit and draft length of a checkpoint.

It times every pair alternately on the same prompts, prints and plots the result, and stores the recommended settings
in the run's folder of checkpoints, where ``layerskip decode`` finds them.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from layerskip_jax.checkpoint.reading import load_model, open_model_folder, warn_beyond_context
from layerskip_jax.checkpoint.swept import store_swept
from layerskip_jax.command_line import (
    OneLineParser,
    add_json,
    add_prompt_options,
    add_run,
    add_settings,
    add_tensor_parallel,
    given_settings,
    make_parser,
    positive,
    whole,
)
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import DecodeConfig, ModelConfig
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.cost import Overhead, round_cost
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.summary import mean_round_cost
from layerskip_jax.decoding.text import encode
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.pictures import Picture, ink_on
from layerskip_jax.model import Transformer
from layerskip_jax.sharding import tensor_parallel

SETTINGS = ("weights", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
"""The settings that the user may fix."""

CHOSEN = ("mode", "policy", "exit_layer", "draft_length", "lookup_length", "choices")
"""The settings that the sweep varies and stores."""

CHOICES = 4
"""The choices at each position that the sweep tries."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Medians over the repeats of one `DecodeConfig` on all prompts, relative to plain decoding."""

    settings: dict[str, Any]
    tokens_per_second: float
    speedup: float
    acceptance: float
    tokens_per_round: float
    drafted_per_round: float
    round_cost: float  # measured [plain passes]
    identical: bool | None  # to the texts of plain decoding; None if texts are sampled
    predicted_speedup: float  # from the bytes of the weights

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON, which has no NaN: ``acceptance`` is left out if nothing was drafted."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value == value}


def measure(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    configs: Sequence[DecodeConfig],
    repeats: int,
    eos: Sequence[int] = (),
) -> list[Measurement]:
    """Time plain decoding and each of ``configs`` alternately, ``repeats`` times, after one run of each to compile.

    Tokens/s cover the rounds alone, one prompt at a time; ``speedup`` is the median of the ratios within a repeat.
    """
    configs = [dataclasses.replace(configs[0], mode="autoregressive"), *configs]
    strategies = [configure(config, model) for config in configs]
    runs: list[list[Generation]] = []  # by repeat and config, of all prompts together
    with tqdm(total=(repeats + 1) * len(configs), desc="sweep", leave=False) as bar:
        for _ in range(repeats + 1):
            run = []
            for config, (run_model, strategy) in zip(configs, strategies, strict=True):
                new = config.max_new_tokens
                each = [generate(run_model, [p], new, strategy, eos=eos, seed=config.seed) for p in prompts]
                run.append(Generation.total(each))
                bar.update()
            runs.append(run)
    return [
        _measurement(config, model.config, [run[index] for run in runs], [run[0] for run in runs])
        for index, config in enumerate(configs)
    ]


def _measurement(
    config: DecodeConfig, model: ModelConfig, runs: list[Generation], plain: list[Generation]
) -> Measurement:
    """Summarize the ``runs`` of a config, of which the first compiled."""
    speedup = statistics.median(
        one.tokens_per_second / other.tokens_per_second for one, other in zip(runs[1:], plain[1:], strict=True)
    )
    last = runs[-1]
    return Measurement(
        settings={name: getattr(config, name) for name in CHOSEN},
        tokens_per_second=statistics.median(run.tokens_per_second for run in runs[1:]),
        speedup=speedup,
        acceptance=last.acceptance,
        tokens_per_round=last.tokens_per_round,
        drafted_per_round=last.drafted_per_round,
        round_cost=last.tokens_per_round / speedup,
        identical=None if config.temperature else all(run.tokens == plain[0].tokens for run in runs),
        predicted_speedup=last.tokens_per_round / mean_round_cost(last, model, config),
    )


def measured_overhead(model: ModelConfig, measurements: Iterable[Measurement]) -> Overhead:
    """Return what the measured rounds cost beyond the bytes of their weights, by their number of drafts.

    This is the mean over the exits for each draft length, interpolated between the lengths. Noise can make a longer
    round look cheaper than a shorter one, so the costs never fall.
    """
    extra: dict[int, list[tuple[float, float]]] = {}
    for m in measurements:
        beyond = m.round_cost - round_cost(model, m.settings["exit_layer"], m.drafted_per_round)
        extra.setdefault(m.settings["draft_length"], []).append((m.drafted_per_round, beyond))
    # Sort by the mean number of drafts: rounds that an end of text cuts short have fewer than their draft length.
    drafted, cost = np.transpose(sorted(np.mean(pairs, axis=0).tolist() for pairs in extra.values()))
    rising = np.maximum.accumulate(np.maximum(cost, 0))
    costs = np.interp(range(1, max(extra) + 1), [0, *drafted], [0, *rising])
    return tuple(np.round(costs, 4).tolist())  # rounded for the terminal and the stored settings


def adaptive_config(base: DecodeConfig, exits: Sequence[int], max_drafts: int, overhead: Overhead) -> DecodeConfig:
    """Return ``base`` with the adaptive policy over ``exits``, with up to ``max_drafts`` drafts per round."""
    return dataclasses.replace(
        base, policy="adaptive", exits=tuple(exits), draft_length=max_drafts, round_costs=overhead
    )


def sweep(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    exits: Sequence[int],
    draft_lengths: Sequence[int],
    repeats: int,
    eos: Sequence[int] = (),
) -> tuple[list[Measurement], list[Measurement], Overhead]:
    """Measure plain decoding and every pair of exit and draft length, then plain decoding and six finalists.

    The finalists are the fastest pair alone, with lookups, and with `CHOICES`; the adaptive policy over the same exits,
    alone and with lookups; and prompt lookup. The adaptive policy drafts up to the largest length, and lookups have
    that length. Returns both lists of measurements and the measured overhead.
    """
    fixed = dataclasses.replace(settings, mode="self_speculative", policy="fixed", lookup_length=0, choices=1)
    pairs = [dataclasses.replace(fixed, exit_layer=e, draft_length=d) for e in exits for d in draft_lengths]
    grid = measure(model, prompts, pairs, repeats, eos)
    overhead = measured_overhead(model.config, grid[1:])
    best = max(grid[1:], key=lambda m: m.tokens_per_second)
    largest = max(draft_lengths)
    fastest = dataclasses.replace(fixed, **best.settings)
    from_best = dataclasses.replace(fixed, exit_layer=best.settings["exit_layer"])
    adaptive = adaptive_config(from_best, exits, largest, overhead)
    finalists = [
        fastest,
        adaptive,
        dataclasses.replace(adaptive, lookup_length=largest),
        dataclasses.replace(fixed, mode="prompt_lookup", draft_length=largest),
        dataclasses.replace(fastest, lookup_length=largest, round_costs=overhead),
        dataclasses.replace(fastest, choices=min(CHOICES, model.config.vocab_size)),
    ]
    return grid, measure(model, prompts, finalists, repeats, eos), overhead


def table(grid: list[Measurement], finals: list[Measurement]) -> str:
    """Return the measurements as text."""
    lines = [f"plain decoding {grid[0].tokens_per_second:.0f} tokens/s"]
    lines.append("  exit  drafts  tokens/s  speedup  cost model  acceptance  tokens/round")
    for m in grid[1:]:
        lines.append(
            f"  {m.settings['exit_layer']:>4}  {m.settings['draft_length']:>6}  {m.tokens_per_second:8.0f}"
            f"  {m.speedup:6.2f}x  {m.predicted_speedup:9.2f}x  {m.acceptance:10.1%}"
            f"  {m.tokens_per_round:12.2f}" + ("  texts DIFFER" if m.identical is False else "")
        )
    for m in finals[1:]:
        name = m.settings["policy"] if m.settings["mode"] == "self_speculative" else m.settings["mode"]
        name += " and lookup" * bool(m.settings["lookup_length"])
        name += f", {m.settings['choices']} choices" * (m.settings["choices"] > 1)
        lines.append(
            f"{name:>16}  {m.tokens_per_second:8.0f}  {m.speedup:6.2f}x  "
            + ("nothing drafted" if math.isnan(m.acceptance) else f"acceptance {m.acceptance:.1%}")
            + f", {m.tokens_per_round:.2f} tokens/round"
            + ("  texts DIFFER" if m.identical is False else "")
        )
    return "\n".join(lines)


def save_picture(grid: list[Measurement], exits: Sequence[int], draft_lengths: Sequence[int], file: epath.Path) -> None:
    """Save a picture of tokens/s and acceptance over exit and draft length."""

    def draw(axes: np.ndarray) -> None:
        plain = f"{grid[0].tokens_per_second:,.0f}"
        names = {"tokens_per_second": f"Tokens/s (plain decoding: {plain})", "acceptance": "Accepted drafts / drafts"}
        for axis, (name, title) in zip(axes, names.items(), strict=True):
            value_Xd = np.array([getattr(m, name) for m in grid[1:]]).reshape(len(exits), len(draft_lengths))
            image = axis.imshow(value_Xd, aspect="auto", origin="lower")
            for (row, column), value in np.ndenumerate(value_Xd):
                text = f"{value:.2f}" if name == "acceptance" else f"{value:,.0f}"
                axis.text(column, row, text, ha="center", va="center", color=ink_on(image.to_rgba(value)))
            axis.set(title=title, xlabel="draft length d", ylabel="draft exit E")
            axis.set_xticks(range(len(draft_lengths)), draft_lengths)
            axis.set_yticks(range(len(exits)), exits)
            axis.grid(visible=False)

    Picture(draw).save(file)


def _parser() -> OneLineParser:
    parser = make_parser(
        "Time exits and draft lengths of a checkpoint on prompts, and store the fastest lossless settings with its "
        "run. Default prompts: --held_out 8. The default settings are those of the run's config.",
        "sweep",
    )
    add_run(parser)
    add_prompt_options(parser)
    parser.add_argument(
        "--try_exits",
        metavar="E",
        type=positive,
        nargs="+",
        help="exits (default: L/8, L/4, 3L/8, L/2, and the trained exits of the run)",
    )
    parser.add_argument(
        "--try_lengths",
        metavar="D",
        type=whole(1, 63),
        nargs="+",
        default=[2, 4, 6, 8],
        help="draft lengths (default: 2 4 6 8)",
    )
    parser.add_argument("--repeats", metavar="N", type=positive, default=3, help="timed runs of each (default: 3)")
    add_tensor_parallel(parser)
    parser.add_argument("--no_store", action="store_true", help="do not store the recommendation and the plot")
    add_json(parser, "one per setting, then the recommendation")
    add_settings(parser, DecodeConfig(), names=SETTINGS)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_known_options(argv)
    with tensor_parallel(options.tensor_parallel):
        _sweep(options)


def _sweep(options: argparse.Namespace) -> None:
    given = given_settings(options, DecodeConfig)
    folder = open_model_folder(options.run)
    config = folder.config
    settings = apply_overrides(config.decode_settings, given)
    layers = config.model.num_layers
    default = [*(max(1, layers * eighths // 8) for eighths in (1, 2, 3, 4)), *config.early_exit.trained_exits]
    exits = sorted(set(options.try_exits or default))
    lengths = sorted(set(options.try_lengths))
    if exits[-1] > layers:
        raise UserError(f"--try_exits must be in 1..{layers}, not {exits[-1]}")
    sources = (options.prompt, options.prompts, options.held_out)
    held_out = 8 if all(source is None for source in sources) else options.held_out
    texts = read_prompts(options.prompt, options.prompts, held_out, config)
    tokenizer = load_tokenizer(str(folder.tokenizer))
    prompts = [encode(tokenizer, settings, text) for text in texts]  # with the chat template, if it is on
    longest = max(map(len, prompts))
    warn_beyond_context(config, longest + settings.max_new_tokens, "the longest prompt and max_new_tokens are")
    eos = () if settings.ignore_eos else tokenizer.end_tokens(config.model.vocab_size)
    # The input is checked: now read the weights, which takes a while.
    model = with_weights(load_model(folder, unstacked=True)[0], settings.weights)
    tokenizer.check_decodes(config.model.vocab_size)  # after the weights, which show whether the config is damaged
    grid, finals, overhead = sweep(model, prompts, settings, exits, lengths, options.repeats, eos)

    lossless = [m for m in finals if m.identical is not False]  # this includes plain decoding
    winner = max(lossless, key=lambda m: m.tokens_per_second)
    chosen = winner.settings | {"round_costs": overhead}
    if chosen["policy"] == "adaptive":
        chosen["exits"] = exits
    measured = {"tokens_per_second": winner.tokens_per_second, "speedup": winner.speedup, "prompts": len(prompts)}
    if options.json:
        for m in [*grid, *finals[1:]]:
            print(json.dumps(m.as_dict()))
        print(json.dumps({"recommended": chosen, "measured": measured}))
    else:
        print(table(grid, finals))
        listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
        print(f"recommended: {listed} ({winner.speedup:.2f}x plain decoding)")
    if not options.no_store:
        picture = folder.root / "plots" / "sweep.png"
        try:
            save_picture(grid, exits, lengths, picture)
            file = store_swept(folder, chosen, measured)
        except (OSError, UserError) as error:
            raise UserError(f"the result cannot be stored: {error}; --no_store stores nothing") from error
        if not options.json:
            print(f"plot: {picture}\nstored: {file}; layerskip decode uses it by default")
