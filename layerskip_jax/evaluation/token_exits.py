"""The layer that first predicts each generated token (LayerSkip figure 2, its motivation)."""

import dataclasses
import html
import unicodedata
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.request import round_up
from layerskip_jax.decoding.rounds import Autoregressive
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.text import encode
from layerskip_jax.evaluation.exits import exit_predictions
from layerskip_jax.evaluation.pictures import exit_color, ink_on
from layerskip_jax.model import Transformer

NAMES = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
"""Symbols for a space, a line end and a tab: \u2423, \u21b5 and \u21e5."""


@dataclasses.dataclass(frozen=True)
class TokenExits:
    """The prediction of each exit for every generated token, and the exit (1..L) from which it stays correct."""

    prompt: str
    predicted: list[list[str]]  # by generated token, then by exit
    settled: list[int]

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return as_html(self)


def settling_exits(next_LT: np.ndarray) -> np.ndarray:
    """Return ``settled_T``: the first exit, counted from 1, from which all exits predict the token of the last one.

    >>> settling_exits(np.array([[7, 1, 3], [2, 2, 3], [7, 2, 3]])).tolist()
    [3, 2, 1]
    """
    agrees_LT = next_LT == next_LT[-1]
    stays_LT = np.flip(np.logical_and.accumulate(np.flip(agrees_LT, 0), axis=0), 0)
    return np.argmax(stays_LT, axis=0) + 1


def visible(text: str, keep: str = "") -> str:
    """Replace invisible characters by symbols, except those in ``keep``.

    >>> visible(" def\\n"), visible("caf\\u00e9 \\u2028"), visible("a\\tb\\0", keep="\\t")
    ('\u2423def\u21b5', 'caf\u00e9\u2423\u27e8U+2028\u27e9', 'a\\tb\u27e8U+0000\u27e9')
    """

    def sign(character: str) -> str:
        shown = character in keep or unicodedata.category(character)[0] not in "ZC"
        return character if shown else NAMES.get(character, f"\u27e8U+{ord(character):04X}\u27e9")

    joins = bool(text) and unicodedata.category(text[0])[0] == "M"  # a mark combines with the character before it
    return ("\u25cc" if joins else "") + "".join(map(sign, text))


def predict_continuations(
    model: Transformer, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return ``next_LT`` for each continuation in ``new``: what every exit predicts in place of each of its tokens."""
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, new, strict=True)]
    tokens_BT = np.zeros((len(texts), round_up(max(map(len, texts)))), np.int32)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = text
    next_LBT = jax.device_get(exit_predictions(model, jnp.asarray(tokens_BT), jnp.ones_like(tokens_BT)))
    return [
        next_LBT[:, row, len(prompt) - 1 : len(text) - 1]
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def acceptance_by_exit(continuations: Sequence[np.ndarray], draft_length: int) -> np.ndarray:
    """Return ``acceptance_L``: accepted drafts over drafts, if rounds of ``draft_length`` drafted from each exit.

    This simulates the rounds on texts of greedy decoding: a draft is accepted if it and the drafts before it in its
    round equal the text. So one text gives the acceptance of every exit. ``continuations`` are the
    `predict_continuations` of the texts. Rounds that a text cuts off do not count; NaN if no round remains.

    >>> acceptance_by_exit([np.array([[7, 2, 3, 4, 5], [1, 2, 3, 4, 5]])], draft_length=2).tolist()
    [0.5, 1.0]
    """

    def count(agrees_T: np.ndarray) -> tuple[int, int]:
        position = accepted = drafted = 0
        while position + draft_length <= len(agrees_T):
            right = int(np.cumprod(agrees_T[position : position + draft_length]).sum())
            accepted, drafted, position = accepted + right, drafted + draft_length, position + right + 1
        return accepted, drafted

    layers = len(continuations[0])
    sums_L2 = np.array([[count(next_LT[e] == next_LT[-1]) for next_LT in continuations] for e in range(layers)]).sum(1)
    return np.where(sums_L2[:, 1] > 0, sums_L2[:, 0] / np.maximum(sums_L2[:, 1], 1), np.nan)


def token_exits(
    model: Transformer, tokenizer: Tokenizer, prompt: str, new_tokens: int, config: DecodeConfig | None = None
) -> TokenExits:
    """Continue ``prompt`` greedily with an unstacked model, and predict every new token from every exit.

    ``config`` decides whether the prompt is encoded as a chat.
    """
    ids = encode(tokenizer, config or DecodeConfig(), prompt)
    ends = tokenizer.end_tokens(model.config.vocab_size)
    result = generate(model, [ids], new_tokens, Autoregressive(Greedy()), eos=ends)
    (next_LT,) = predict_continuations(model, [ids], result.tokens)

    def spell(token: int) -> str:
        return tokenizer.decode([token]) or ("\u27e8end\u27e9" if token in ends else f"\u27e8{token}\u27e9")

    predicted = [[spell(token) for token in next_L] for next_L in next_LT.T.tolist()]
    return TokenExits(prompt, predicted, settling_exits(next_LT).tolist())


def colors(exit_layer: int, layers: int) -> tuple[str, str]:
    """Return the color of an exit, which is the same in light and dark mode, and black or white for text on it."""
    from matplotlib.colors import to_hex

    color = exit_color(exit_layer, layers, "viridis")
    return to_hex(color), ink_on(color)


def as_html(figure: TokenExits, untrained: Collection[int] = ()) -> str:
    """Return the plot as an HTML table; exits in ``untrained``, which had no loss in training, get a mark."""
    layers = len(figure.predicted[0])

    def cell(token: str, exit_layer: int, settled: int) -> str:
        style = ' style="background:{};color:{}"'.format(*colors(settled, layers)) if exit_layer >= settled else ""
        return f"<td{style}>{html.escape(visible(token))}</td>"

    marks = ["&dagger;" if exit_layer in untrained else "" for exit_layer in range(1, layers + 1)]
    head = "".join(f'<th scope="col">{exit_layer}{mark}</th>' for exit_layer, mark in enumerate(marks, start=1))
    rows = [
        "<tr>" + "".join(cell(token, exit, settled) for exit, token in enumerate(tokens, 1)) + "</tr>"
        for tokens, settled in zip(figure.predicted, figure.settled, strict=True)
    ]
    prompt, mean = html.escape(visible(figure.prompt, keep=" ")), np.mean(figure.settled)
    about = (
        f"<p>After <code>{prompt}</code>: one row for each token that the full model generates, one column for each "
        f"exit. On average, a token is settled from exit {mean:.1f} of {layers} on.</p>\n"
    )
    return (
        about + '<div class="scroll" tabindex="0" role="region" aria-label="Predictions of each exit">\n'
        f'<table class="tokens"><thead><tr>{head}</tr></thead>\n<tbody>' + "\n".join(rows) + "</tbody></table></div>"
    )


def legend(layers: int) -> str:
    """Return the meaning of the table's colors as HTML."""
    swatches = "".join(
        '<span style="background:{};color:{}">{}</span>'.format(*colors(exit_layer, layers), exit_layer)
        for exit_layer in range(1, layers + 1)
    )
    signs = ", ".join(
        f"{sign}&nbsp;{name}" for sign, name in zip(NAMES.values(), ("space", "line&nbsp;end", "tab"), strict=True)
    )
    return (
        f'<p class="legend">The color is the exit from which on all exits predict the token: {swatches}. Earlier '
        f"predictions have no color. Signs: {signs}.</p>"
    )
