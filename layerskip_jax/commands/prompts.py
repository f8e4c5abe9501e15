"""Prompts from the command line, from a file, or from held-out documents."""

import itertools
import json
import re

from layerskip_jax.config import Config
from layerskip_jax.errors import UserError
from layerskip_jax.locations import decode_text, locate


def read_prompts(given: list[str] | None, file: str | None, held_out: int | None, config: Config) -> list[str]:
    """Return the prompts of the one source that is not None; raises `UserError` unless there is exactly one."""
    if sum(source is not None for source in (given, file, held_out)) != 1:
        raise UserError("give the prompts in one way: --prompt TEXT (once or more), --prompts FILE or --held_out N")
    if held_out is not None:
        return _held_out(config, held_out)
    prompts = (given or []) if file is None else _read_file(file)
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {number} is not Unicode text: it has {error.object[error.start]!r}") from error
    return prompts


def _read_file(file: str) -> list[str]:
    try:
        # Not `str.splitlines`: it also splits at characters such as U+2028, which JSON text may contain.
        lines = re.split(r"\r\n|[\r\n]", decode_text(locate(file).read_bytes(), f"the prompts file {file}"))
    except OSError as error:
        raise UserError(f"cannot read the prompts file {file}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} has no prompts: write one a line, or JSON lines with a 'prompt' text each")
    if file.endswith(".jsonl"):
        return [_read_json_line(file, number, line) for number, line in numbered]
    return [line for _, line in numbered]


def _read_json_line(file: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} line {number} must have a JSON object with a 'prompt' text: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(prompt, str):
        raise UserError(f"{file} line {number} must have text as its 'prompt', not {prompt!r:.40}")
    return prompt


PROMPT_CHARACTERS = 200
"""The longest prompt that ``--held_out`` takes from a text [characters]."""


def _held_out(config: Config, count: int) -> list[str]:
    """Return ``count`` prompts: the prompts of held-out pairs, or the first halves of held-out texts.

    A half is cut to `PROMPT_CHARACTERS`. If there are fewer documents than ``count``, cut each text into parts, and
    take a prompt from each part.
    """
    from layerskip_jax.data.documents import Pair, components_of
    from layerskip_jax.data.sources import open_documents
    from layerskip_jax.data.tokenizer import valid_text

    if all(data.source == "tokens" for data in config.data.components.values()):
        raise UserError("--held_out needs a corpus of text, and that of this checkpoint holds tokens: use --prompt")
    prompts: list[str] = []
    documents = open_documents(config.data, config.data.validation_split, prepare=False)
    corpora, parts = list(components_of(documents).values()), -(-count // len(documents))
    # Take a document of each corpus of a mixture in turn.
    for corpus, index in ((one, i) for i in range(max(map(len, corpora))) for one in corpora if i < len(one)):
        text = corpus[index]
        if not isinstance(text, str):  # tokens, of a mixture
            continue
        if isinstance(text, Pair):
            prompts.append(text.prompt)
        else:
            ends = [len(text) * part // parts for part in range(parts + 1)]
            spans = [(_word_start(text, start) if start else 0, end) for start, end in itertools.pairwise(ends)]
            halves = [(at, (at + end) // 2) for at, end in spans if end - at > 1 or parts == 1]
            prompts += [text[at : min(half, at + PROMPT_CHARACTERS)] for at, half in halves]
        if len(prompts) >= count:
            return [*map(valid_text, prompts[:count])]
    raise UserError(f"the held-out split gives only {len(prompts)} prompts, fewer than --held_out {count}")


def _word_start(text: str, at: int) -> int:
    found = re.compile(r"\s\S").search(text, at)
    return found.start() + 1 if found else at
