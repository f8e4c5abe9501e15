"""Where the prompts of a command come from: the command line, a file, or held-out documents."""

import json

from layerskip_jax.command_line import OneLineParser, integer
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate


def add_prompt_options(parser: OneLineParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; may be given many times")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts: .jsonl with a 'prompt' each, or one a line")
    parser.add_argument(
        "--held_out", metavar="N", type=integer, help="use the beginnings of N held-out documents as prompts"
    )


def read_prompts(given: list[str] | None, file: str | None, held_out: int | None, config: Config) -> list[str]:
    """Return the prompts of the one source that was given; anything else raises `UserError`."""
    if sum(source is not None for source in (given, file, held_out)) != 1:
        raise UserError("give the prompts in one way: --prompt TEXT (once or more), --prompts FILE or --held_out N")
    if held_out is not None:
        return _held_out(config, held_out)
    prompts = given if file is None else _read_file(file)
    for number, prompt in enumerate(prompts or [], start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {number} is not Unicode text, but has {error.object[error.start]!r}") from error
    return prompts or []


def _read_file(file: str) -> list[str]:
    try:
        # At newlines alone: JSON lines may hold what `str.splitlines` takes for the end of one.
        lines = locate(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompts file {file} as UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{file} has no prompts: write one a line, or JSON lines with a 'prompt' text each")
    return [_of_json(file, *line) for line in numbered] if file.endswith(".jsonl") else [line for _, line in numbered]


def _of_json(file: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} line {number} must have a JSON object with a 'prompt' text: {said}") from error
    if not isinstance(prompt, str):
        raise UserError(f"{file} line {number} must have a text as its 'prompt', not {prompt!r:.40}")
    return prompt


def _held_out(config: Config, count: int, characters: int = 200) -> list[str]:
    """Return the beginnings of held-out documents: their prompts, so many characters, or half of a short one."""
    from layerskip_jax.data.documents import Pair
    from layerskip_jax.data.sources import open_documents

    if count < 1:
        raise UserError(f"--held_out must be at least 1, not {count}")
    prompts: list[str] = []
    documents = open_documents(config.data, config.data.validation_split, prepare=False)
    for index in range(len(documents)):
        document = documents[index]
        text = document.decode("utf-8", "replace") if isinstance(document, bytes) else document
        if not isinstance(text, str):
            raise UserError(
                "--held_out needs a source of text, and this checkpoint's corpus is of tokens: use --prompt"
            )
        prompts.append(text.prompt if isinstance(text, Pair) else text[: min(characters, len(text) // 2)])
        if len(prompts) == count:
            return prompts
    raise UserError(f"the held-out split has only {len(prompts)} documents: give --held_out {len(prompts)} or less")
