"""The adaptive policy: its choices and counts against hand calculations, its probes against exits that run alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config, tiny_model
from test_decoding_lossless import NeverAgrees, with_tail

from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive, Counts, DraftNotes
from layerskip_jax.decoding.cost import head_share, round_cost
from layerskip_jax.decoding.engine import begin, generate, run_rounds
from layerskip_jax.decoding.policies import Outcome, Plan, Probe
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import UserError


def test_adaptive_chooses_by_the_formulas():
    """The rate r, the acceptances and the least chance, by hand for two exits and up to three drafts."""
    policy = Adaptive((1, 2), 3)
    costs = jnp.array([[1.0, 1.2, 1.4, 1.6], [1.0, 1.4, 1.8, 2.2]])
    agreed_XK, reached_XK = jnp.array([[0, 0, 0, 9], [0, 2, 6, 90]]), jnp.array([[8, 8, 8, 8], [4, 4, 8, 92]])
    choice = policy.choose(Counts(jnp.array([15, 98]), jnp.array([31, 108]), agreed_XK, reached_XK), costs)
    a, b = (15 + 2 * 0.8) / 33, (98 + 2 * 0.8) / 110  # 0.503 and 0.905
    best = (1 + b + b**2 + b**3) / 2.2
    assert best > (1 + a + a**2) / 1.4 > (1 + a) / 1.2  # 1.58, 1.255, 1.252
    assert (int(choice.plan.exit_index), int(choice.plan.draft_length)) == (1, 3)
    np.testing.assert_allclose(
        choice.acceptance_K, [2 * b / 6, (2 + 2 * b) / 6, (6 + 2 * b) / 10, (90 + 2 * b) / 94], 1e-6
    )
    np.testing.assert_allclose(choice.least_chance_Q[1:], [best * 0.4 / b] * 2 + [np.inf], 1e-5)

    # The best rate of the first exit has two drafts, but a round may draft up to three.
    choice = policy.choose(Counts(jnp.array([15, 0]), jnp.array([31, 50]), agreed_XK, reached_XK), costs)
    assert (int(choice.plan.exit_index), int(choice.plan.draft_length)) == (0, 3)
    np.testing.assert_allclose(choice.least_chance_Q[1:], [(1 + a + a**2) / 1.4 * 0.2 / a] * 2 + [np.inf], 1e-5)

    # A second draft alone does not pay as soon as a second and a third together.
    steps = jnp.array([[1.0, 1.2, 1.7, 1.7], [1.0, 9.0, 9.0, 9.0]])
    choice = policy.choose(Counts(jnp.array([15, 0]), jnp.array([31, 50]), agreed_XK, reached_XK), steps)
    rate = max((1 + a) / 1.2, (1 + a + a**2 + a**3) / 1.7)
    np.testing.assert_allclose(
        choice.least_chance_Q, rate * np.array([0.2 / a, 0.5 / (a + a**2), 0, np.inf / rate]), 1e-5
    )

    nothing = policy.choose(Counts(jnp.zeros(2), jnp.full(2, 99), agreed_XK, reached_XK), costs)
    assert int(nothing.plan.draft_length) == 0


def test_adaptive_pays_for_the_width_that_a_round_runs():
    """Rounds with 5 and 6 drafts run the width 7, and so have the overhead of 6 drafts."""
    overhead = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    policy, config = Adaptive((1,), 8, overhead=overhead), tiny_config()
    assert hash(policy) == hash(Adaptive((1,), 8, overhead=tuple(overhead)))
    expected = [round_cost(config, 1, n) + (0.1 * n if n < 5 else 0.6 if n < 7 else 0.8) for n in range(9)]
    np.testing.assert_allclose(policy.init_state(config).cost_XQ[0], expected, rtol=1e-6)


def test_adaptive_drafts_until_another_draft_does_not_pay():
    """The rows stop together, when the mean over the active ones falls below the least chance."""
    policy = Adaptive((1,), 6)
    state = policy.init_state(tiny_config())
    choice = state.decision._replace(acceptance_K=jnp.array([0.5, 0.6, 0.8, 0.95]), least_chance_Q=jnp.full(7, 0.5))
    state, notes = state._replace(decision=choice), policy.init_notes(jnp.array([True, True, False]))
    drafts = [  # probabilities at the exit, bins, chances, and whether the mean of the first two is at least 0.5
        ((0.9, 0.1, 0.1), (3, 0, 0), (0.95, 0.5, 0.5), True),
        ((0.51, 0.26, 0.49), (3, 2, 2), (0.95**2, 0.4, 0.4), True),
        ((0.24, 0.126, 0.124), (1, 1, 0), (0.95**2 * 0.6, 0.24, 0.2), False),
        ((1.0, 0.6, 0.26), (3, 3, 2), (0.95**3 * 0.6, 0.24 * 0.95, 0.16), False),
    ]
    for slot, (p_B, bin_B, chance_B, keeps) in enumerate(drafts):
        rest_B = 1 - np.array(p_B)
        with np.errstate(divide="ignore"):
            logits_BV = 3 + np.log(np.stack([p_B, 0.75 * rest_B, 0.25 * rest_B], axis=1))
        keep_B, notes = policy.keep_drafting(state, notes, jnp.zeros(3, jnp.int32), jnp.asarray(logits_BV))
        np.testing.assert_allclose(notes.chance_B, np.array(chance_B) * [0.5, 0.5, 0], rtol=1e-5)
        assert notes.bin_Bd[:, slot].tolist() == list(bin_B)
        assert keep_B.tolist() == [keeps] * 3


def test_adaptive_updates_its_counts():
    policy, config = Adaptive((1, 2), 3, probe_share=0.02, horizon=1e9), tiny_config()
    none, first = jnp.zeros(2), policy.init_state(config)
    assert policy.probes(first)
    # Rows: 2 of 3 drafts accepted; both drafts accepted; already done.
    outcome = Outcome(
        Plan(jnp.int32(1), jnp.int32(3)),
        drafted_B=jnp.array([3, 2, 0]),
        accepted_B=jnp.array([2, 2, 0]),
        probe=Probe.none(2),
        notes=DraftNotes(jnp.int32(3), jnp.ones(3), jnp.array([[3, 1, 0], [3, 3, 2], [2, 2, 2]])),
    )
    state = policy.update(first, outcome)
    assert state.counts.agreed_XK.tolist() == [[0, 0, 0, 0], [0, 1, 0, 3]]
    assert state.counts.reached_XK.tolist() == [[0, 0, 0, 0], [1, 1, 0, 3]]
    assert (state.counts.agreed_X.tolist(), state.counts.reached_X.tolist()) == ([0, 4], [0, 5])
    state = policy.update(state, outcome._replace(probe=Probe(jnp.bool(True), none + 1, none + 2)))
    np.testing.assert_allclose(state.counts.agreed_X, [1, 5], rtol=1e-5)
    np.testing.assert_allclose(state.counts.reached_X, [2, 7], rtol=1e-5)
    assert state.counts.reached_XK[1].tolist() == [2, 2, 0, 6]  # a probe replaces only the sums over all bins
    assert state.spent == pytest.approx(round_cost(config, 2, 3))  # the round of the probe itself
    assert not policy.probes(state)
    again = policy.choose(state.counts, state.cost_XQ)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.decision, again))
    plain = outcome._replace(plan=Plan(jnp.int32(0), jnp.int32(0)), drafted_B=jnp.zeros(3, jnp.int32))
    after = policy.update(state, plain)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after, state._replace(spent=state.spent + 1)))


def test_adaptive_forgets_with_its_horizon():
    policy = Adaptive((1,), 2, horizon=10.0)
    none_Bd = jnp.zeros((1, 2), jnp.int32)
    right = Outcome(
        Plan(jnp.int32(0), jnp.int32(2)),
        jnp.array([2]),
        jnp.array([2]),
        Probe.none(1),
        DraftNotes(jnp.int32(2), jnp.ones(1), none_Bd),
    )
    state = policy.init_state(tiny_config())
    for _ in range(100):
        state = policy.update(state, right)
    np.testing.assert_allclose(state.counts.reached_X, 2 / (1 - np.exp(-0.2)), rtol=1e-4)  # a geometric series
    np.testing.assert_allclose(state.counts.reached_XK[0], [state.counts.reached_X[0], 0, 0, 0], rtol=1e-4)


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
        used, before = int(policy.plan(state.policy_state).exit_index), int(state.statistics.drafted_X.sum())
        state = run_rounds(strategy, model, state, jnp.int32(rounds))
        spent += round_cost(config, policy.exits[used], int(state.statistics.drafted_X.sum()) - before)
    assert probes * 2 * head_share(config) / spent == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_single_candidate_is_probed_only_in_rounds_without_a_draft(drafts):
    policy = Adaptive((1,), 4)
    due = policy.init_state(tiny_config())._replace(spent=jnp.float32(1e9))
    planned = due._replace(decision=due.decision._replace(plan=Plan(jnp.int32(0), jnp.int32(drafts))))
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
    """Probes in every round and discounts nothing, so its counts are the sum of all probes. Always drafts d tokens."""

    horizon: float = 1e9

    def keep_drafting(self, policy_state, notes, token_B, logits_BV):
        return jnp.ones_like(token_B, bool), notes

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
    agreed, reached = np.zeros(3), np.zeros(3)
    for row, exit_layer in enumerate(exits):
        # The whole buffer has one shape; what comes after the text changes nothing before it.
        guesses = np.asarray(jnp.argmax(model.first_layers(exit_layer)(state.tokens_BS)[0], -1))
        for before, after in itertools.pairwise(lengths):
            for position in range(before, after):
                reached[row] += 1
                if guesses[position - 1] != sequence[position]:
                    break
                agreed[row] += 1
    np.testing.assert_allclose(state.policy_state[0].counts.agreed_X, agreed, rtol=1e-5)
    np.testing.assert_allclose(state.policy_state[0].counts.reached_X, reached, rtol=1e-5)


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
