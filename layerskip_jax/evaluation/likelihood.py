"""Log-likelihoods of texts at one exit, in batches of few static shapes."""

from collections.abc import Sequence

import numpy as np

from layerskip_jax.checks import require
from layerskip_jax.decoding.request import round_up
from layerskip_jax.errors import warn
from layerskip_jax.evaluation.exits import token_scores
from layerskip_jax.model import Transformer

ContextAndContinuation = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, at least one each."""


def log_likelihoods(
    model: Transformer, pairs: Sequence[ContextAndContinuation], exit_layer: int, max_length: int, batch_size: int
) -> list[tuple[float, bool]]:
    """Return ``log p(continuation | context)`` [nats] of each pair, and whether greedy decoding would generate it.

    Uses the first ``exit_layer`` blocks of an unstacked model. Pairs longer than ``max_length`` + 1 tokens lose their
    beginning, with a warning. Lengths are rounded up (`round_up`), and one program is compiled for each. Raises
    `UserError` for a pair without tokens, or with a continuation longer than ``max_length``.
    """
    for number, (context, continuation) in enumerate(pairs):
        require(len(context) > 0 and len(continuation) > 0, f"context and continuation {number} must have tokens")
        require(
            len(continuation) <= max_length,
            f"continuation {number} has {len(continuation)} tokens, more than max_length {max_length}: raise it",
        )
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    if cut := sum(length > max_length + 1 for length in lengths):
        warn(
            f"{cut} of {len(pairs)} texts are longer than max_length {max_length} (the longest has {max(lengths)} "
            "tokens): their beginnings are left out"
        )
    batch_size = min(batch_size, len(pairs))
    rows = [[*context, *continuation][-(max_length + 1) :] for context, continuation in pairs]
    largest, vocabulary = max(map(max, rows), default=0), model.config.vocab_size
    require(largest < vocabulary, f"a text has the token {largest}, beyond the model's vocabulary of {vocabulary}")
    results: dict[int, tuple[float, bool]] = {}
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in range(0, len(pairs), max(batch_size, 1)):
        batch = longest_first[start : start + batch_size]
        width = round_up(len(rows[batch[0]]) - 1)
        tokens_BT = np.zeros((batch_size, width + 1), np.int32)
        for place, index in enumerate(batch):
            tokens_BT[place, : len(rows[index])] = rows[index]
        scores_BT, greedy_BT = map(np.asarray, token_scores(model, tokens_BT[:, :-1], tokens_BT[:, 1:], exit_layer))
        for place, index in enumerate(batch):
            end = len(rows[index]) - 1
            own = slice(end - len(pairs[index][1]), end)
            results[index] = float(scores_BT[place, own].sum()), bool(greedy_BT[place, own].all())
    return [results[index] for index in range(len(rows))]
