"""Verify several candidate tokens at each drafted position in one pass (tree verification).

    position        1       2    3
    first choice    main    (    args     continues the draft
    other choice    run     :    )        a leaf: only the full model's token can follow it

If the first choice is rejected at some position and another choice is right, the round emits that choice and the full
model's token after it: one token more than without other choices. On an accelerator the additional tokens cost almost
nothing, because reading the weights dominates the time of a pass.

C is the number of choices at a position. A *node* is a token of the tree. Nodes are in groups of C, one group for each
of Q = d+1 positions, so M = Q C is their number. Group i holds the choices of draft i; node i C + c is its choice c.
Group 0 holds C copies of the last known token, of which only the first is used, so that every pass of a draft has C
nodes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache, attend_cache, write_cache
from layerskip_jax.checks import require, require_positive
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.rounds import finish_round
from layerskip_jax.decoding.sampling import Drafts, Stochastic, Verdict, argmax, draw_from
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer


class BranchVerdict(NamedTuple):
    """The result of a verification, per row."""

    accepted_B: jax.Array  # drafted positions whose token is emitted, 0..d
    branch_B: jax.Array  # which choice is emitted at the last of them; the first choice (0) at those before it
    next_B: jax.Array  # the full model's own token after them


class BranchSampler(Protocol):
    """The interface between `Branching` and its samplers, which are hashable and stateless like `sampling.Sampler`."""

    def propose(self, logits_BV: jax.Array, choices: int, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return C distinct tokens ``token_BC``, and what `verify` needs. The first one continues the draft."""

    def verify(self, logits_BQCV: jax.Array, token_BdC: jax.Array, probs: Any, key: jax.Array) -> BranchVerdict:
        """Accept or reject the choices, given the full model's logits at every node.

        ``probs`` is what `propose` returned, stacked to [B, d, ...].
        """


@dataclasses.dataclass(frozen=True)
class GreedyBranches:
    """Propose the most likely tokens, and accept the one that the full model finds most likely."""

    def propose(self, logits_BV: jax.Array, choices: int, key: jax.Array) -> tuple[jax.Array, Any]:
        return jax.lax.top_k(logits_BV, choices)[1], ()

    def verify(self, logits_BQCV: jax.Array, token_BdC: jax.Array, probs: Any, key: jax.Array) -> BranchVerdict:
        full_BQC = argmax(logits_BQCV)
        right_BdC = token_BdC == full_BQC[:, :-1, :1]
        # At most one choice of a position is right, because they are different.
        branch_Bd = jnp.where(jnp.any(right_BdC, axis=2), jnp.argmax(right_BdC, axis=2), -1)
        accepted_B, branch_B = follow(branch_Bd)
        return BranchVerdict(accepted_B, branch_B, full_BQC[jnp.arange(len(accepted_B)), accepted_B, branch_B])


@dataclasses.dataclass(frozen=True)
class StochasticBranches:
    """Draw the choices from the exit's distribution without replacement, and keep the full model's distribution.

    At a position, let p be the full model's distribution and q the exit's. For each choice x in turn, accept x with
    probability ``min(1, p(x)/q(x))``. After a rejection, replace p by ``max(0, p - q)`` and q by q without x, and
    renormalize both. If all are rejected, draw from the last p. The emitted token has the distribution p: each test
    preserves it (Leviathan et al., arXiv 2211.17192, appendix A.1), because each choice is a draw from the current q
    (recursive rejection sampling without replacement: arXiv 2402.14160, algorithm 1).
    """

    sampler: Stochastic

    def propose(self, logits_BV: jax.Array, choices: int, key: jax.Array) -> tuple[jax.Array, Any]:
        q_BV = self.sampler.probabilities(logits_BV)
        # The largest sums of log q and Gumbel noise, in order, are draws without replacement (arXiv 1903.06059).
        noise_BV = jax.random.gumbel(key, q_BV.shape)
        return jax.lax.top_k(jnp.log(q_BV) + noise_BV, choices)[1], q_BV

    def verify(self, logits_BQCV: jax.Array, token_BdC: jax.Array, probs: Any, key: jax.Array) -> BranchVerdict:
        accept_key, draw_key = jax.random.split(key)
        # The first choices continue the draft, so only their nodes have the distributions to compare with.
        p_BdV, q_BdV = self.sampler.probabilities(logits_BQCV[:, :-1, 0]), probs
        branch_Bd = jnp.full(token_BdC.shape[:2], -1)
        uniform_BdC = jax.random.uniform(accept_key, token_BdC.shape)
        for branch in range(token_BdC.shape[2]):
            x_Bd1 = token_BdC[:, :, branch, None]
            p_Bd, q_Bd = (jnp.take_along_axis(one, x_Bd1, axis=2)[..., 0] for one in (p_BdV, q_BdV))
            # Top-k and top-p can leave fewer tokens than choices. The other choices have q = 0, and are not accepted.
            accepts_Bd = (uniform_BdC[:, :, branch] * q_Bd < p_Bd) & (q_Bd > 0)
            branch_Bd = jnp.where((branch_Bd < 0) & accepts_Bd, branch, branch_Bd)
            p_BdV = _normalized(jnp.maximum(p_BdV - q_BdV, 0), otherwise=p_BdV)
            q_BdV = jnp.where(jnp.arange(q_BdV.shape[2])[None, None] == x_Bd1, 0, q_BdV)
            q_BdV = _normalized(q_BdV, otherwise=q_BdV)
        accepted_B, branch_B = follow(branch_Bd)
        row_B, d = jnp.arange(len(accepted_B)), branch_Bd.shape[1]
        # After an accepted choice, and after the last draft, the next token comes from the full model's distribution.
        # If every choice was rejected, it comes from the residual distribution.
        p_BV = self.sampler.probabilities(logits_BQCV[row_B, accepted_B, branch_B])
        residual_BV = p_BdV[row_B, jnp.minimum(accepted_B, d - 1)]
        rejected_B1 = ((branch_B == 0) & (accepted_B < d))[:, None]
        return BranchVerdict(accepted_B, branch_B, draw_from(jnp.where(rejected_B1, residual_BV, p_BV), draw_key))


def _normalized(probs: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Return ``probs`` divided by their sum, or ``otherwise`` where nothing is left: their sum is 0."""
    total = jnp.sum(probs, axis=-1, keepdims=True)
    return jnp.where(total > 0, probs / jnp.where(total > 0, total, 1), otherwise)


def follow(branch_Bd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Follow the first choices while they are accepted, and then at most one other choice.

    ``branch_Bd`` is the accepted choice of each position, or -1. Returns ``accepted_B, branch_B`` of `BranchVerdict`.

    >>> [a.tolist() for a in follow(jnp.array([[0, 0, 2, 0], [0, -1, 0, 0], [0, 0, 0, 0]]))]
    [[3, 1, 4], [2, 0, 0]]
    """
    first_B = jnp.sum(jnp.cumprod(branch_Bd == 0, axis=1), axis=1)
    stop_BQ = jnp.pad(branch_Bd, ((0, 0), (0, 1)), constant_values=-1)
    branch_B = jnp.maximum(jnp.take_along_axis(stop_BQ, first_B[:, None], axis=1)[:, 0], 0)
    return first_B + (branch_B > 0), branch_B


@flax.struct.dataclass
class NodeCache:
    """The cache of one block during a round: the text's keys and values, and those of the nodes.

    The nodes are in a buffer of their own until the round knows which of them it accepts.
    """

    text: LayerCache
    start_B: jax.Array  # position of the last known token, which is node 0
    k_BKMH: jax.Array
    v_BKMH: jax.Array
    first: jax.Array  # node at which the next pass begins to write
    choices: int = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, text: LayerCache, start_B: jax.Array, nodes: int, choices: int) -> "NodeCache":
        rows, heads, _, head_dim = text.k_BKSH[0].shape
        none_BKMH = jnp.zeros((rows, heads, nodes, head_dim), text.k_BKSH[0].dtype)
        return cls(text, start_B, none_BKMH, none_BKMH, jnp.int32(0), choices)

    def attend(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array, filled: int | None = None
    ) -> tuple[jax.Array, "NodeCache"]:
        """Write the keys and values of T nodes, and compute their attention.

        A node attends to the text, to the first choices of earlier groups, and to itself. ``filled``, which
        `LayerCache.attend` needs for a prefill, has no effect.
        """
        write = lambda old_BKMH, new_BTKH: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            old_BKMH, new_BTKH.swapaxes(1, 2).astype(old_BKMH.dtype), self.first, axis=2
        )
        k_BKMH, v_BKMH = write(self.k_BKMH, k_BTKH), write(self.v_BKMH, v_BTKH)
        C, node_1M = self.choices, jnp.arange(k_BKMH.shape[2])[None]
        query_T1 = self.first + jnp.arange(q_BTNH.shape[1])[:, None]
        visible_TM = (node_1M == query_T1) | ((node_1M % C == 0) & (node_1M // C < query_T1 // C))
        visible_BTM = jnp.broadcast_to(visible_TM[None], (len(q_BTNH), *visible_TM.shape))
        before_BT = jnp.broadcast_to(self.start_B[:, None] - 1, index_BT.shape)
        out_BTNH = attend_cache(q_BTNH, self.text, before_BT, extra=(k_BKMH, v_BKMH, visible_BTM))
        return out_BTNH, dataclasses.replace(self, k_BKMH=k_BKMH, v_BKMH=v_BKMH)

    def keep(self, node_BQ: jax.Array) -> LayerCache:
        """Return the text's cache with the keys and values of the nodes ``node_BQ`` from ``start_B`` on."""
        k_BKQH, v_BKQH = (
            jnp.take_along_axis(one, node_BQ[:, None, :, None], axis=2) for one in (self.k_BKMH, self.v_BKMH)
        )
        return write_cache(self.text, k_BKQH.swapaxes(1, 2), v_BKQH.swapaxes(1, 2), self.start_B)


class Tree(NamedTuple):
    """The drafts of a round."""

    token_BdC: jax.Array
    probs: Any  # what `BranchSampler.propose` returned, stacked to [B, d, ...]
    query_BMD: jax.Array  # the hidden state of every node at the exit
    early: list[NodeCache]  # of the blocks before the exit


@dataclasses.dataclass(frozen=True)
class Branching:
    """Self-speculation from a fixed exit that verifies ``choices`` tokens at each of ``draft_length`` positions."""

    sampler: BranchSampler
    exit_layer: int
    draft_length: int
    choices: int

    def __post_init__(self) -> None:
        for name in ("exit_layer", "draft_length", "choices"):
            require_positive(name, getattr(self, name))

    @property
    def exits(self) -> Sequence[int]:
        return (self.exit_layer,)

    def init_policy_state(self, model: ModelConfig) -> Any:
        """Return an empty state, and check that the vocabulary has enough tokens for the choices."""
        require(
            self.choices <= model.vocab_size,
            f"choices {self.choices} must be at most the model's vocabulary, {model.vocab_size}",
        )
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        key, draft_key, verify_key = jax.random.split(state.key, 3)
        tree = self.draft(model, state, draft_key)
        logits_BMV, late = self.run_late_blocks(model, state, tree)
        logits_BQCV = logits_BMV.reshape(len(logits_BMV), self.draft_length + 1, self.choices, -1)
        choice = self.sampler.verify(logits_BQCV, tree.token_BdC, tree.probs, verify_key)

        position_Q = jnp.arange(self.draft_length + 1)
        branch_BQ = jnp.where(position_Q[None] == choice.accepted_B[:, None], choice.branch_B[:, None], 0)
        # This also writes the rejected nodes after the accepted ones. Later queries mask their slots.
        layers = [nodes.keep(position_Q[None] * self.choices + branch_BQ) for nodes in (*tree.early, *late)]
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=layers))
        token_Bd = jnp.take_along_axis(tree.token_BdC, branch_BQ[:, 1:, None], axis=2)[..., 0]
        drafts = Drafts(token_Bd, jnp.where(state.done_B, 0, self.draft_length), ())
        return finish_round(state, drafts, Verdict(choice.accepted_B, choice.next_B))

    def draft(self, model: Transformer, state: DecodeState, key: jax.Array) -> Tree:
        """Run d passes: each takes the choices of the previous position, and proposes from the first of them.

        The other choices run with it, because the verification needs their hidden states. A last pass, without the
        head, does this for the choices of the last position.
        """
        C, d, (start_token_B, start_B) = self.choices, self.draft_length, state.last_token()
        text = state.cache.layers[: self.exit_layer]
        empty = [NodeCache.empty(layer, start_B, (d + 1) * C, C) for layer in text]
        # The scan carries only the nodes. If it also carried the text's cache, it would have to copy or alias it.
        node_arrays = lambda early: [(nodes.k_BKMH, nodes.v_BKMH) for nodes in early]  # noqa: E731

        def run_group(slot: jax.Array, token_BC: jax.Array, nodes: Any) -> tuple[jax.Array, Any]:
            early: Any = [
                dataclasses.replace(one, k_BKMH=k, v_BKMH=v, first=slot * C)
                for one, (k, v) in zip(empty, nodes, strict=True)
            ]
            rotary = model.rotary_tables(jnp.broadcast_to((start_B + slot)[:, None], token_BC.shape))
            return model.run_cached(model.embed(token_BC), rotary, early, 0, self.exit_layer)

        def draft_position(carry: tuple[jax.Array, Any], slot: jax.Array) -> tuple[Any, Any]:
            token_BC, nodes = carry
            x_BCD, early = run_group(slot, token_BC, nodes)
            logits_BV = model.unembed(x_BCD[:, :1])[:, 0]
            token_BC, probs = self.sampler.propose(logits_BV, C, jax.random.fold_in(key, slot))
            return (token_BC, node_arrays(early)), (token_BC, probs, x_BCD)

        start = jnp.broadcast_to(start_token_B[:, None], (len(start_token_B), C)), node_arrays(empty)
        (token_BC, nodes), outputs = jax.lax.scan(draft_position, start, jnp.arange(d))
        token_BdC, probs, x_BdCD = jax.tree.map(lambda stacked: jnp.moveaxis(stacked, 0, 1), outputs)
        x_BCD, early = run_group(jnp.int32(d), token_BC, nodes)
        query_BQCD = jnp.concatenate([x_BdCD, x_BCD[:, None]], axis=1)
        return Tree(token_BdC, probs, query_BQCD.reshape(len(x_BCD), (d + 1) * C, -1), early)

    def run_late_blocks(self, model: Transformer, state: DecodeState, tree: Tree) -> tuple[jax.Array, list[NodeCache]]:
        """Run all nodes through the blocks after the exit in one pass; return ``logits_BMV`` and their caches."""
        C, M, (_, start_B) = self.choices, tree.query_BMD.shape[1], state.last_token()
        rotary = model.rotary_tables(start_B[:, None] + jnp.arange(M)[None] // C)
        late = [NodeCache.empty(layer, start_B, M, C) for layer in state.cache.layers[self.exit_layer :]]
        caches: Any = [*tree.early, *late]
        x_BMD, caches = model.run_cached(tree.query_BMD, rotary, caches, self.exit_layer, model.config.num_layers)
        return model.unembed(x_BMD), caches[self.exit_layer :]
