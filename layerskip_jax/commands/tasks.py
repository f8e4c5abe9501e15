"""Score what a model writes: ``python -m layerskip_jax tasks RUN --task NAME=FILE``."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from layerskip_jax.checkpoint.reading import context_length, home, load_model, swept_settings
from layerskip_jax.command_line import add_settings, apply_overrides, given_settings, integer, make_parser, run_file
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.decoding.text import Completion, TextGenerator
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.evaluation.examples import Example, read_file, read_tfds, require_fields
from layerskip_jax.evaluation.tasks import TASKS, Task
from layerskip_jax.model import Transformer


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's scores, means over its examples, and how the text was made; NaN where nothing was drafted."""

    examples: int
    scores: Mapping[str, float]
    shortened: int  # prompts of which something was left out so that they fit
    new_tokens: int
    tokens_per_second: float  # of the rounds, without prefill and compilation
    acceptance: float


@dataclasses.dataclass(frozen=True)
class Answered:
    """One example's text and its scores."""

    completion: Completion
    wanted: str
    scores: Mapping[str, float]


def run_task(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: list[Example],
    shots: list[Example],
    settings: DecodeConfig,
    *,
    prompt_tokens: int,
    batch_size: int = 1,
) -> tuple[TaskResult, list[Answered]]:
    """Answer ``examples`` as ``settings`` say, at any exit and in any mode, and score the answers.

    ``model`` is an `unstacked` one; prompts are cut to ``prompt_tokens``; stop strings and the number of new tokens
    are the task's. Raises `UserError` for an example without a field that the task names.
    """
    for example in (*shots, *examples):
        require_fields(example, task.fields, "the task")
    settings = dataclasses.replace(settings, stop=task.stop, max_new_tokens=task.max_new_tokens)
    generator = TextGenerator(model, tokenizer, settings)

    def fits(text: str) -> bool:
        return len(generator.encode(text)) <= prompt_tokens

    prompts = [task.prompt_for(example, shots, fits) for example in examples]
    starts = range(0, len(prompts), batch_size)
    answers = [
        generator.generate([text for text, _ in prompts[start : start + batch_size]], first=start)
        for start in tqdm(starts, desc="answers", leave=False)
    ]
    answered = []
    for example, completion in zip(examples, (c for a in answers for c in a.completions), strict=True):
        wanted = task.wanted(example)
        scores = {name: score(example, wanted, completion.text) for name, score in task.scores.items()}
        answered.append(Answered(completion, wanted, scores))
    parts = [answer.generation for answer in answers]
    drafted, new_tokens = sum(part.drafted for part in parts), sum(part.new_tokens for part in parts)
    result = TaskResult(
        examples=len(examples),
        scores={name: statistics.fmean(a.scores[name] for a in answered) for name in task.scores},
        shortened=sum(cut for _, cut in prompts),
        new_tokens=sum(len(a.completion.tokens) for a in answered),
        tokens_per_second=new_tokens / sum(part.seconds for part in parts),
        acceptance=sum(part.accepted for part in parts) / drafted if drafted else math.nan,
    )
    return result, answered


def find_task(name: str) -> Task:
    """Return a task of `TASKS` by name, or the ``get_task()`` of a Python file."""
    if name.endswith(".py"):
        return run_file(name, "get_task", Task)
    if name not in TASKS:
        raise UserError(f"no task {name!r}{nearest(name, TASKS)} ({', '.join(TASKS)}, or a Python file)")
    return TASKS[name]


def read_examples(task: Task, file: str, data_dir: str, limit: int | None) -> tuple[list[Example], list[Example]]:
    """Return a task's examples and its solved ones: of a file, the first ``shots`` are solved, and not asked."""
    if file:
        examples = read_file(file, None if limit is None else task.shots + limit)
        if len(examples) <= task.shots:
            raise UserError(f"{file} has {len(examples)} examples, and the task shows {task.shots} and asks the rest")
        return examples[task.shots :], examples[: task.shots]
    if not task.tfds:
        raise UserError(
            f"this task has no TFDS dataset: give --task NAME=FILE, with the fields {', '.join(task.fields)}"
        )
    shots = read_tfds(task.tfds, data_dir, task.shots_split, task.shots) if task.shots else []
    return read_tfds(task.tfds, data_dir, task.split, limit), shots


def _room(sequence_length: int, new_tokens: int) -> int:
    """Return how long a prompt may be so that its answer stays within what was trained on: half of that at least."""
    return max(sequence_length - new_tokens, sequence_length // 2)


def table(results: dict[str, TaskResult]) -> str:
    """Lay results out, a line a task."""
    lines = [f"{'task':<16}{'examples':>9}{'tokens/s':>10}{'acceptance':>12}  scores"]
    for name, result in results.items():
        scores = "  ".join(f"{score} {value:.3f}" for score, value in result.scores.items())
        accepted = "-" if math.isnan(result.acceptance) else f"{result.acceptance:.1%}"
        cut = f"  ({result.shortened} prompts shortened)" if result.shortened else ""
        lines.append(f"{name:<16}{result.examples:>9}{result.tokens_per_second:>10.0f}{accepted:>12}  {scores}{cut}")
    return "\n".join(lines)


def _as_json(result: TaskResult, task: str, settings: DecodeConfig) -> dict[str, Any]:
    way = {name: getattr(settings, name) for name in ("mode", "policy", "exit_layer", "draft_length")}
    values = {"task": task, **way, **dataclasses.asdict(result)}
    return {name: value for name, value in values.items() if not (isinstance(value, float) and math.isnan(value))}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Generate the answers of tasks with a checkpoint, in any mode and at any exit, and score them."
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.add_argument(
        "--task",
        metavar="NAME[=FILE]",
        action="append",
        required=True,
        help=f"{', '.join(TASKS)}, or a Python file with get_task(); examples from a .jsonl, .csv or .tsv file, "
        "else from the task's TFDS dataset; may be given many times",
    )
    parser.add_argument("--data_dir", metavar="DIR", default="data", help="where prepared TFDS datasets live")
    parser.add_argument("--limit", metavar="N", type=integer, help="examples of a task, at most")
    parser.add_argument("--shots", metavar="N", type=integer, help="solved examples in a prompt (default: the task's)")
    parser.add_argument("--batch_size", metavar="N", type=integer, default=1, help="prompts generated together")
    parser.add_argument(
        "--prompt_tokens",
        metavar="N",
        type=integer,
        help="prompts are cut to this (default: what answers leave of the model's context length)",
    )
    parser.add_argument("--run_code", action="store_true", help="run generated code, apart and limited, for pass@1")
    parser.add_argument("--answers", action="store_true", help="with --json: print a line an answer too")
    parser.add_argument("--json", action="store_true", help="print one JSON line a task instead of the table")
    add_settings(parser, DecodeConfig())
    options = parser.parse_known_options(argv)
    given = given_settings(options, DecodeConfig)
    for name in ("limit", "batch_size", "prompt_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")

    home(options.run)  # before examples are read, so that a mistake is said at once
    asked = []
    for word in options.task:
        name, _, file = word.partition("=")
        task = find_task(name)
        changes = {"shots": options.shots, "max_new_tokens": getattr(options, "max_new_tokens", None)}
        task = dataclasses.replace(task, **{key: value for key, value in changes.items() if value is not None})
        if options.run_code:
            task = dataclasses.replace(task, scores={**task.scores, **task.code_scores})
        asked.append((name, task, *read_examples(task, file, options.data_dir, options.limit)))

    model, config, tokenizer_path = load_model(options.run)
    settings = apply_overrides(config.decode, swept_settings(options.run, given) | given)
    tokenizer = load_tokenizer(str(tokenizer_path))
    model = with_weights(model.unstacked(), settings.weights)
    results = {}
    for name, task, examples, shots in asked:
        results[name], answered = run_task(
            model,
            tokenizer,
            task,
            examples,
            shots,
            settings,
            prompt_tokens=options.prompt_tokens or _room(context_length(config), task.max_new_tokens),
            batch_size=options.batch_size,
        )
        if options.json:
            for answer in answered if options.answers else []:
                print(json.dumps({"task": name} | dataclasses.asdict(answer)))
            print(json.dumps(_as_json(results[name], name, settings)))
    if not options.json:
        print(table(results))
