"""Greedy speculation, under every policy, gives exactly the tokens of greedy autoregressive decoding, in float32.

A case is one prompt, decoded by every strategy. A combination of model shape, batch size, exit and draft length has 288
cases or more, so there are 2,016 or more. A batch has its own weights, limit and EOS, and a prompt its own length.
Scaling the blocks after the exit varies how often drafts are accepted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model

from benchmarks.common import scale_tail
from layerskip_jax import cache
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.branching import Branching, GreedyBranches
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed, Plan
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy

SHAPES = [
    {"num_layers": 1, "vocab_size": 17},
    {"num_layers": 2, "num_kv_heads": 1},
    {"num_layers": 3, "tied_embedding": True, "vocab_size": 97},
    {"num_layers": 4},
    {"num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "dim": 20, "ffn_dim": 24},
    {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "dim": 64},
]
# The longest drafts on the smallest models: a program has the blocks once for every width of verification.
DRAFT_LENGTHS = [12, 8, 5, 3, 4, 2, 1]
BATCHES = [1, 2, 4, 8]
COMBINATIONS = 7
CASES_EACH = 288


def with_tail(model, exit_layer, scale):
    """Scale what the blocks after the exit add to the residual stream; 0 makes them identities."""
    return scale_tail(model, exit_layer, scale).unstacked()


@dataclasses.dataclass(frozen=True)
class Erratic(Adaptive):
    """A stub policy that plans another exit and another draft length, 0 included, in every round; it has few widths.

    A token whose number is a multiple of 7 ends the draft of its row.
    """

    @property
    def verify_widths(self):
        return tuple(sorted({1, self.draft_length // 2 + 1, self.draft_length + 1}))

    def init_state(self, model):
        return jnp.int32(0)

    def plan(self, rounds):
        return Plan(rounds % len(self.exits), rounds * 5 % (self.draft_length + 1))

    def probes(self, rounds):
        return rounds % 3 == 0

    def keep_drafting(self, rounds, notes, token_B, logits_BV):
        return token_B % 7 != 0, notes

    def update(self, rounds, outcome):
        return rounds + 1


def speculative_strategies(combination, random):
    """Return one strategy of each kind; the first drafts from the exit layer, and the second too."""
    layers = SHAPES[combination % len(SHAPES)]["num_layers"]
    exit_layer = int(random.integers(1, layers + 1))
    draft_length = DRAFT_LENGTHS[combination % len(DRAFT_LENGTHS)]
    exits = tuple(sorted({exit_layer, *random.integers(1, layers + 1, 2).tolist()}))
    threshold = float(random.choice([0.02, 0.05, 0.2]))
    policies = [
        Fixed(exit_layer, draft_length),
        ConfidenceStop(exit_layer, draft_length, threshold),
        Adaptive(exits, draft_length, probe_share=0.5, horizon=10.0),
        Erratic(exits, draft_length),
    ]
    adaptive = [AdaptiveSpeculative(Greedy(), policy) for policy in policies[1:]]
    fixed, lookup = SelfSpeculative(Greedy(), policies[0]), PromptLookup(Greedy(), draft_length)
    other = PromptLookup(Greedy(), DRAFT_LENGTHS[(combination + 1) % len(DRAFT_LENGTHS)])
    branching = Branching(GreedyBranches(), exit_layer, draft_length, choices=int(random.integers(2, 6)))
    return [fixed, *adaptive, lookup, Hybrid(other, random.choice([fixed, adaptive[1]]), layers), branching]


@pytest.mark.parametrize("combination", range(COMBINATIONS))
def test_speculation_equals_autoregressive_decoding(combination, monkeypatch):
    # Small cache pieces, so that even these short texts cross from one piece to the next.
    monkeypatch.setattr(cache, "read_sizes", lambda capacity, first: [24, capacity])
    random = np.random.default_rng(combination)
    shape = SHAPES[combination % len(SHAPES)]
    batch = int(random.choice(BATCHES))
    strategies = speculative_strategies(combination, random)
    fixed = strategies[0].policy
    cases, drafted = 0, 0
    new_model = jax.jit(lambda key, scale: with_tail(tiny_model(key, **shape), fixed.exit_layer, scale))
    assert COMBINATIONS * CASES_EACH >= 2000
    while cases < CASES_EACH:
        scale = random.choice([0.0, 0.02, 0.2, 1.0])
        model = new_model(jax.random.key(random.integers(1 << 30)), scale)
        vocabulary = model.config.vocab_size
        prompts = [random.integers(0, vocabulary, random.integers(1, 13)).tolist() for _ in range(batch)]
        limit = int(random.integers(1, 33))
        # A fixed max_length lets all requests share a compilation. It ends some rows before their limit.
        request = {"max_new_tokens": limit, "max_length": 40}
        expected = generate(model, prompts, strategy=Autoregressive(Greedy()), **request)
        if random.random() < 0.6:  # an EOS that certainly occurs
            row = expected.tokens[random.integers(batch)]
            request["eos"] = int(random.choice(row))
            expected = generate(model, prompts, strategy=Autoregressive(Greedy()), **request)
        for index, strategy in enumerate(strategies):
            result = generate(model, prompts, strategy=strategy, **request)
            assert result.tokens == expected.tokens, strategy
            drafted += result.drafted
            if index < 2 and (fixed.exit_layer == model.config.num_layers or scale == 0):
                assert result.acceptance == 1  # the draft is the full model
        cases += batch
    assert drafted > 0
    jax.clear_caches()  # these programs use thousands of memory maps, see `release_programs`


@pytest.mark.parametrize("policy", [ConfidenceStop(2, 5, 0.04), Erratic((2,), 5)], ids=["confidence", "erratic"])
@pytest.mark.parametrize("prompts", [[[1, 2]], [[1, 2, 3], [4]]], ids=["row", "rows"])
def test_one_exit_and_one_width_are_lossless_for_every_draft_length(policy, prompts):
    """`SelfSpeculative` always verifies d+1 positions. It takes a plan of no draft as a plan of one."""
    model = with_tail(tiny_model(3), 2, 0.3)
    full = generate(model, prompts, 40, Autoregressive(Greedy()))
    result = generate(model, prompts, 40, SelfSpeculative(Greedy(), policy))
    assert result.tokens == full.tokens
    assert 0 < result.acceptance < 1
    assert result.exit_rounds == {2: result.rounds}


@pytest.mark.parametrize("shape", SHAPES[1:4])
@pytest.mark.parametrize("early_exit", [False, True])
def test_autoregressive_equals_a_plain_loop_without_a_cache(shape, early_exit):
    """The oracle runs the whole sequence through the model for every token."""
    model = tiny_model(5, **shape)
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    engine_model, oracle_model = model.unstacked(), model
    if early_exit:
        engine_model = engine_model.first_layers(1)
        oracle_model = engine_model
    result = generate(engine_model, prompts, 20, Autoregressive(Greedy()))
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        known = list(prompt)
        for _ in range(20):
            padded = jnp.zeros((1, 25), int).at[0, : len(known)].set(jnp.array(known))
            known.append(int(jnp.argmax(forward(oracle_model, padded)[0, len(known) - 1])))
        assert tokens == known[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class NeverAgrees(Greedy):
    """A stub sampler whose drafts are always wrong: the token after the most likely one."""

    def propose(self, logits_BV, key):
        return (jnp.argmax(logits_BV, -1) + 1) % logits_BV.shape[-1], ()

    def agreement(self, exit_logits_BQV, logits_BQV):
        return jnp.zeros(logits_BQV.shape[:2])


def test_drafts_that_are_always_rejected_change_no_token():
    model = with_tail(tiny_model(), 2, 0.0)
    expected = generate(model, [[1, 2], [3]], 17, Autoregressive(Greedy()))
    result = generate(model, [[1, 2], [3]], 17, SelfSpeculative(NeverAgrees(), Fixed(2, 3)))
    assert result.tokens == expected.tokens
    assert (result.acceptance, result.rounds, result.tokens_per_round) == (0, 17, 1)
    assert result.accepted_histogram == [34, 0, 0, 0]


@pytest.mark.parametrize("draft_length", [1, 3, 6])
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 7, 8])
def test_drafts_that_are_always_accepted_take_the_fewest_rounds(draft_length, new_tokens):
    model = with_tail(tiny_model(), 2, 0.0)
    result = generate(model, [[1, 2]], new_tokens, SelfSpeculative(Greedy(), Fixed(2, draft_length)), max_length=40)
    assert result.rounds == -(-new_tokens // (draft_length + 1))
    assert result.new_tokens == new_tokens


@pytest.mark.parametrize("slot", range(5))
def test_eos_at_every_slot_of_a_round(slot):
    """The row ends right after an EOS that is any of the 4 drafts or the bonus token."""
    model = with_tail(tiny_model(8), 2, 0.0)
    strategy = SelfSpeculative(Greedy(), Fixed(2, 4))
    free = generate(model, [[7, 7]], 10, strategy).tokens[0]
    result = generate(model, [[7, 7]], 10, strategy, eos=free[slot])
    assert result.tokens[0] == free[: free.index(free[slot]) + 1]
    assert result.rounds == 1


def test_a_row_that_is_done_does_not_change_while_others_continue():
    model = tiny_model(2).unstacked()
    strategy = SelfSpeculative(Greedy(), Fixed(2, 3))
    alone = [generate(model, [prompt], 30, strategy).tokens[0] for prompt in ([5, 6], [1])]
    eos = alone[0][3]
    together = generate(model, [[5, 6], [1]], 30, strategy, eos=eos)
    assert together.tokens[0] == alone[0][: alone[0].index(eos) + 1]
    expected = alone[1][: alone[1].index(eos) + 1] if eos in alone[1] else alone[1]
    assert together.tokens[1] == expected


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_acceptance_is_the_agreement_of_the_exit_with_the_full_model(exit_layer):
    """A rollback that is off by one often changes no token and only lowers the acceptance, so compute it another way.

    Along the full model's text, the exit agrees or not at each position. The rounds follow from that alone.
    """
    draft_length, accepted, drafted = 4, 0, 0
    for seed in range(6):
        model = with_tail(tiny_model(seed), exit_layer, 0.3)
        result = generate(model, [[5, seed]], 50, SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length)))
        sequence = [5, seed, *result.tokens[0]]
        guesses = np.asarray(jnp.argmax(model.first_layers(exit_layer)(jnp.array([sequence]))[0], -1))
        agrees = [guesses[i] == sequence[i + 1] for i in range(1, len(sequence) - 1)]
        expected, i = np.zeros(draft_length + 1, int), 0
        while i + draft_length < len(agrees):  # leave out a round that the limit cuts short
            count = next((n for n in range(draft_length) if not agrees[i + n]), draft_length)
            expected[count] += 1
            i += count + 1
        cut_short = np.array(result.accepted_histogram) - expected
        assert (cut_short >= 0).all()
        assert cut_short.sum() <= draft_length
        accepted, drafted = accepted + result.accepted, drafted + result.drafted
    assert 0.05 < accepted / drafted < 0.95  # otherwise the test would prove little
