"""``layerskip report RUN`` writes the plots of a run, and one HTML page that contains them all."""

import dataclasses
import html
import json
import math
import shlex

import numpy as np
from etils import epath

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.checkpoint.swept import SWEPT
from layerskip_jax.command_line import add_prompt_options, add_run, make_parser, positive
from layerskip_jax.commands import page
from layerskip_jax.commands.plots import (
    Run,
    add_plain,
    exits_picture,
    loss_picture,
    open_runs,
    schedules_picture,
)
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import Config
from layerskip_jax.config_dict import changed_settings, saved_settings
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.configure import resolve_exits
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.decoding.summary import Summary, compare
from layerskip_jax.decoding.text import Piece, TextGenerator, encode
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation import token_exits
from layerskip_jax.evaluation.exits import ExitQuality
from layerskip_jax.evaluation.pictures import Picture, image_html, smooth
from layerskip_jax.locations import write_file
from layerskip_jax.mixture import mixture_shares
from layerskip_jax.model import Transformer, parameter_count

TIMED_PROMPTS = 4
"""Number of held-out documents to continue when measuring acceptance and decoding speed."""


def train_command(config: Config) -> list[str]:
    """Return the parts of a command that trains this config: ``layerskip train``, then one part for each setting that
    differs from its default."""
    words = ["layerskip train"]
    for name, (_, value) in changed_settings(config).items():
        values = value if isinstance(value, tuple) else (str(value).lower() if isinstance(value, bool) else value,)
        words.append(" ".join([f"--{name}", *(shlex.quote(str(one)) for one in values)]))
    return words


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Speed of greedy decoding on held-out prompts, and the share of accepted drafts of each exit."""

    summary: Summary
    acceptance_L: np.ndarray


def decode_prompts(run: Run, model: Transformer, tokenizer: Tokenizer, prompts: list[str]) -> Decoded:
    settings = dataclasses.replace(run.decode, mode="self_speculative", temperature=0.0)
    ids = [encode(tokenizer, settings, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    plain = TextGenerator(model, tokenizer, dataclasses.replace(settings, mode="autoregressive"), longest)
    drafting, batches = TextGenerator(model, tokenizer, settings, longest), [[prompt] for prompt in prompts]
    answers = [drafting.generate(batch) for batch in batches]
    total = Summary.from_answers(answers, model.config, settings)
    total = dataclasses.replace(total, **compare(drafting, plain, batches))
    new = [answer.completions[0].tokens for answer in answers]
    continuations = token_exits.predict_continuations(model, ids, new)
    return Decoded(total, token_exits.acceptance_by_exit(continuations, settings.draft_length))


def write_report(
    run_dir: str, prompts: list[str] | None, new_tokens: int, batches: int | None = None, plain_dir: str | None = None
) -> epath.Path:
    """Write ``RUN/report.html`` and the plots in ``RUN/plots``; return the path of the page.

    ``prompts`` defaults to ``train.sample_prompt``, or else to one held-out document. ``plain_dir`` is as for
    `find_plain`. Where the held-out text is missing, the page says so.
    """
    run, plain = open_runs(run_dir, plain_dir)
    batches = batches or run.config.train.evaluate_batches  # as in training, so that the numbers agree
    plain_quality, plain_problem = plain.measured_quality(batches) if plain else (None, "")
    model, config, tokenizer_path = load_model(run.source)
    quality, problem = run.measured_quality(batches, (model, config, tokenizer_path))
    problems = [text for text in (problem, plain_problem and f"the plain model: {plain_problem}") if text]
    missing = "".join(f"<p>Not measured: {html.escape(text)}</p>" for text in problems)
    model, tokenizer = with_weights(model.unstacked(), run.decode.weights), load_tokenizer(str(tokenizer_path))
    shown, timed, no_prompt = _prompts(run.config, prompts)
    decoded = decode_prompts(run, model, tokenizer, timed) if timed else None

    acceptance_L = decoded.acceptance_L if decoded else None
    pictures = {
        "loss": loss_picture(run, plain),
        "exits": exits_picture(run, quality, plain_quality, acceptance_L),
        "speed": speed_picture(run, decoded),
        "schedules": schedules_picture(run),
    }
    for name, picture in pictures.items():
        picture.save(run.folder / "plots" / f"{name}.png")
    figures = [token_exits.token_exits(model, tokenizer, prompt, new_tokens, run.decode) for prompt in shown]

    sections = {
        "": page.tiles(summary(run, quality, plain_quality, decoded)) + page.command(train_command(run.config)),
        "Loss of a few exits": pictures["loss"].html() + _components(run),
        "Loss, agreement and acceptance by exit": missing + pictures["exits"].html() + _explained(run, decoded),
        "Speed": _speed(run, decoded) + pictures["speed"].html() + _swept(run, run_dir),
        "Schedules": pictures["schedules"].html(),
        "A sample": _sample(run, model, tokenizer, shown[0]) if shown else no_prompt,
        "Which layer first predicts each token": _tokens(run, figures) if shown else no_prompt,
        "Settings": page.details_html("All settings of the run", json.dumps(saved_settings(run.config), indent=1)),
    }
    file = run.folder / "report.html"
    title = f"{run.folder.name}: step {run.checkpoint.name}"
    write_file(file, page.page(title, opening_sentence(run), sections))
    return file


def opening_sentence(run: Run) -> str:
    """Say in one sentence what was trained, on what, and what for."""
    config, dropout = run.config, run.config.layer_dropout.p_max
    inner = [exit_layer for exit_layer in run.exits_with_loss if exit_layer < run.layers]
    parts = [f"layer dropout up to {dropout:.0%}"] * (dropout > 0)
    parts += [f"a loss at exit{'s' * (len(inner) > 1)} {_ranges(inner)}"] * bool(inner)
    kind = f"with LayerSkip ({' and '.join(parts)})" if parts else "without layer dropout and early-exit losses"
    mixed = ", ".join(f"{share:.1%} {name}" for name, share in mixture_shares(config.data.mixture).items() if name)
    corpus = mixed or config.data.name or config.data.path or config.data.source
    first = "layer drafts" if run.draft_exit == 1 else f"{run.draft_exit} layers draft"
    use = f"; its first {first} the text that all {run.layers} verify" if inner else ""
    return (
        f"A language model of {_short(parameter_count(config.model))} parameters in {run.layers} layers, trained "
        f"{kind} on {_short(_tokens_seen(run))} tokens of {corpus}{use}."
    )


def summary(
    run: Run, quality: ExitQuality, plain: ExitQuality | None, decoded: Decoded | None
) -> dict[str, tuple[str, str]]:
    """Return the numbers at the head of the page, as `page.tiles` takes them."""
    config, at = run.config, run.draft_exit - 1
    rates, goodput = run.series("train/tokens_per_second")[1], run.series("run/goodput")[1]
    compared = f"; plain model {plain.loss_L[-1]:.3f}" if plain else ""
    values = {
        "Parameters": (_short(parameter_count(config.model)), f"{run.layers} layers of width {config.model.dim}"),
        "Tokens": (_short(_tokens_seen(run)), f"{run.checkpoint.name} steps of {config.train.batch_size} sequences"),
        "Held-out loss": (f"{quality.loss_L[-1]:.3f}", f"exit {run.draft_exit}: {quality.loss_L[at]:.3f}{compared}"),
    }
    if decoded and not math.isnan(decoded.summary.acceptance):
        values["Acceptance"] = (f"{decoded.summary.acceptance:.0%}", f"of the {_draft_source(run)}")
    if decoded:
        speedup = f"{decoded.summary.speedup:.2f}x plain decoding on this machine"
        values["Decoding"] = (f"{decoded.summary.tokens_per_second:,.0f} tokens/s", speedup)
    if len(rates):
        kept = f"{goodput[-1]:.0%} of the time in training steps" if len(goodput) else ""
        values["Training"] = (f"{np.median(rates):,.0f} tokens/s", kept)
    return values


def speed_picture(run: Run, decoded: Decoded | None) -> Picture:
    """Return a picture of the tokens/s of training over steps, and of decoding with and without drafts."""
    steps, rates = run.series("train/tokens_per_second")

    def draw(axes: np.ndarray) -> None:
        if len(rates):
            axes[0].plot(steps, rates, color="C0", alpha=0.3, linewidth=0.8)
            axes[0].plot(steps, smooth(rates), color="C0", linewidth=2)
        axes[0].set(title="Training", xlabel="optimizer step", ylabel="tokens/s", ylim=(0, None))
        if decoded:
            names = ["plain", _draft_source(run)]
            values = [decoded.summary.plain_tokens_per_second, decoded.summary.tokens_per_second]
            bars = axes[1].barh(names, values, color=["C9", "C0"], height=0.55)
            axes[1].bar_label(bars, fmt="{:,.0f}", padding=4)
            axes[1].set(title="Decoding", xlabel="tokens/s")
            axes[1].margins(x=0.15)
            axes[1].grid(visible=False, axis="y")
            axes[1].invert_yaxis()

    alt = f"Tokens per second of training over optimizer steps{', and of decoding' * bool(decoded)}."
    return Picture(draw, alt, 1 + bool(decoded), (11, 3))


def _draft_source(run: Run) -> str:
    """Say where the drafts of self-speculative decoding come from."""
    exits = resolve_exits(run.decode, run.layers) if run.decode.policy == "adaptive" else (run.draft_exit,)
    lookups = " and lookups" * bool(run.decode.lookup_length)
    return f"drafts from exit{'s' * (len(exits) > 1)} {' '.join(map(str, exits))}{lookups}"


def _tokens_seen(run: Run) -> float:
    counts = run.series("train/tokens")[1]
    a_step = counts.mean() if len(counts) else run.config.train.batch_size * run.config.data.sequence_length
    return float(a_step) * int(run.checkpoint.name)


def _short(count: float) -> str:
    """Return a count in three digits.

    >>> _short(4_210_000), _short(999), _short(1.5e9)
    ('4.21M', '999', '1.5B')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def _ranges(numbers: list[int]) -> str:
    """Return increasing numbers as text, with consecutive ones as a range.

    >>> _ranges([1, 2, 4, 5, 6, 9])
    '1-2, 4-6, 9'
    """
    firsts = [number for number in numbers if number - 1 not in numbers]
    lasts = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def _prompts(config: Config, given: list[str] | None) -> tuple[list[str], list[str], str]:
    """Return the prompts to show, those to time, and HTML that says why there are none."""
    if given:
        return given, given, ""
    sample, problem = [config.train.sample_prompt] if config.train.sample_prompt else [], ""
    for count in (TIMED_PROMPTS, 1):
        try:
            held_out = read_prompts(None, None, count, config)
        except UserError as error:
            problem = f"<p>Not shown: {html.escape(str(error))}; give a prompt with --prompt TEXT</p>"
        else:
            return sample or held_out[:1], held_out, ""
    return sample, sample, problem


def _components(run: Run) -> str:
    """Return a table of the last held-out losses of each corpus in ``data.mixture``, or "" without a mixture."""
    shares = mixture_shares(run.config.data.mixture)
    if "" in shares:
        return ""
    exits = sorted({run.draft_exit, run.layers})
    rows = []
    for name, share in shares.items():
        losses = [run.series(f"validation/component_exit_loss/{name}/{exit_layer}")[1] for exit_layer in exits]
        rows.append([name, f"{share:.1%}", *(f"{loss[-1]:.3f}" if len(loss) else "not measured" for loss in losses)])
    return page.table(["corpus", "share of rows", *(f"held-out loss, exit {number}" for number in exits)], rows)


def _explained(run: Run, decoded: Decoded | None) -> str:
    accepted = (
        f" The dotted line is the acceptance, with {run.decode.draft_length} drafts a round: the share of drafts that "
        "the full model accepts in its greedy texts."
    )
    return (
        f'<p class="note">The exit E runs the first E blocks and the shared head. Exit {run.draft_exit} is '
        f"marked. Decoding takes {_draft_source(run)}.{accepted if decoded else ''}</p>"
    )


def _speed(run: Run, decoded: Decoded | None) -> str:
    if not decoded:
        return ""
    total = decoded.summary
    acceptance = "" if math.isnan(total.acceptance) else f"{total.acceptance:.1%}"
    rows = [
        ["plain decoding", f"{total.plain_tokens_per_second:,.0f}", "1.00x", "", "1.00"],
        [_draft_source(run), f"{total.tokens_per_second:,.0f}", f"{total.speedup:.2f}x", acceptance,
         f"{total.tokens_per_round:.2f}"],
    ]  # fmt: skip
    same = "both gave the same texts" if total.identical else "the texts differ, because rounding changed a token"
    return (
        page.table(["decoding", "tokens/s", "speedup", "acceptance", "tokens a round"], rows)
        + f'<p class="note">Greedy decoding of {total.prompts} prompts, one at a time, on this machine; '
        f"{same}. Where reading the weights takes all the time, as in large models, the speedup would be "
        f"{total.predicted_speedup:.2f}x.</p>"
    )


def _swept(run: Run, run_dir: str) -> str:
    plot, stored = run.folder / "plots" / "sweep.png", run.checkpoint.parent / SWEPT
    if not stored.exists():
        return f"<p>Not swept yet: <code>layerskip sweep {html.escape(run_dir)}</code> finds the fastest exit.</p>"
    alt = "Tokens per second and acceptance over exit and draft length"
    picture = image_html(plot.read_bytes(), alt) if plot.exists() else ""
    return picture + page.details_html("Result of layerskip sweep", stored.read_text())


def _sample(run: Run, model: Transformer, tokenizer: Tokenizer, prompt: str) -> str:
    settings = dataclasses.replace(run.decode, mode="self_speculative")
    if run.decode.temperature == 0:  # greedy texts of small models repeat themselves
        settings = dataclasses.replace(settings, temperature=0.8, top_p=0.95)
    pieces: list[Piece] = []
    TextGenerator(model, tokenizer, settings).generate([prompt], pieces.append)
    spell = lambda text: html.escape(token_exits.visible(text, keep=" \n\t"))  # noqa: E731
    spans = [f'<span class="drafted">{spell(p.text)}</span>' if p.drafted else spell(p.text) for p in pieces]
    return (
        f"<p>Text after the gray prompt, sampled at temperature {settings.temperature:g} and top-p {settings.top_p:g}. "
        f"Underlined: accepted {_draft_source(run)}. The rest is the full model's own.</p>"
        f'<pre class="sample" dir="auto"><span class="prompt">{spell(prompt)}</span>{"".join(spans)}</pre>'
    )


def _tokens(run: Run, figures: list[token_exits.TokenExits]) -> str:
    untrained = [exit_layer for exit_layer in range(1, run.layers + 1) if exit_layer not in run.exits_with_loss]
    note = (
        f"<p>Exit{'s' * (len(untrained) > 1)} {_ranges(untrained)} (&dagger;) had no loss in training: the head never "
        "learned to read these layers, so do not expect good predictions there.</p>"
    )
    tables = "\n".join(token_exits.as_html(figure, untrained) for figure in figures)
    return token_exits.legend(run.layers) + (note if untrained else "") + tables


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Write a report of a run: plots, and one HTML page that contains them. It shows which exit predicts each token "
        "after the prompts (default: train.sample_prompt, or one held-out document).",
        "report",
    )
    add_run(parser, "run folder of `layerskip train`")
    add_plain(parser)
    add_prompt_options(parser)
    parser.add_argument(
        "--new_tokens", metavar="N", type=positive, default=24, help="tokens in the table of exits (default: 24)"
    )
    parser.add_argument("--batches", metavar="N", type=positive, help="held-out batches (default: those of the run)")
    options = parser.parse_known_options(argv)
    sources, prompts = (options.prompt, options.prompts, options.held_out), None
    if any(source is not None for source in sources):
        prompts = read_prompts(*sources, read_config(find_checkpoint(options.run)))
    print(write_report(options.run, prompts, options.new_tokens, options.batches, options.plain))
