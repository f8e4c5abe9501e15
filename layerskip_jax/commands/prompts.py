"""Where the prompts of a command come from: the command line, a file, or held-out documents."""

import json
from pathlib import Path

from layerskip_jax.command_line import OneLineParser, integer
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError


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
    if given is not None:
        return given
    if held_out is not None:
        return _held_out(config, held_out)
    assert file is not None
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.endswith(".jsonl") else lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts file {file}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} must have a JSON object with a 'prompt' on every line: {error!r}") from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{file} has no prompts: write one a line, or JSON lines with a 'prompt' text each")
    return prompts


def _held_out(config: Config, count: int, characters: int = 200) -> list[str]:
    """Return the beginnings of held-out documents: their prompts, so many characters, or half of a short one."""
    from layerskip_jax.data.sources import Pair, open_documents

    if count < 1:
        raise UserError(f"--held_out must be at least 1, not {count}")
    prompts: list[str] = []
    documents = open_documents(config.data, config.data.validation_split)
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
