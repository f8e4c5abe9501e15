"""Branching drafts: which drafts are accepted, the distribution of samples, and the settings.

`test_decoding_lossless` covers greedy texts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model
from test_decoding_lossless import with_tail
from test_decoding_sampling import exact_distribution, model, p_value

from layerskip_jax.config import DecodeConfig
from layerskip_jax.decoding.branching import Branching, GreedyBranches, StochasticBranches
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy, Stochastic
from layerskip_jax.errors import UserError

__all__ = ["model"]  # a fixture


@pytest.mark.parametrize(("exit_layer", "choices"), [(1, 2), (2, 3)])
def test_accepted_choices_are_those_of_the_exit_along_the_full_models_text(exit_layer, choices):
    """Follow the exit's most likely tokens while they are right, then one of its other choices if that is right."""
    draft_length, branched = 4, 0
    for seed in range(3):
        full = with_tail(tiny_model(seed), exit_layer, 0.5)
        strategy = Branching(GreedyBranches(), exit_layer, draft_length, choices)
        result = generate(full, [[5, seed]], 50, strategy)
        sequence = [5, seed, *result.tokens[0]]
        order = np.argsort(-np.asarray(full.first_layers(exit_layer)(jnp.array([sequence]))[0]), axis=-1, kind="stable")
        rank = [int(np.where(order[i] == sequence[i + 1])[0][0]) for i in range(1, len(sequence) - 1)]
        expected, i = np.zeros(draft_length + 1, int), 0
        while i + draft_length < len(rank):  # leave out a round that the limit cuts short
            first = next((n for n in range(draft_length) if rank[i + n] > 0), draft_length)
            branch = first < draft_length and rank[i + first] < choices
            expected[first + branch] += 1
            branched += branch
            i += first + branch + 1
        cut_short = np.array(result.accepted_histogram) - expected
        assert (cut_short >= 0).all()
        assert cut_short.sum() <= draft_length
        if choices == 2:  # one choice is plain self-speculation
            one = generate(full, [[5, seed]], 50, dataclasses.replace(strategy, choices=1))
            plain = generate(full, [[5, seed]], 50, SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length)))
            assert one.accepted_histogram == plain.accepted_histogram
    assert branched > 5  # otherwise the test would prove little


@pytest.mark.parametrize(
    ("sampler", "choices"), [(Stochastic(), 3), (Stochastic(1.2, top_k=3, top_p=0.9), 4)], ids=["all", "few"]
)
def test_samples_have_the_full_models_distribution(model, sampler, choices):
    """Also where top-k leaves fewer tokens than choices."""
    strategy = Branching(StochasticBranches(sampler), 1, 2, choices)
    p = p_value(model, strategy, exact_distribution(model, sampler), samples=40_000)
    print(f"{strategy}: p = {p:.3f}")
    assert p > 0.001


@dataclasses.dataclass(frozen=True)
class FixedSecondChoice(StochasticBranches):
    """A deliberately wrong rule: the second choice is the second most likely token, and no draw from q."""

    def propose(self, logits_BV, choices, key):
        token_BC, q_BV = super().propose(logits_BV, choices, key)
        second_B = jnp.argsort(-q_BV, axis=1)[:, 1]
        return token_BC.at[:, 1].set(jnp.where(token_BC[:, 0] == second_B, token_BC[:, 1], second_B)), q_BV


def test_a_wrong_proposal_is_caught(model):
    exact = exact_distribution(model, Stochastic())
    assert p_value(model, Branching(FixedSecondChoice(Stochastic()), 1, 2, 2), exact, samples=20_000) < 1e-6


def test_more_choices_accept_more(model):
    def acceptance(choices):
        strategy = Branching(StochasticBranches(Stochastic()), 1, 4, choices)
        return generate(model.unstacked(), [[3, 1]] * 100, 20, strategy).acceptance

    one, two, four, all_tokens = map(acceptance, (1, 2, 4, 8))
    assert one < two < four < all_tokens
    assert all_tokens < 1  # only the first choice of a position continues the draft


def test_logits_that_are_not_finite_are_reported():
    broken = tiny_model().unstacked()
    broken.blocks[-1].down_FD[...] = jnp.full_like(broken.blocks[-1].down_FD[...], jnp.nan)
    for sampler in (GreedyBranches(), StochasticBranches(Stochastic())):
        with pytest.raises(UserError, match="the logits after 2 tokens of prompt 0 are not finite"):
            generate(broken, [[1, 2]], 5, Branching(sampler, 1, 3, 2))


def test_bad_settings_are_refused():
    full = tiny_model(vocab_size=3).unstacked()
    for values, message in [
        ({"choices": 17}, r"choices must be in 1\.\.16, not 17"),
        ({"choices": 2, "policy": "adaptive"}, "choices 2 needs .* policy fixed and .*; or give choices 1"),
        ({"choices": 2, "lookup_length": 4}, "choices 2 needs .* lookup_length 0"),
        ({"choices": 2, "mode": "prompt_lookup"}, "choices 2 needs mode self_speculative"),
    ]:
        with pytest.raises(UserError, match=message):
            DecodeConfig(**values)
    assert configure(DecodeConfig(choices=4, temperature=1.0, top_k=2), full)[1].choices == 2
    assert configure(DecodeConfig(choices=4, top_k=1), full)[1].choices == 4  # greedy decoding ignores top_k
    used, strategy = configure(DecodeConfig(choices=4), full)
    with pytest.raises(UserError, match="choices 4 must be at most the model's vocabulary, 3"):
        generate(used, [[1]], 4, strategy)
    with pytest.raises(UserError, match="choices must be at least 1, not 0"):
        Branching(GreedyBranches(), 1, 4, 0)


def test_a_row_alone_equals_the_row_in_a_batch():
    full, strategy = with_tail(tiny_model(3), 2, 0.3), Branching(GreedyBranches(), 2, 3, 3)
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    together = generate(full, prompts, 30, strategy).tokens
    assert together == [generate(full, [prompt], 30, strategy).tokens[0] for prompt in prompts]
    assert len(jax.tree.leaves(together)) == 90
