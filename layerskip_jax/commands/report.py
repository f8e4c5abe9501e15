"""``layerskip report RUN`` writes the plots of a run, and one HTML page that contains them all."""

import base64
import html
import json

import numpy as np
from etils import epath

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.checkpoint.swept import SWEPT
from layerskip_jax.command_line import add_prompt_options, add_run, make_parser, positive
from layerskip_jax.commands.plots import plot_run
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import Config
from layerskip_jax.config_dict import saved_settings
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation import token_exits
from layerskip_jax.evaluation.exits import ExitQuality, checkpoint_quality
from layerskip_jax.evaluation.pictures import save_picture
from layerskip_jax.locations import write_file
from layerskip_jax.model import Transformer

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; } code, pre, .tokens { font-family: ui-monospace, monospace; font-size: 12px; }
.tokens { border-collapse: collapse; } .tokens td { padding: 0 .4em; border: 1px solid #fff; white-space: pre; }
"""


def draw_quality(quality: ExitQuality, path: epath.Path) -> epath.Path:
    """Plot perplexity and agreement by exit."""
    exits = range(1, len(quality.loss_L) + 1)

    def draw(axes: np.ndarray) -> None:
        axes[0].semilogy(exits, quality.perplexity_L, marker="o")
        axes[0].set(title="held-out perplexity by exit", xlabel="exit layer", ylabel="perplexity")
        axes[1].plot(exits, quality.agreement_L, marker="o")
        axes[1].set(title="agreement with the last exit", xlabel="exit layer", ylabel="same next token", ylim=(0, 1.05))

    return save_picture(path, draw)


def write_report(run: str, prompts: list[str] | None, new_tokens: int, batches: int) -> epath.Path:
    """Write ``RUN/report.html`` and the plots in ``RUN/plots``; return the path of the page.

    ``prompts`` defaults to ``train.sample_prompt``, or else to one held-out document. Where the held-out text is
    missing, the page says so.
    """
    checkpoint = find_checkpoint(run)
    model, config, tokenizer_path = load_model(run, unstacked=True)
    folder = checkpoint.parent.parent
    plots = {path.stem: path for path in plot_run(str(folder))}
    swept = _swept(run, folder / "plots" / "sweep.png", checkpoint.parent / SWEPT)
    tokens = _token_tables(model, load_tokenizer(str(tokenizer_path)), config, prompts, new_tokens, folder)
    sections = [
        ("Loss of each exit over time", _image(plots["loss"])),
        ("Perplexity and agreement by layer", _quality(run, batches, folder / "plots" / "quality.png")),
        ("Acceptance and tokens/s over exit and draft length", swept),
        ("Drop rates and exit weights", _image(plots["schedules"])),
        ("Which layer first predicts each token", tokens),
        ("Settings", f"<pre>{html.escape(json.dumps(saved_settings(config), indent=1))}</pre>"),
    ]

    title = f"{html.escape(run)}, step {checkpoint.name}"
    body = "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections)
    page = folder / "report.html"
    write_file(
        page,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n",
    )
    return page


def _quality(run: str, batches: int, plot: epath.Path) -> str:
    try:
        return _image(draw_quality(checkpoint_quality(run, batches), plot))
    except UserError as error:
        return f"<p>Not measured: {html.escape(str(error))}</p>"


def _swept(run: str, plot: epath.Path, stored: epath.Path) -> str:
    if not plot.exists():
        return f"<p>Not swept yet: <code>layerskip sweep {html.escape(run)} --held_out 4</code></p>"
    return _image(plot) + (f"<pre>{html.escape(stored.read_text())}</pre>" if stored.exists() else "")


def _token_tables(
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    prompts: list[str] | None,
    new_tokens: int,
    folder: epath.Path,
) -> str:
    prompts = prompts or ([config.train.sample_prompt] if config.train.sample_prompt else [])
    try:
        prompts = prompts or read_prompts(None, None, 1, config)
    except UserError as error:
        return f"<p>Not shown: {html.escape(str(error))}; --prompt TEXT names a text</p>"
    tables = []
    for number, prompt in enumerate(prompts):
        figure = token_exits.token_exits(model, tokenizer, prompt, new_tokens)
        token_exits.draw(figure, folder / "plots" / f"tokens_{number}.png")
        tables.append(token_exits.as_html(figure))
    return "\n".join(tables)


def _image(path: epath.Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Write a report of a run: plots, and one HTML page that contains them. It shows which exit predicts each token "
        "after the prompts (default: train.sample_prompt, or one held-out document).",
        "report",
    )
    add_run(parser, "run folder of `layerskip train`")
    add_prompt_options(parser)
    parser.add_argument(
        "--max_new_tokens", "--new_tokens", metavar="N", type=positive, default=24, help="tokens shown (default: 24)"
    )
    parser.add_argument("--batches", metavar="N", type=positive, default=8, help="held-out batches (default: 8)")
    options = parser.parse_known_options(argv)
    sources, prompts = (options.prompt, options.prompts, options.held_out), None
    if any(source is not None for source in sources):
        prompts = read_prompts(*sources, read_config(find_checkpoint(options.run)))
    print(write_report(options.run, prompts, options.max_new_tokens, options.batches))
