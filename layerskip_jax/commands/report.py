"""A run on one page: ``python -m layerskip_jax report RUN`` writes pictures, and one HTML file that holds them all."""

import base64
import html
import json

import numpy as np
from etils import epath

from layerskip_jax.checkpoint.reading import SWEPT, find_checkpoint, load_model
from layerskip_jax.command_line import integer, make_parser
from layerskip_jax.commands.plots import plot_run
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import experiment
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation import token_exits
from layerskip_jax.evaluation.exits import ExitQuality, quality_of_checkpoint
from layerskip_jax.evaluation.pictures import save_picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; } code, pre, .tokens { font-family: ui-monospace, monospace; font-size: 12px; }
.tokens { border-collapse: collapse; } .tokens td { padding: 0 .4em; border: 1px solid #fff; white-space: pre; }
"""


def draw_quality(quality: ExitQuality, path: epath.Path) -> epath.Path:
    """Draw perplexity and agreement by layer."""
    exits = range(1, len(quality.loss_L) + 1)

    def draw(axes: np.ndarray) -> None:
        axes[0].semilogy(exits, quality.perplexity_L, marker="o")
        axes[0].set(title="held-out perplexity by exit", xlabel="exit layer", ylabel="perplexity")
        axes[1].plot(exits, quality.agreement_L, marker="o")
        axes[1].set(title="agreement with the last exit", xlabel="exit layer", ylabel="same next token", ylim=(0, 1.05))

    return save_picture(path, draw)


def write_report(run: str, prompts: list[str] | None, new_tokens: int, batches: int) -> epath.Path:
    """Write ``RUN/report.html`` and the pictures in ``RUN/plots``; return the page's path.

    What cannot be measured (the held-out text is not here any more) is said on the page in its place.
    """
    checkpoint = find_checkpoint(run)
    model, config, tokenizer_path = load_model(run)
    tokenizer = load_tokenizer(str(tokenizer_path))
    folder = checkpoint.parent.parent
    plots = {path.stem: path for path in plot_run(str(folder))}
    sections = [("Loss of each exit over time", _image(plots["loss"]))]

    try:
        quality = draw_quality(quality_of_checkpoint(run, batches), folder / "plots" / "quality.png")
        sections.append(("Perplexity and agreement by layer", _image(quality)))
    except UserError as error:
        sections.append(("Perplexity and agreement by layer", f"<p>Not measured: {html.escape(str(error))}</p>"))

    swept = folder / "plots" / "sweep.png"
    stored = checkpoint.parent / SWEPT
    if swept.exists():
        best = f"<pre>{html.escape(stored.read_text())}</pre>" if stored.exists() else ""
        sections.append(("Acceptance and tokens/s over exit and draft length", _image(swept) + best))
    else:
        command = f"<code>python -m layerskip_jax sweep {html.escape(run)} --held_out 4</code>"
        sections.append(("Acceptance and tokens/s over exit and draft length", f"<p>Not swept yet: {command}</p>"))
    sections.append(("Drop rates and exit weights", _image(plots["schedules"])))

    texts = prompts or ([config.train.sample_prompt] if config.train.sample_prompt else [])
    unstacked, tables = model.unstacked(), []
    try:
        texts = texts or read_prompts(None, None, 1, config)
    except UserError as error:
        tables.append(f"<p>Not shown: {html.escape(str(error))}; --prompt TEXT names a text</p>")
    for number, prompt in enumerate(texts):
        figure = token_exits.token_exits(unstacked, tokenizer, prompt, new_tokens)
        token_exits.draw(figure, folder / "plots" / f"tokens_{number}.png")
        tables.append(token_exits.as_html(figure))
    sections.append(("Which layer first predicts each token", "\n".join(tables)))
    sections.append(("Settings", f"<pre>{html.escape(json.dumps(experiment(config), indent=1))}</pre>"))

    title = f"{html.escape(run)}, step {checkpoint.name}"
    body = "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections)
    page = folder / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _image(path: epath.Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Write a report of a run: pictures, and one HTML page that needs no other file.")
    parser.add_argument("run", metavar="RUN", help="run folder that train.py wrote")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="text whose continuation is shown exit by exit (default: train.sample_prompt, or held-out text)",
    )
    parser.add_argument("--new_tokens", metavar="N", type=integer, default=24, help="tokens shown (default: 24)")
    parser.add_argument("--batches", metavar="N", type=integer, default=8, help="held-out batches (default: 8)")
    options = parser.parse_known_options(argv)
    for name in ("new_tokens", "batches"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    print(write_report(options.run, options.prompt, options.new_tokens, options.batches))
