"""The choice of `Hybrid` between an exit and lookups. Other modules test its texts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from test_decoding_lossless import NeverAgrees, with_tail

from layerskip_jax.decoding.cost import Overhead
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Hybrid, prior
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy


@pytest.mark.parametrize("tail", [0.0, 1.0], ids=["exit is right", "exit is wrong"])
def test_hybrid_prefers_the_source_that_gains_more(tail):
    """If the last token alone decides the next one, the text is periodic. The exit is also right if it decides so."""
    model = with_tail(tiny_model(4), 0 if tail == 0.0 else 2, tail)
    lookup, exit_2 = PromptLookup(Greedy(), 6), SelfSpeculative(Greedy(), Fixed(2, 2))
    result = generate(model, [[1, 2]], 120, Hybrid(lookup, exit_2, 4))
    assert result.tokens == generate(model, [[1, 2]], 120, Autoregressive(Greedy())).tokens
    assert sum(result.exit_drafts.values()) == result.drafted
    assert sum(result.exit_accepted.values()) == result.accepted
    alone = [generate(model, [[1, 2]], 120, strategy) for strategy in (lookup, exit_2)]
    assert result.rounds <= min(one.rounds for one in alone) + 8  # tries of each source


def test_hybrid_decodes_plainly_where_no_draft_is_right():
    model, wrong = with_tail(tiny_model(4), 2, 0.0), NeverAgrees()
    lookup, exit_2 = PromptLookup(wrong, 6, max_ngram=1), SelfSpeculative(wrong, Fixed(2, 2))
    result = generate(model, [[1, 2]], 60, Hybrid(lookup, exit_2, 4, Overhead(per_draft=1.0)))
    assert result.tokens == generate(model, [[1, 2]], 60, Autoregressive(Greedy())).tokens
    assert sum(result.exit_rounds.values()) < result.rounds / 2


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(1, 9), st.floats(1, 3)), max_size=6))
def test_gains_are_discounted_towards_the_prior(rounds):
    hybrid = Hybrid(PromptLookup(Greedy(), 2), SelfSpeculative(Greedy(), Fixed(1, 2)), 4, horizon=10.0)
    gains, expected = prior(3), np.array([[2.0] * 4, [1.0] * 4])
    for source, tokens, cost in rounds:
        on_M = jnp.arange(4) == source
        gains = hybrid.discounted(gains, tokens * on_M, cost * on_M)
        expected = np.array([[2.0], [1.0]]) + 0.9 * (expected - np.array([[2.0], [1.0]]))
        expected[:, source] += [tokens, cost]
    np.testing.assert_allclose(np.array(gains), expected, rtol=1e-5)
