"""A draft policy that drafts one token more after a round in which every row accepted all, and half as many otherwise.

``python examples/draft_policy.py --checkpoint runs/quickstart --prompt "def "``
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.command_line import make_parser
from layerskip_jax.config import ModelConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed, Outcome, Plan, spaced_widths
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command


@dataclasses.dataclass(frozen=True)
class Careful(Fixed):
    """The policy state is the next round's number of drafts, from 1 to ``draft_length``."""

    @property
    def verify_widths(self) -> Sequence[int]:
        return spaced_widths(self.draft_length)

    def init_state(self, model: ModelConfig) -> Any:
        return jnp.int32(1)

    def plan(self, policy_state: Any) -> Plan:
        return Plan(0, policy_state)

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        all_accepted = jnp.all(outcome.accepted_B == outcome.drafted_B)
        return jnp.clip(jnp.where(all_accepted, policy_state + 1, policy_state // 2), 1, self.draft_length)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Generate with a custom draft policy.")
    parser.add_argument("--checkpoint", metavar="RUN", required=True, help="run folder")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="text to continue")
    options = parser.parse_known_options(argv)
    model, config, tokenizer_path = load_model(options.checkpoint, unstacked=True)
    tokenizer = load_tokenizer(str(tokenizer_path))
    policy = Careful(resolve_exit_layer(config.decode_settings, config.model.num_layers), draft_length=4)
    # `AdaptiveSpeculative` verifies n+1 positions after n drafts; `SelfSpeculative` would verify d+1.
    ends, prompt = tokenizer.end_tokens(model.config.vocab_size), tokenizer.encode_prompt(options.prompt)
    result = generate(model, [prompt], config.decode.max_new_tokens, AdaptiveSpeculative(Greedy(), policy), eos=ends)
    print(options.prompt + tokenizer.decode(result.tokens[0]))
    print(f"acceptance {result.acceptance:.1%}, {result.tokens_per_round:.2f} tokens per round")


if __name__ == "__main__":
    run_command(main)
