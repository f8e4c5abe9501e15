"""Self-speculation that chooses its exit and draft length before every round, on top of `rounds.SelfSpeculative`.

It adds candidate exits, rounds without a draft, verification at several widths, and probes, which compare every
candidate exit with the full model. All of it is one compiled program; the policy decides at run time.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache
from layerskip_jax.checks import require
from layerskip_jax.decoding.conditional import run_blocks_if, run_if
from layerskip_jax.decoding.policies import DraftPolicy, Outcome, Plan, Probe, checked_plan
from layerskip_jax.decoding.rounds import SelfSpeculative, finish_round
from layerskip_jax.decoding.sampling import Drafts, Verdict
from layerskip_jax.decoding.state import DecodeState, KVQCache
from layerskip_jax.model import Transformer
from layerskip_jax.rope import RotaryTables


@dataclasses.dataclass(frozen=True)
class AdaptiveSpeculative(SelfSpeculative):
    """Self-speculation from the exit that the policy plans, with at most as many drafts as it plans, or none."""

    def __post_init__(self) -> None:
        """Override the check of `SelfSpeculative` that the policy has a single exit."""

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        key, draft_key, verify_key = jax.random.split(state.key, 3)
        plan = checked_plan(self.policy, state.policy_state, least=0)
        cache, drafts, notes = self.draft(model, state, plan, draft_key)
        cache, verdict, probe = self.verify_narrowest(model, state, plan, cache, drafts, verify_key)
        outcome = Outcome(plan, drafts.count_B, verdict.accepted_B, probe, notes)
        policy_state = self.policy.update(state.policy_state, outcome)
        state = dataclasses.replace(state, key=key, cache=cache, policy_state=policy_state)
        return finish_round(state, drafts, verdict, plan.exit_index, jnp.any(drafts.count_B > 0))

    def early_blocks(
        self, model: Transformer, plan: Plan, rotary: RotaryTables, x_B1D: jax.Array, layers: list[LayerCache]
    ) -> tuple[list[jax.Array], list[LayerCache]]:
        """Run the blocks up to the planned exit; return the hidden state at each candidate exit, and the caches.

        Exits after the planned one repeat its hidden state, so the last entry is always the one to draft from.
        """
        queries = []
        for index, blocks in enumerate(itertools.pairwise((0, *self.exits))):
            runs = index == 0 or plan.exit_index >= index
            x_B1D, layers = run_blocks_if(runs, model, rotary, blocks, (x_B1D, layers))
            queries.append(x_B1D)
        return queries, layers

    def verify_narrowest(
        self, model: Transformer, state: DecodeState, plan: Plan, cache: KVQCache, drafts: Drafts, key: jax.Array
    ) -> tuple[KVQCache, Verdict, Probe]:
        """Verify at the narrowest compiled width that holds every row's drafts and the token before them."""
        token_B, start_B = state.last_token()
        rotary = model.rotary_tables(start_B[:, None] + jnp.arange(self.draft_length + 1)[None])

        def verify(width: int, before: tuple[KVQCache, Verdict, Probe]) -> tuple[KVQCache, Verdict, Probe]:
            cache, _, _ = before
            query_BWD, logits_BWV, layers = self.late_blocks(model, plan, rotary.first(width), token_B, cache)
            verdict = self.sampler.verify(logits_BWV, drafts.first(width - 1), key)
            probe = self.probe(model, state, verdict, query_BWD, logits_BWV)
            return dataclasses.replace(cache, layers=layers), verdict, probe

        none_B, needed = jnp.zeros_like(state.length_B), jnp.max(drafts.count_B) + 1
        result = cache, Verdict(none_B, none_B), Probe.none(len(self.exits))
        widths = checked_widths(self.policy, plan)
        for narrower, width in itertools.pairwise((0, *widths)):
            runs = (narrower < needed) & (needed <= width) if len(widths) > 1 else True
            result = run_if(runs, partial(verify, width), result)
        return result

    def late_blocks(
        self, model: Transformer, plan: Plan, rotary: RotaryTables, token_B: jax.Array, cache: KVQCache
    ) -> tuple[list[jax.Array], jax.Array, list[LayerCache]]:
        """Run the W positions of ``rotary`` through the blocks after the planned exit, from their exit queries.

        With W = 1, nothing was drafted and no block has run, so run all blocks from the embedding. Returns ``x_BWD`` at
        every candidate exit, the full model's ``logits_BWV``, and the caches. At exits up to the planned one, ``x_BWD``
        is the exit query, unless W = 1.
        """
        width, layers = rotary.index_BT.shape[1], cache.layers
        plain = width == 1
        query_BWD = [query_BQD[:, :width] for query_BQD in cache.exit_query_BQD]
        x_BWD = model.embed(token_B[:, None]) if plain else query_BWD[0]
        for index, blocks in enumerate(itertools.pairwise((0, *self.exits))):
            runs = plain or (index > 0 and plan.exit_index < index)
            x_BWD, layers = run_blocks_if(runs, model, rotary, blocks, (x_BWD, layers))
            query_BWD[index] = x_BWD = x_BWD if plain else jnp.where(runs, x_BWD, query_BWD[index])
        x_BWD, layers = model.run_cached(x_BWD, rotary, layers, self.exits[-1], model.config.num_layers)
        return query_BWD, model.unembed(x_BWD), layers

    def probe(
        self,
        model: Transformer,
        state: DecodeState,
        verdict: Verdict,
        query_BWD: Sequence[jax.Array],
        logits_BWV: jax.Array,
    ) -> Probe:
        """Compare all candidate exits with the full model, if the policy asks for it; else return `Probe.none`."""
        width = logits_BWV.shape[1]
        # Positions after the first rejected draft follow a wrong token, so they do not count.
        valid_BW = (jnp.arange(width)[None] <= verdict.accepted_B[:, None]) & ~state.done_B[:, None]

        def compare(_: Probe) -> Probe:
            agreed, reached = [], []
            for x_BWD in query_BWD:
                agrees_BW = jnp.where(valid_BW, self.sampler.agreement(model.unembed(x_BWD), logits_BWV), 0)
                all_agree_BW = jnp.cumprod(agrees_BW, axis=1)
                before_BW = jnp.pad(all_agree_BW[:, :-1], ((0, 0), (1, 0)), constant_values=1)
                agreed.append(jnp.sum(all_agree_BW))
                reached.append(jnp.sum(before_BW * valid_BW))
            return Probe(jnp.bool(True), jnp.stack(agreed), jnp.stack(reached))

        probes = self.policy.probes(state.policy_state)
        # Not `run_if`, which is a loop of at most one iteration: the logits of the exits do not depend on its carry, so
        # XLA would move their matmuls in front of the loop and run them in every round.
        nothing = Probe.none(len(self.exits))
        return nothing if probes is False else jax.lax.cond(probes, compare, lambda same: same, nothing)


def checked_widths(policy: DraftPolicy, plan: Plan) -> Sequence[int]:
    """Return the widths to compile verifications for; raises `UserError` unless they increase up to d+1.

    Width 1 is a round that drafts nothing. It is added if the plan can ask for such a round, and left out otherwise.
    """
    d, widths = policy.draft_length, tuple(policy.verify_widths)
    increasing = list(widths) == sorted(set(widths)) and widths[-1:] == (d + 1,) and widths[0] >= 1
    require(increasing, f"verify_widths must be strictly increasing up to draft_length + 1 = {d + 1}, got {widths}")
    wider = tuple(width for width in widths if width > 1)
    drafts_always = isinstance(plan.draft_length, int) and plan.draft_length > 0
    return wider if drafts_always else (1, *wider)
