"""The choice of `Hybrid` between an exit and lookups. Other modules test its texts."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from test_decoding_lossless import NeverAgrees, with_tail

from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Gains, Hybrid, prior
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


class WrongLookup(PromptLookup):
    """Drafts other tokens than those that followed the match."""

    def look_up(self, state):
        draft_Bd, match_B = super().look_up(state)
        return (draft_Bd + 1) % 61, match_B


def test_hybrid_decodes_plainly_where_no_draft_is_right():
    model, wrong = with_tail(tiny_model(4), 2, 0.0), NeverAgrees()
    exit_2 = SelfSpeculative(wrong, Fixed(2, 2))
    result = generate(model, [[1, 2]], 60, Hybrid(WrongLookup(wrong, 6), exit_2, 4, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert result.tokens == generate(model, [[1, 2]], 60, Autoregressive(Greedy())).tokens
    assert sum(result.exit_rounds.values()) < result.rounds / 2


ROUNDS = st.lists(st.tuples(*4 * [st.floats(0, 9)]), max_size=6)


@given(ROUNDS)
def test_gains_are_discounted_towards_the_prior(rounds):
    hybrid = Hybrid(PromptLookup(Greedy(), 2, max_ngram=1), SelfSpeculative(Greedy(), Fixed(1, 2)), 4, horizon=10.0)
    gains, start = prior(1), np.array([2, 1, 1.6, 2])
    expected = start
    for new in rounds:
        tokens, cost, *lookups = map(jnp.array, new)
        gains = hybrid.discounted(gains, Gains(tokens, cost, *(count[None] for count in lookups)))
        expected = start + 0.9 * (expected - start) + new
    np.testing.assert_allclose(np.array([np.squeeze(value) for value in gains]), expected, rtol=1e-5)


def test_the_first_round_compiles_for_the_types_of_the_next_ones():
    hybrid = Hybrid(PromptLookup(Greedy(), 2), SelfSpeculative(Greedy(), Fixed(1, 2)), 4)
    gains = prior(3)
    after = hybrid.discounted(gains, Gains(jnp.int32(1), jnp.float32(1), jnp.zeros(3), jnp.zeros(3)))
    assert [value.aval for value in gains] == [value.aval for value in after]  # also their weak types


def test_expected_tokens_of_a_lookup_by_hand():
    hybrid = Hybrid(PromptLookup(Greedy(), 3, max_ngram=2), SelfSpeculative(Greedy(), Fixed(1, 2)), 4)
    gains = Gains(jnp.ones(()), jnp.ones(()), jnp.array([1.0, 4.0]), jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(hybrid.lookup_tokens(gains), [1 + 0.5 + 0.25 + 0.125, 4.0])


@pytest.mark.parametrize(
    ("emitted", "agreed", "compared"),
    [
        ([7], 1, 1),  # the rest is not known
        ([5], 0, 1),
        ([7, 8, 9], 3, 3),
        ([7, 8, 9, 4], 3, 3),  # a lookup has three tokens
        ([7, 5, 9], 1, 2),  # tokens after the first difference do not count
        ([], 0, 0),  # the row is done
    ],
)
def test_lookups_are_compared_with_the_text(emitted, agreed, compared):
    hybrid = Hybrid(PromptLookup(Greedy(), 3, max_ngram=2), SelfSpeculative(Greedy(), Fixed(1, 2)), 4)
    tokens = jnp.zeros((1, 9), jnp.int32).at[0, 4 : 4 + len(emitted)].set(jnp.array(emitted, jnp.int32))
    before, after = (SimpleNamespace(tokens_BS=tokens, length_B=jnp.array([n])) for n in (4, 4 + len(emitted)))
    draft_Bd = jnp.array([[7, 8, 9]])
    for match, where in ((2, [0, 1]), (0, [0, 0])):
        counted = hybrid.compare(draft_Bd, jnp.array([match]), before, after)
        np.testing.assert_array_equal(counted, [[agreed * w for w in where], [compared * w for w in where]])
