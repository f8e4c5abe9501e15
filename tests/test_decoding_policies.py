"""The choices of draft policies and prompt lookup, against hand calculations and oracles."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_config, tiny_model
from test_decoding_lossless import NeverAgrees, with_tail

from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.cost import head_share, round_cost
from layerskip_jax.decoding.engine import begin, generate, rounds_program, run_rounds
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import Adaptive, ConfidenceStop, Fixed, Outcome, Plan, Probe
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

    def keep_drafting(self, policy_state, token_B, logits_BV):
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits_BV), 2)[0], -1, 0)
        return first - second >= self.margin


def test_a_policy_may_stop_by_the_exits_logits():
    model = tiny_model(1).unstacked()
    full = generate(model, PROMPTS, 30, Autoregressive(Greedy()))
    drafted = {}
    for margin in (0.0, 0.02, 1.0):
        result = generate(model, PROMPTS, 30, SelfSpeculative(Greedy(), Margin(2, 4, margin)))
        assert result.tokens == full.tokens
        drafted[margin] = result.drafted / sum(result.accepted_histogram)
    assert drafted[0.0] == 4 > drafted[0.02] > drafted[1.0] == 1


def test_adaptive_plans_by_the_formula():
    policy = Adaptive((1, 2), 3)
    agreed = jnp.array([[9.0, 4.0, 2.0], [18.0, 17.0, 16.0]])
    reached = jnp.array([[18.0, 9.0, 4.0], [19.0, 18.0, 17.0]])
    cost = np.array([[1.0, 1.2, 1.4, 1.6], [1.0, 1.4, 1.8, 2.2]])
    promised = {}
    for exit_index in range(2):
        rate = (agreed[exit_index].sum() + 1) / (reached[exit_index].sum() + 2)
        survival = 1.0
        tokens = 1.0
        promised[exit_index, 0] = 1.0
        for length in range(1, 4):
            seen = reached[exit_index, length - 1]
            survival *= float((agreed[exit_index, length - 1] + 2 * rate) / (seen + 2))
            tokens += survival
            promised[exit_index, length] = tokens / cost[exit_index, length]
    plan = policy.best_plan(agreed, reached, jnp.asarray(cost))
    assert (int(plan.exit_index), int(plan.draft_length)) == max(promised, key=promised.get) == (1, 3)


def test_adaptive_updates_its_counts():
    policy, config = Adaptive((1, 2), 3, probe_share=0.02, horizon=1e9), tiny_config()
    none, first = jnp.zeros((2, 4)), policy.init_state(config)
    assert policy.probes(first)
    # Rows: 2 of 3 drafts accepted; all 3 accepted; already done.
    outcome = Outcome(
        Plan(jnp.int32(1), jnp.int32(3)),
        active_B=jnp.array([True, True, False]),
        drafted_B=jnp.array([3, 3, 3]),
        accepted_B=jnp.array([2, 3, 1]),
        probe=Probe.none(2, 4),
    )
    state = policy.update(first, outcome)
    assert state.agreed_Xd.tolist() == [[0, 0, 0], [2, 2, 1]]
    assert state.reached_Xd.tolist() == [[0, 0, 0], [2, 2, 2]]
    state = policy.update(state, outcome._replace(probe=Probe(jnp.bool(True), none + 1, none + 2)))
    np.testing.assert_allclose(state.agreed_Xd, [[1, 1, 1], [3, 3, 2]], rtol=1e-5)
    assert state.spent == pytest.approx(round_cost(config, 2, 3))  # the round of the probe itself
    assert not policy.probes(state)
    assert state.best == policy.best_plan(state.agreed_Xd, state.reached_Xd, state.cost_XQ)
    plain = outcome._replace(plan=Plan(jnp.int32(0), jnp.int32(0)))
    after = policy.update(state, plain)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after, state._replace(spent=state.spent + 1)))


def test_adaptive_probes_for_its_share_of_the_time():
    """A probe of X exits costs X heads, so one is due when X h / share has been spent since the last."""
    config = tiny_config()
    policy = Adaptive((1, 2), 4, probe_share=0.02)
    model = with_tail(tiny_model(2), 1, 1.0)
    strategy = AdaptiveSpeculative(NeverAgrees(), policy)
    state = begin(model, [[1, 2]], 200, strategy)
    probes, spent = 0, 0.0
    for rounds in range(1, 100):
        probes += bool(policy.probes(state.policy_state))
        plan = policy.plan(state.policy_state)
        spent += round_cost(config, policy.exits[int(plan.exit_index)], int(plan.draft_length))
        state = run_rounds(strategy, model, state, jnp.int32(rounds))
    assert probes * 2 * head_share(config) / spent == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_single_candidate_is_probed_only_in_rounds_without_a_draft(drafts):
    policy = Adaptive((1,), 4)
    due = policy.init_state(tiny_config())._replace(spent=jnp.float32(1e9))
    planned = due._replace(best=Plan(jnp.int32(0), jnp.int32(drafts)))
    assert bool(policy.probes(planned)) == (drafts == 0)


@pytest.mark.parametrize("good_exit", [1, 2, 3])
def test_adaptive_finds_the_exit_that_is_always_right(good_exit):
    """Blocks after ``good_exit`` are identities, so it and all later exits are right, and it is the cheapest."""
    model = with_tail(tiny_model(2), good_exit, 0.0)
    strategy = AdaptiveSpeculative(Greedy(), Adaptive((1, 2, 3), 4, probe_share=0.5))
    result = generate(model, [[1, 2]], 120, strategy)
    assert max(result.exit_rounds, key=result.exit_rounds.get) == good_exit
    assert result.rounds < 60


def test_adaptive_falls_back_to_plain_decoding_if_no_draft_is_right():
    result = generate(tiny_model(2).unstacked(), [[1, 2]], 60, AdaptiveSpeculative(NeverAgrees(), Adaptive((1,), 6)))
    assert result.drafted < 12
    assert result.accepted == 0


@dataclasses.dataclass(frozen=True)
class Recorder(Adaptive):
    """Probes in every round and discounts nothing, so its counts are the sum of all probes."""

    horizon: float = 1e9

    def probes(self, policy_state):
        return True

    def plan(self, policy_state):
        return Plan(jnp.int32(len(self.exits) - 1), jnp.int32(self.draft_length))


class FromExit(Recorder):
    """Drafts from the exit in its state, so that all exits share a program."""

    def init_state(self, model):
        return super().init_state(model), jnp.int32(0)

    def plan(self, policy_state):
        return Plan(policy_state[1], jnp.int32(self.draft_length))

    def update(self, policy_state, outcome):
        return super().update(policy_state[0], outcome), policy_state[1]


@pytest.mark.parametrize("used", [0, 1, 2])
def test_probes_count_what_each_exit_would_have_drafted(used):
    """From whatever exit a round drafts, the counts are those of the exits run alone on the generated text."""
    exits, d = (1, 2, 3), 3
    model = with_tail(tiny_model(7), 2, 0.15)
    strategy = AdaptiveSpeculative(Greedy(), FromExit(exits, d))
    state = begin(model, [[1, 2]], 60, strategy)
    state = dataclasses.replace(state, policy_state=(state.policy_state[0], jnp.int32(used)))
    state = run_rounds(strategy, model, state, jnp.int32(0))
    lengths = [int(state.length_B[0])]
    for round_number in range(1, 12):
        state = run_rounds(strategy, model, state, jnp.int32(round_number))
        lengths.append(int(state.length_B[0]))
    sequence = np.asarray(state.tokens_BS[0, : lengths[-1]])
    agreed, reached = np.zeros((3, d)), np.zeros((3, d))
    for row, exit_layer in enumerate(exits):
        # The whole buffer has one shape; what comes after the text changes nothing before it.
        guesses = np.asarray(jnp.argmax(model.first_layers(exit_layer)(state.tokens_BS)[0], -1))
        for before, after in itertools.pairwise(lengths):
            for depth, position in enumerate(range(before, after)[:d]):
                reached[row, depth] += 1
                if guesses[position - 1] != sequence[position]:
                    break
                agreed[row, depth] += 1
    np.testing.assert_allclose(state.policy_state[0].agreed_Xd, agreed, rtol=1e-5)
    np.testing.assert_allclose(state.policy_state[0].reached_Xd, reached, rtol=1e-5)


def test_candidates_must_be_increasing_and_in_the_model():
    for exits in [(2, 1), (1, 1), (0, 1)]:
        with pytest.raises(UserError, match="must be strictly increasing and at least 1"):
            Adaptive(exits, 2)
    with pytest.raises(UserError, match="exits must name at least one exit"):
        Adaptive((), 2)
    with pytest.raises(UserError, match="exits must be a list, not 1"):
        Adaptive(1, 2)
    assert Adaptive([1, 2], 2) == Adaptive((1, 2), 2)
    with pytest.raises(UserError, match=r"exit layer 9 must be in 1\.\.4"):
        generate(tiny_model().unstacked(), [[1]], 2, AdaptiveSpeculative(Greedy(), Adaptive((1, 9), 2)))


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
