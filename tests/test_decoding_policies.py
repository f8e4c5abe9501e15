"""The choices of draft policies and prompt lookup, against hand calculations and oracles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from test_decoding_lossless import with_tail

from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.engine import begin, generate, rounds_program
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed, Plan
from layerskip_jax.decoding.prompt_lookup import PromptLookup, look_up
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import UserError

PROMPTS = [[1, 2, 3], [4]]


def test_confidence_stop_drafts_one_token_if_never_confident_and_all_if_always():
    model = tiny_model(1).unstacked()
    never = generate(model, PROMPTS, 30, AdaptiveSpeculative(Greedy(), ConfidenceStop(2, 3, 1.0)))
    always = generate(model, PROMPTS, 30, AdaptiveSpeculative(Greedy(), ConfidenceStop(2, 3, 0.0)))
    assert sum(never.accepted_histogram[2:]) == 0
    assert never.drafted == sum(never.accepted_histogram)
    assert always == dataclasses.replace(
        generate(model, PROMPTS, 30, SelfSpeculative(Greedy(), Fixed(2, 3))),
        seconds=always.seconds,
        prefill_seconds=always.prefill_seconds,
    )


@dataclasses.dataclass(frozen=True)
class Wild(Fixed):
    """Plans what it did not declare: no draft, a negative number, too many, and an exit that does not exist."""

    def init_state(self, model):
        return jnp.int32(0)

    def plan(self, rounds):
        return Plan(rounds % 3 - 1, jnp.array([2, 0, -1, 9, 1])[rounds % 5])

    def update(self, rounds, outcome):
        return rounds + 1


@pytest.mark.parametrize("strategy", [SelfSpeculative, AdaptiveSpeculative])
def test_a_policy_that_plans_beyond_its_bounds_changes_no_text(strategy):
    model = tiny_model(1).unstacked()
    full = generate(model, PROMPTS, 30, Autoregressive(Greedy()))
    wild = generate(model, PROMPTS, 30, strategy(Greedy(), Wild(2, 3)))
    assert wild.tokens == full.tokens
    assert len(wild.accepted_histogram) == 4


@dataclasses.dataclass(frozen=True)
class Narrow(Fixed):
    widths: tuple[int, ...] = ()
    length: int = 2

    @property
    def verify_widths(self):
        return self.widths or super().verify_widths

    def plan(self, policy_state):
        return Plan(0, self.length)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (
            Narrow(2, 3, (1, 3)),
            r"verify_widths must be strictly increasing up to draft_length \+ 1 = 4, got \(1, 3\)",
        ),
        (Narrow(2, 3, (3, 2, 4)), "verify_widths must be strictly increasing"),
        (Narrow(2, 3, (), 4), r"a plan's draft_length must be in 0\.\.3, not 4"),
    ],
)
def test_wrong_widths_and_plans_are_named(policy, says):
    with pytest.raises(UserError, match=says):
        generate(tiny_model(1).unstacked(), PROMPTS, 5, AdaptiveSpeculative(Greedy(), policy))


def test_one_exit_is_all_that_self_speculative_drafts_from():
    with pytest.raises(UserError, match="Adaptive has the candidate exits 1 2, but SelfSpeculative drafts from one"):
        SelfSpeculative(Greedy(), Adaptive((1, 2), 2))


def test_a_strategy_that_jit_cannot_hash_is_refused():
    @dataclasses.dataclass
    class Mutable:
        exit_layer: int
        exits = (2,)
        draft_length = 3

    with pytest.raises(UserError, match=r"unhashable type: 'Mutable'\): .* @dataclasses\.dataclass\(frozen=True\)"):
        generate(tiny_model(1).unstacked(), PROMPTS, 5, SelfSpeculative(Greedy(), Mutable(2)))


def test_attributes_that_are_not_fields_are_refused():
    class Loose(Fixed):
        def __init__(self, threshold):
            super().__init__(2, 3)
            object.__setattr__(self, "threshold", threshold)

    loose = SelfSpeculative(Greedy(), Loose(0.5))
    for strategy in (loose, Hybrid(PromptLookup(Greedy(), 2), loose, num_layers=4)):
        with pytest.raises(UserError, match=r"Loose has attributes that are not dataclass fields, .*@dataclasses\."):
            generate(tiny_model(1).unstacked(), PROMPTS, 5, strategy)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots(Fixed):
    pass


@dataclasses.dataclass(frozen=True)
class Cached(Fixed):
    @functools.cached_property
    def verify_widths(self):
        return (self.draft_length + 1,)


@pytest.mark.parametrize("kind", [Slots, Cached])
def test_policies_may_have_slots_and_cached_properties(kind):
    model, strategy = tiny_model(1).unstacked(), SelfSpeculative(Greedy(), kind(2, 3))
    for _ in range(2):  # the cached property has a value in the second round
        _ = strategy.policy.verify_widths
        assert (
            generate(model, PROMPTS, 5, strategy).tokens == generate(model, PROMPTS, 5, Autoregressive(Greedy())).tokens
        )


@dataclasses.dataclass(frozen=True)
class Margin(Fixed):
    """Drafts on while the most likely token leads by a margin, for which a policy needs all logits of the exit."""

    margin: float = 0.0

    def keep_drafting(self, policy_state, notes, token_B, logits_BV):
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits_BV), 2)[0], -1, 0)
        return first - second >= self.margin, notes


def test_a_policy_may_stop_by_the_exits_logits():
    model = tiny_model(1).unstacked()
    full = generate(model, PROMPTS, 30, Autoregressive(Greedy()))
    drafted = {}
    for margin in (0.0, 0.02, 1.0):
        result = generate(model, PROMPTS, 30, SelfSpeculative(Greedy(), Margin(2, 4, margin)))
        assert result.tokens == full.tokens
        drafted[margin] = result.drafted / sum(result.accepted_histogram)
    assert drafted[0.0] == 4 > drafted[0.02] > drafted[1.0] == 1


STRATEGIES = {
    "autoregressive": Autoregressive(Greedy()),
    "fixed": SelfSpeculative(Greedy(), Fixed(2, 2)),
    "confidence": AdaptiveSpeculative(Greedy(), ConfidenceStop(2, 2, 0.1)),
    "adaptive": AdaptiveSpeculative(Greedy(), Adaptive((1, 3), 2)),
    "prompt_lookup": PromptLookup(Greedy(), 2),
    "confident_exit": ConfidentExit(Greedy(), (1, 2, 4), 0.1),
    "hybrid": Hybrid(PromptLookup(Greedy(), 3), SelfSpeculative(Greedy(), Fixed(2, 2)), 4),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_rounds_copy_neither_cache_nor_weights(strategy, batch):
    """The compiled loop's temporary memory is a small part of the cache for one row, at most its size for several."""
    model = tiny_model(num_heads=4, num_kv_heads=4).unstacked()
    state = begin(model, [[1, 2]] * batch, 8, strategy, max_length=2000)
    memory = rounds_program(model.config).lower(strategy, model, state, jnp.int32(1)).compile().memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    print(f"temporary memory: {memory.temp_size_in_bytes / cache_bytes:.3f} of the cache's {cache_bytes} bytes")
    assert memory.temp_size_in_bytes < (0.2 if batch == 1 else 1.1) * cache_bytes


@pytest.mark.parametrize("name", ["adaptive", "confidence"])
def test_a_generation_compiles_its_rounds_once(name):
    model, strategy = tiny_model().unstacked(), STRATEGIES[name]
    generate(model, PROMPTS, 30, strategy)
    compiled = rounds_program(model.config)._cache_size()
    generate(model, [[5, 6], [7, 8, 9]], 30, strategy, seed=3)
    assert rounds_program(model.config)._cache_size() == compiled


def plain_look_up(tokens, max_ngram, draft_length):
    """The oracle of `look_up`: try the longest match first, and the latest of equally long ones."""
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                period = len(tokens) - end
                return size, [tokens[end + i % period] for i in range(draft_length)]
    return 0, None


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=14), max_ngram=st.integers(1, 4), length=st.integers(1, 5)
)
def test_look_up_equals_a_plain_search(tokens, max_ngram, length):
    padded = jnp.array([[*tokens, *[1] * (16 - len(tokens))]])
    draft, match = look_up(padded, jnp.array([len(tokens)]), max_ngram, length)
    expected = plain_look_up(tokens, max_ngram, length)
    assert (int(match[0]), draft[0].tolist() if match[0] else None) == expected


def test_prompt_lookup_accepts_repetition():
    """If the next token depends on the last one alone, the text is periodic: all drafts are right after one period."""
    model = with_tail(tiny_model(4), 0, 0.0)
    result = generate(model, [[1, 2]], 120, PromptLookup(Greedy(), 4))
    different = len(set(result.tokens[0]))
    assert result.rounds <= different + -(-(120 - different) // 5) + 1
