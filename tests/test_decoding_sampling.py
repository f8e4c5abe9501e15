"""Sampling: the distributions equal numpy's, and 100,000 speculative samples follow the exact distribution."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from scipy import stats

from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed, Plan
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy, Stochastic, Verdict
from layerskip_jax.decoding.top_p import smallest_kept

SAMPLES, BATCH, VOCABULARY, NEW = 100_000, 10_000, 8, 3
PROMPT = [3]  # of one token: the prefill of a longer one takes a third of the time
SETTINGS = [
    Stochastic(temperature=1.0),
    Stochastic(temperature=0.6),
    Stochastic(temperature=1.2, top_k=3),
    Stochastic(temperature=1.5, top_p=0.8),
    Stochastic(temperature=1.3, top_k=6, top_p=0.9),
]


def exact_probabilities(logits, temperature, top_k, top_p):
    """The oracle of `Stochastic.probabilities`: temperature, top-k and top-p in numpy, by sorting."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    return p / p.sum()


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
)
def test_probabilities_equal_numpy(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32)
    ours = Stochastic(temperature, top_k, top_p).probabilities(jnp.asarray(logits))
    exact = exact_probabilities(logits.astype(np.float64), temperature, top_k, top_p)
    # If a cumulative probability equals top_p up to rounding, either nucleus is right.
    edge = np.cumsum(np.sort(exact_probabilities(logits.astype(np.float64), temperature, top_k, 1.0))[::-1])
    if np.abs(edge - top_p).min() > 1e-5:
        np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert float(ours.sum()) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def model():
    tiny = tiny_model(4, num_layers=2, dim=16, num_heads=1, num_kv_heads=1, ffn_dim=16, vocab_size=VOCABULARY)
    tiny.head_DV[...] = 1.5 * tiny.head_DV[...]
    return tiny


def exact_distribution(model, sampler):
    """Return the probability of every continuation of PROMPT by NEW tokens, by the full model without a cache."""
    forward = jax.jit(lambda tokens_BT: model(tokens_BT))
    continuations = np.array(list(itertools.product(range(VOCABULARY), repeat=NEW)))
    sequences = np.concatenate([np.tile(PROMPT, (len(continuations), 1)), continuations], axis=1)
    logits = np.asarray(forward(jnp.asarray(sequences)), np.float64)
    total = np.ones(len(sequences))
    for i in range(NEW):
        at = len(PROMPT) + i
        for row, sequence in enumerate(sequences):
            p = exact_probabilities(logits[row, at - 1], sampler.temperature, sampler.top_k, sampler.top_p)
            total[row] *= p[sequence[at]]
    return total


def p_value(model, strategy, exact, samples=SAMPLES):
    """Return the p-value of a chi-square test against ``exact``; outcomes expected less than 5 times are pooled."""
    counts = np.zeros(VOCABULARY**NEW)
    unstacked = model.unstacked()
    for run in range(samples // BATCH):
        rows = np.array(generate(unstacked, [PROMPT] * BATCH, NEW, strategy, seed=run).tokens)
        np.add.at(counts, rows @ VOCABULARY ** np.arange(NEW)[::-1], 1)
    assert counts[exact < 1e-12].sum() == 0  # top-k and top-p exclude these
    expected = exact * samples
    rare = expected < 5
    observed, expected = ([*part[~rare], part[rare].sum()] for part in (counts, expected))
    if expected[-1] < 5:  # the pooled outcomes are still too rare
        observed, expected = observed[:-1], expected[:-1]
        expected = np.array(expected) * sum(observed) / sum(expected)
    return stats.chisquare(observed, expected).pvalue


class ByProbability(Adaptive):
    """Drafts from another exit in every round, and stops by the exit's probability of each token."""

    def choose(self, counts, cost_XQ):
        choice = super().choose(counts, cost_XQ)
        plan = Plan(jnp.int32(jnp.sum(counts.reached_XK) % 2), jnp.int32(self.draft_length))
        return choice._replace(
            plan=plan, acceptance_K=jnp.array([0.2, 0.5, 0.8, 1.0]), least_chance_Q=jnp.full(4, 0.45)
        )


STRATEGIES = [
    AdaptiveSpeculative(Stochastic(), ConfidenceStop(1, 3, 0.3)),
    AdaptiveSpeculative(Stochastic(temperature=0.8), ByProbability((1, 2), 3, probe_share=0.5)),
    PromptLookup(Stochastic(temperature=1.2, top_k=5), draft_length=2),
    Hybrid(PromptLookup(Stochastic(), 2, max_ngram=1), SelfSpeculative(Stochastic(), Fixed(1, 1)), num_layers=2),
]


@pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda strategy: type(getattr(strategy, "policy", strategy)).__name__
)
def test_every_policy_samples_the_full_models_distribution(model, strategy):
    p = p_value(model, strategy, exact_distribution(model, strategy.sampler))
    print(f"{strategy}: p = {p:.3f}")
    assert p > 0.001


@pytest.mark.parametrize("sampler", SETTINGS, ids=str)
def test_speculative_samples_have_the_full_models_distribution(model, sampler):
    exact = exact_distribution(model, sampler)
    p = p_value(model, SelfSpeculative(sampler, Fixed(1, 2)), exact)
    print(f"{sampler}: p = {p:.3f}")
    assert p > 0.001


def test_plain_samples_have_the_full_models_distribution(model):
    sampler = SETTINGS[0]
    assert p_value(model, Autoregressive(sampler), exact_distribution(model, sampler)) > 0.001


@dataclasses.dataclass(frozen=True)
class WrongResidual(Stochastic):
    """A deliberately wrong rule: after a rejection it samples from p instead of max(0, p - q)."""

    def verify(self, logits_BQV, drafts, key):
        accepted_B, _ = super().verify(logits_BQV, drafts, key)
        p_BQV = self.probabilities(logits_BQV)
        p_BV = jnp.take_along_axis(p_BQV, accepted_B[:, None, None], axis=1)[:, 0]
        return Verdict(accepted_B, jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(p_BV)))


@dataclasses.dataclass(frozen=True)
class AcceptsTooMuch(Stochastic):
    """A deliberately wrong rule: it accepts drafts with twice the right probability."""

    def verify(self, logits_BQV, drafts, key):
        return super().verify(logits_BQV, drafts._replace(probs=drafts.probs / 2), key)


@pytest.mark.parametrize("wrong", [WrongResidual(), AcceptsTooMuch()], ids=str)
def test_a_wrong_acceptance_rule_is_caught(model, wrong):
    exact = exact_distribution(model, Stochastic())
    assert p_value(model, SelfSpeculative(wrong, Fixed(1, 2)), exact, samples=30_000) < 1e-6


def test_a_draft_with_the_same_distribution_is_always_accepted(model):
    result = generate(model.unstacked(), [[3, 1]] * 100, 20, SelfSpeculative(Stochastic(), Fixed(2, 4)))
    assert result.acceptance > 0.999  # p/q is 1 up to rounding


def test_greedy_is_the_limit_of_low_temperature(model):
    unstacked = model.unstacked()
    greedy = generate(unstacked, [[3, 1], [2]], 20, SelfSpeculative(Greedy(), Fixed(1, 3)))
    assert (
        generate(unstacked, [[3, 1], [2]], 20, SelfSpeculative(Stochastic(1e-4), Fixed(1, 3))).tokens == greedy.tokens
    )


def test_the_seed_determines_the_samples(model):
    def sample(seed):
        return generate(model.unstacked(), [[3]], 20, SelfSpeculative(Stochastic(), Fixed(1, 3)), seed=seed).tokens

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 20.0, 200.0]),
    top_p=st.sampled_from([1e-6, 0.3, 0.95, 0.999]),
)
def test_top_p_keeps_what_a_sort_keeps(seed, size, spread, top_p):
    """Also for ties, one certain token, and probabilities that underflow to 0."""
    logits = np.round(spread * np.random.default_rng(seed).normal(size=(2, size)), 1).astype(np.float32)
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    ours = p >= np.asarray(smallest_kept(jnp.asarray(p), top_p))
    for row, kept in zip(p.astype(np.float64), ours, strict=True):
        above = np.array([row[row > value].sum() for value in row])
        if np.abs(above - top_p).min() > 1e-6:
            assert kept.tolist() == (above < top_p).tolist()
