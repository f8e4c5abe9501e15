"""The ``README.md`` of an exported model: what it is, how it was trained, each exit's quality, and how to run it."""

from dataclasses import dataclass

from layerskip_jax.config import Config
from layerskip_jax.config_dict import changed_settings

CARD = "README.md"

PRIVATE = {"run_dir", "path", "mixture", "data_dir", "tokenizer", "init_from", "sample_prompt", "wandb_project"}
"""Settings with paths or text of the machine that trained, which a public card must not show."""

FRONT_MATTER = """---
# license: fill in the license under which you publish these weights
library_name: transformers
pipeline_tag: text-generation
tags:
- layerskip
- early-exit
- speculative-decoding
---
"""


@dataclass(frozen=True)
class ExitTable:
    """Held-out loss [nats/token] and agreement with the last exit, by exit from 1; empty where they are not known."""

    loss: dict[int, float]
    agreement: dict[int, float]

    def rows(self, draft_exit: int) -> str:
        lines = ["| exit | held-out loss | same next token as the last exit |", "|---|---|---|"]
        for exit_layer, loss in self.loss.items():
            agreed = f"{self.agreement[exit_layer]:.1%}" if exit_layer in self.agreement else ""
            mark = " (drafts)" if exit_layer == draft_exit else ""
            lines.append(f"| {exit_layer}{mark} | {loss:.3f} | {agreed} |")
        return "\n".join(lines)


def model_card(
    name: str, config: Config, steps: int | None, exits: ExitTable, draft_exit: int, draft_length: int
) -> str:
    """Return the card of the exported folder ``name``; ``steps`` is None for a model that was not trained here."""
    model = config.model
    trained = steps is not None and config.early_exit.curriculum != "none"
    sections = [
        f"{FRONT_MATTER}\n# {name}",
        "A language model whose early layers can predict tokens, so that it can draft with its first layers and verify "
        "with all of them: LayerSkip ([arXiv 2404.16710](https://arxiv.org/abs/2404.16710)), trained and exported with "
        "layerskip_jax."
        if trained
        else "Exported with layerskip_jax.",
        f"A Llama of {model.num_layers} layers, width {model.dim}, {model.num_heads} heads ({model.num_kv_heads} for "
        f"keys and values), feed-forward width {model.ffn_dim}, {model.vocab_size} tokens in the vocabulary.",
    ]
    if steps is not None:
        sequences = config.train.batch_size
        sections.append(
            f"## Training\n\n{steps} steps of {sequences} sequences of {config.data.sequence_length} tokens. Settings "
            f"that differ from the defaults:\n\n```text\n{_changed_settings(config)}\n```"
        )
    if exits.loss:
        sections.append(f"## Exits\n\nLoss in nats per token, on held-out text.\n\n{exits.rows(draft_exit)}")
    sections.append(_usage(name, draft_exit, draft_length))
    return "\n\n".join(sections) + "\n"


def _changed_settings(config: Config) -> str:
    return "\n".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, (_, value) in changed_settings(config).items()
        if name.split(".")[1] not in PRIVATE and not name.startswith("mesh.")
    )


def _usage(name: str, draft_exit: int, draft_length: int) -> str:
    return f"""## Use

transformers drafts with the first {draft_exit} layers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, assistant_early_exit={draft_exit})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

With layerskip_jax (`pip install "layerskip-jax[huggingface]"`):

```bash
layerskip decode {name} --prompt "Once upon a time" --exit_layer {draft_exit} --draft_length {draft_length}
```"""
