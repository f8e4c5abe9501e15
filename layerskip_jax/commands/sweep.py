"""Which exit and draft length are fastest for a checkpoint: ``python -m layerskip_jax sweep RUN``.

Times every pair side by side on the same prompts, prints and draws the result, and stores the recommended setting with
the checkpoint, where ``decode.py`` finds it.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from layerskip_jax.checkpoint.reading import load_model, run_folder, store_swept
from layerskip_jax.command_line import add_settings, apply_overrides, given_settings, integer, make_parser
from layerskip_jax.commands.prompts import add_prompt_options, read_prompts
from layerskip_jax.config import DecodeConfig, ModelConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import configured
from layerskip_jax.decoding.cost import Overhead, predicted_speedup, round_cost
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.decoding.request import Generation
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.pictures import write_figure
from layerskip_jax.model import Transformer


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One way of decoding over all prompts: medians over the repeats, side by side with plain decoding."""

    settings: dict[str, Any]
    tokens_per_second: float
    speedup: float
    acceptance: float
    tokens_per_round: float
    drafted_per_round: float
    round_cost: float  # measured [plain tokens]
    identical: bool | None  # to plain decoding's texts; None where texts are drawn

    def as_dict(self) -> dict[str, Any]:
        """Return what was measured, for JSON, which has no NaN: acceptance only where something was drafted."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value == value}

    def predicted_speedup(self, model: ModelConfig) -> float:
        """By the bytes of the weights alone; for a fixed exit."""
        return predicted_speedup(model, self.settings["exit_layer"], self.drafted_per_round, self.tokens_per_round)


def measure(
    model: Transformer, prompts: Sequence[Sequence[int]], ways: Sequence[DecodeConfig], repeats: int, eos: int = -1
) -> list[Measurement]:
    """Time each of ``ways`` and plain decoding in turn, ``repeats`` times, after one run of each that compiles.

    Tokens/s are of the rounds alone, one prompt at a time; ``speedup`` is the median of ratios within a repeat.
    """
    configs = [dataclasses.replace(ways[0], mode="autoregressive"), *ways]
    steps = [configured(config, model) for config in configs]
    runs: list[list[list[Generation]]] = []
    with tqdm(total=(repeats + 1) * len(steps), desc="sweep", leave=False) as bar:
        for _ in range(repeats + 1):
            turn = []
            for config, (run_model, step) in zip(configs, steps, strict=True):
                new = config.max_new_tokens
                turn.append([generate(run_model, [p], new, step, eos=eos, seed=config.seed) for p in prompts])
                bar.update()
            runs.append(turn)
    rates = [[sum(g.new_tokens for g in way) / sum(g.seconds for g in way) for way in turn] for turn in runs[1:]]
    plain_tokens = [g.tokens for g in runs[0][0]]
    measurements = []
    for index, config in enumerate(configs):
        of_way = runs[-1][index]
        rounds, drafted = sum(g.rounds for g in of_way), sum(g.drafted for g in of_way)
        tokens = sum(g.new_tokens for g in of_way)
        speedup = statistics.median(turn[index] / turn[0] for turn in rates)
        same = all([g.tokens for g in turn[index]] == plain_tokens for turn in runs)
        measurements.append(
            Measurement(
                settings={name: getattr(config, name) for name in ("mode", "policy", "exit_layer", "draft_length")},
                tokens_per_second=statistics.median(turn[index] for turn in rates),
                speedup=speedup,
                acceptance=sum(g.accepted for g in of_way) / drafted if drafted else float("nan"),
                tokens_per_round=tokens / rounds,
                drafted_per_round=drafted / rounds,
                round_cost=tokens / rounds / speedup,
                identical=None if config.temperature else same,
            )
        )
    return measurements


def fitted_overhead(model: ModelConfig, measurements: Iterable[Measurement]) -> Overhead:
    """Return c and w of `cost.round_cost` that fit the measured rounds best (least squares), neither negative."""
    rows = [(m.drafted_per_round, m.settings["exit_layer"], m.round_cost) for m in measurements]
    beyond = np.array([cost - round_cost(model, exit_layer, drafted) for drafted, exit_layer, cost in rows])
    columns = np.array([(1.0, drafted) for drafted, _, _ in rows])
    for used in ([0, 1], [1], [0]):  # what would be negative is left out
        fitted = np.zeros(2)
        fitted[used] = np.linalg.lstsq(columns[:, used], beyond)[0]
        if np.all(fitted >= 0):
            return Overhead(*fitted.tolist())
    return Overhead()


def adaptive_way(base: DecodeConfig, exits: Sequence[int], longest: int, overhead: Overhead) -> DecodeConfig:
    """Return ``base`` with the adaptive policy over ``exits``, up to ``longest`` drafts."""
    return dataclasses.replace(base, policy="adaptive", exits=tuple(exits), draft_length=longest, **overhead._asdict())


def sweep(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    exits: Sequence[int],
    draft_lengths: Sequence[int],
    repeats: int,
    eos: int = -1,
) -> tuple[list[Measurement], list[Measurement], Overhead]:
    """Return plain decoding and every pair of exit and length; the finalists against plain; the fitted overhead.

    The finalists are the fastest pair, the adaptive policy over the same exits up to the greatest length, and prompt
    lookup.
    """
    fixed = dataclasses.replace(settings, mode="self_speculative", policy="fixed")
    pairs = [dataclasses.replace(fixed, exit_layer=e, draft_length=d) for e in exits for d in draft_lengths]
    grid = measure(model, prompts, pairs, repeats, eos)
    overhead = fitted_overhead(model.config, grid[1:])
    best = max(grid[1:], key=lambda m: m.tokens_per_second)
    longest = max(draft_lengths)
    finalists = [
        dataclasses.replace(fixed, **best.settings),
        adaptive_way(dataclasses.replace(fixed, exit_layer=best.settings["exit_layer"]), exits, longest, overhead),
        dataclasses.replace(fixed, mode="prompt_lookup", draft_length=longest),
    ]
    return grid, measure(model, prompts, finalists, repeats, eos), overhead


def table(model: ModelConfig, grid: list[Measurement], finals: list[Measurement]) -> str:
    """Lay the measurements out as text."""
    lines = [f"plain decoding {grid[0].tokens_per_second:.0f} tokens/s"]
    lines.append("  exit  drafts  tokens/s  speedup  predicted  measured/predicted  acceptance  tokens/round")
    for m in grid[1:]:
        predicted = m.predicted_speedup(model)
        lines.append(
            f"  {m.settings['exit_layer']:>4}  {m.settings['draft_length']:>6}  {m.tokens_per_second:8.0f}"
            f"  {m.speedup:6.2f}x  {predicted:8.2f}x  {m.speedup / predicted:18.2f}  {m.acceptance:10.1%}"
            f"  {m.tokens_per_round:12.2f}" + ("  texts DIFFER" if m.identical is False else "")
        )
    for m in finals[1:]:
        way = m.settings["policy"] if m.settings["mode"] == "self_speculative" else m.settings["mode"]
        lines.append(
            f"{way:>14}  {m.tokens_per_second:8.0f}  {m.speedup:6.2f}x  "
            + ("nothing drafted" if math.isnan(m.acceptance) else f"acceptance {m.acceptance:.1%}")
            + f", {m.tokens_per_round:.2f} tokens/round"
            + ("  texts DIFFER" if m.identical is False else "")
        )
    return "\n".join(lines)


def plot(grid: list[Measurement], exits: Sequence[int], draft_lengths: Sequence[int], file: epath.Path) -> None:
    """Draw tokens/s and acceptance over exit and draft length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = {"tokens_per_second": "tokens/s", "acceptance": "acceptance (accepted / drafted)"}
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        value_Ed = np.array([getattr(m, name) for m in grid[1:]]).reshape(len(exits), len(draft_lengths))
        if min(value_Ed.shape) > 1:
            filled = axis.contourf(draft_lengths, exits, value_Ed, levels=12, cmap="viridis")
            figure.colorbar(filled, ax=axis)
        for row, exit_layer in enumerate(exits):
            for column, length in enumerate(draft_lengths):
                text = f"{value_Ed[row, column]:.2f}" if name == "acceptance" else f"{value_Ed[row, column]:.0f}"
                axis.annotate(
                    text,
                    (length, exit_layer),
                    ha="center",
                    color="white",
                    fontsize="small",
                    bbox={"facecolor": "black", "alpha": 0.4, "edgecolor": "none", "pad": 1},
                )
        axis.set(title=title, xlabel="draft length d", ylabel="exit layer E", xticks=draft_lengths, yticks=exits)
        axis.margins(0.08)
    figure.suptitle(f"plain decoding: {grid[0].tokens_per_second:.0f} tokens/s")
    write_figure(figure, file)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Time exits and draft lengths of a checkpoint on prompts, and store the fastest lossless way with it."
    )
    parser.add_argument("run", metavar="RUN", help="run folder, one checkpoint in it, or a Hugging Face folder")
    add_prompt_options(parser)
    parser.add_argument(
        "--try_exits", metavar="E", type=integer, nargs="+", help="exits (default: L/8, L/4, 3L/8, L/2)"
    )
    parser.add_argument(
        "--try_lengths", metavar="D", type=integer, nargs="+", default=[2, 4, 6, 8], help="draft lengths"
    )
    parser.add_argument("--repeats", metavar="N", type=integer, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON lines: one a way, then the recommendation")
    parser.add_argument("--no_store", action="store_true", help="do not store the recommendation and the plot")
    add_settings(parser, DecodeConfig())
    options = parser.parse_known_options(argv)
    given = given_settings(options, DecodeConfig)

    model, config, tokenizer_path = load_model(options.run, unstacked=True)
    settings = apply_overrides(config.decode, given)
    layers = config.model.num_layers
    exits = sorted(set(options.try_exits or [max(1, layers * eighths // 8) for eighths in (1, 2, 3, 4)]))
    lengths = sorted(set(options.try_lengths))
    if exits[0] < 1 or exits[-1] > layers or lengths[0] < 1 or options.repeats < 1:
        raise UserError(f"--try_exits must be in 1..{layers}, --try_lengths and --repeats at least 1")
    tokenizer = load_tokenizer(str(tokenizer_path))
    held_out = options.held_out if options.prompt or options.prompts or options.held_out else 8
    texts = read_prompts(options.prompt, options.prompts, held_out, config)
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    eos = -1 if settings.ignore_eos else tokenizer.eos_id
    model = with_weights(model, settings.weights)
    grid, finals, overhead = sweep(model, prompts, settings, exits, lengths, options.repeats, eos)

    lossless = [m for m in finals if m.identical is not False]  # plain decoding is one
    winner = max(lossless, key=lambda m: m.tokens_per_second)
    chosen = winner.settings | overhead._asdict()
    if chosen["policy"] == "adaptive":
        chosen["exits"] = exits
    measured = {"tokens_per_second": winner.tokens_per_second, "speedup": winner.speedup, "prompts": len(prompts)}
    if options.json:
        for m in [*grid, *finals[1:]]:
            print(json.dumps(m.as_dict()))
        print(json.dumps({"recommended": chosen, "measured": measured}))
    else:
        print(table(config.model, grid, finals))
        said = ", ".join(f"{name} {value}" for name, value in chosen.items())
        print(f"recommended: {said} ({winner.speedup:.2f}x plain decoding)")
    if options.no_store:
        return
    picture = run_folder(options.run) / "plots" / "sweep.png"
    try:
        plot(grid, exits, lengths, picture)
        file = store_swept(options.run, chosen, measured)
    except OSError as error:
        raise UserError(f"what was measured cannot be stored: {error}; --no_store stores nothing") from error
    if not options.json:
        print(f"plot: {picture}\nstored: {file}; decode.py uses it by default")
