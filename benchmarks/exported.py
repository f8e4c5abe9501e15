"""Let transformers draft with an exported run: ``python -m benchmarks.exported RUN [--exit_layer 3]``.

Exports the run, opens it with transformers, and continues the beginnings of held-out documents greedily in float32 with
both libraries: ``generate(assistant_early_exit=E)`` there, self-speculation here. Prints the number of equal leading
tokens and both acceptances. Needs ``pip install layerskip_jax[huggingface] torch transformers``.
"""

import argparse
import tempfile
from typing import Any

import jax

from benchmarks.common import add_json_option, equal_tokens, header, write_json
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.commands.export import export_model
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command

try:
    import torch
    import transformers
    from transformers.generation.candidate_generator import EarlyExitCandidateGenerator
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark compares with transformers; pip install torch transformers") from None


class Counted(EarlyExitCandidateGenerator):
    """Counts drafted and accepted tokens over all generations."""

    drafted = accepted = 0

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        candidates = super().get_candidates(input_ids, **kwargs)
        Counted.drafted += candidates[0].shape[1] - input_ids.shape[1]
        return candidates

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        Counted.accepted += int(num_matches)
        super().update_candidate_strategy(input_ids, scores, num_matches)


def compare(run: str, exit_layer: int, draft_length: int, prompts: int, tokens: int) -> dict[str, Any]:
    """Return the equal leading tokens of each text and both acceptances; an exit or length of 0 means the run's own."""
    model, config, tokenizer_path = load_model(run, unstacked=True)
    exit_layer = exit_layer or resolve_exit_layer(config.decode_settings, config.model.num_layers)
    draft_length = draft_length or config.decode_settings.draft_length
    tokenizer, texts = load_tokenizer(str(tokenizer_path)), read_prompts(None, None, prompts, config)
    ids = [tokenizer.encode_prompt(text) for text in texts]
    strategy = SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length))
    ours = [generate(model, [prompt], tokens, strategy) for prompt in ids]

    with tempfile.TemporaryDirectory() as folder:
        export_model(run, f"{folder}/exported")
        auto = transformers.AutoTokenizer.from_pretrained(f"{folder}/exported")
        llama = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/exported", dtype=torch.float32).eval()
    llama.generation_config.num_assistant_tokens = draft_length
    llama.generation_config.eos_token_id = None  # no token ends the text
    transformers.generation.utils.EarlyExitCandidateGenerator = Counted
    Counted.drafted = Counted.accepted = 0
    equal = []
    for prompt, own in zip(ids, ours, strict=True):
        output = llama.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            assistant_early_exit=exit_layer,
        )
        equal.append(equal_tokens(own.tokens[0], output[0, len(prompt) :].tolist()))
    return {
        "exit_layer": exit_layer,
        "draft_length": draft_length,
        "tokens": tokens,
        "equal_tokens": equal,
        "same_prompt_ids": all(auto.encode(text) == prompt for text, prompt in zip(texts, ids, strict=True)),
        "our_acceptance": sum(g.accepted for g in ours) / sum(g.drafted for g in ours),
        "their_acceptance": Counted.accepted / Counted.drafted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("--exit_layer", type=int, nargs="+", default=[0], help="exits (default: the run's)")
    parser.add_argument("--draft_length", type=int, default=0, help="tokens drafted per round (default: the run's)")
    parser.add_argument("--prompts", type=int, default=8, help="held-out documents (default: 8)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per document (default: 128)")
    add_json_option(parser)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where torch runs
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about, rows = header("torch", "transformers"), []
    for exit_layer in args.exit_layer:
        row = compare(args.run, exit_layer, args.draft_length, args.prompts, args.tokens)
        same = sum(count == args.tokens for count in row["equal_tokens"])
        text = (
            f"exit {row['exit_layer']}, {row['draft_length']} drafts: {same} of {args.prompts} texts of {args.tokens} "
            f"tokens identical (equal leading tokens: {min(row['equal_tokens'])} or more), acceptance ours "
            f"{row['our_acceptance']:.1%}, theirs {row['their_acceptance']:.1%}; equal prompt tokens: "
            f"{row['same_prompt_ids']}"
        )
        print(text, flush=True)
        rows.append(row)
    write_json(args.json, about, rows)


if __name__ == "__main__":
    run_command(main)
