"""The layer that first predicts each generated token (LayerSkip figure 2, its motivation)."""

import dataclasses
import html

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.request import round_up
from layerskip_jax.decoding.rounds import Autoregressive
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.evaluation.exits import exit_predictions
from layerskip_jax.evaluation.pictures import save_picture
from layerskip_jax.model import Transformer

LEGEND = "Colour: the earliest exit from which all exits predict the token. Grey: earlier exits."


@dataclasses.dataclass(frozen=True)
class TokenExits:
    """The prediction of each exit for every generated token, and the exit (1..L) from which it stays correct."""

    prompt: str
    predicted: list[list[str]]  # by generated token, then by exit
    settled: list[int]


def settling_exits(next_LT: np.ndarray) -> np.ndarray:
    """Return ``settled_T``: the first exit, counted from 1, from which all exits predict the token of the last one.

    >>> settling_exits(np.array([[7, 1, 3], [2, 2, 3], [7, 2, 3]])).tolist()
    [3, 2, 1]
    """
    agrees_LT = next_LT == next_LT[-1]
    stays_LT = np.flip(np.logical_and.accumulate(np.flip(agrees_LT, 0), axis=0), 0)
    return np.argmax(stays_LT, axis=0) + 1


def token_exits(model: Transformer, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> TokenExits:
    """Continue ``prompt`` greedily with an unstacked model, and predict every new token from every exit."""
    ids = tokenizer.encode_prompt(prompt)
    result = generate(
        model, [ids], new_tokens, Autoregressive(Greedy()), eos=tokenizer.end_tokens(model.config.vocab_size)
    )
    text = [*ids, *result.tokens[0]]
    width = round_up(len(text))
    tokens_1T = jnp.zeros((1, width), jnp.int32).at[0, : len(text)].set(jnp.array(text))
    next_LT = jax.device_get(exit_predictions(model, tokens_1T, jnp.ones_like(tokens_1T)))[:, 0]
    next_LT = next_LT[:, len(ids) - 1 : len(text) - 1]
    predicted = [[tokenizer.decode([token]) for token in next_L] for next_L in next_LT.T.tolist()]
    return TokenExits(prompt, predicted, settling_exits(next_LT).tolist())


def draw(figure: TokenExits, path: epath.Path) -> epath.Path:
    """Write the plot as PNG, with a row per token and a column per exit."""
    layers = len(figure.predicted[0])

    def paint(axes: np.ndarray) -> None:
        axis = axes[0]
        shown_TL = np.array([[s if e >= s else np.nan for e in range(1, layers + 1)] for s in figure.settled])
        image = axis.imshow(shown_TL, vmin=1, vmax=layers, cmap="viridis", aspect="auto", alpha=0.6)
        axis.figure.colorbar(image, ax=axis, label="earliest exit that stays correct")
        axis.set_facecolor("0.92")
        for row, tokens in enumerate(figure.predicted):
            for column, token in enumerate(tokens):
                # Escaped, because the font lacks many characters.
                text = ascii(token)[1:-1].replace("$", r"\$")[:12]
                axis.text(column, row, text, ha="center", va="center", fontsize=7, family="monospace")
        axis.set(xlabel="exit layer", ylabel="generated token", title="prediction of each exit", yticks=[])
        axis.set_xticks(range(layers), range(1, layers + 1))

    return save_picture(path, paint, panels=1, size=(2 + 0.9 * layers, 1.6 + 0.26 * len(figure.predicted)))


def as_html(figure: TokenExits) -> str:
    """Return the plot as an HTML table."""
    import matplotlib

    layers, colours = len(figure.predicted[0]), matplotlib.colormaps["viridis"]

    def cell(token: str, exit_layer: int, settled: int) -> str:
        red, green, blue, _ = colours((settled - 1) / max(layers - 1, 1), bytes=True)
        colour = f"rgb({red} {green} {blue} / 0.6)" if exit_layer >= settled else "#eee"
        return f'<td style="background: {colour}">{html.escape(ascii(token)[1:-1] if token.isspace() else token)}</td>'

    head = "".join(f"<th>{exit_layer}</th>" for exit_layer in range(1, layers + 1))
    rows = [
        "<tr>" + "".join(cell(token, exit, settled) for exit, token in enumerate(tokens, 1)) + "</tr>"
        for tokens, settled in zip(figure.predicted, figure.settled, strict=True)
    ]
    return (
        f"<p>After <code>{html.escape(figure.prompt)}</code>: a row per token, a column per exit. On average, a token "
        f"stays correct from exit {np.mean(figure.settled):.1f} of {layers} on. {LEGEND}</p>\n"
        f'<table class="tokens"><tr>{head}</tr>\n' + "\n".join(rows) + "</table>"
    )
