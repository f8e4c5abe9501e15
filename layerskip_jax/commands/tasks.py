"""``layerskip tasks RUN --task NAME=FILE`` generates and scores the answers of tasks."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from layerskip_jax.checkpoint.reading import (
    ModelFolder,
    context_length,
    load_model,
    open_model_folder,
    warn_beyond_context,
)
from layerskip_jax.checkpoint.swept import decode_settings
from layerskip_jax.command_line import (
    OneLineParser,
    add_json,
    add_run,
    add_settings,
    add_tensor_parallel,
    given_settings,
    make_parser,
    not_negative,
    positive,
    run_file,
)
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.configure import check_exits, resolve_exit_layer
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.text import Completion, TextGenerator, encode
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.evaluation.examples import TaskExamples, read_file, read_tfds
from layerskip_jax.evaluation.tasks import TASKS, Task
from layerskip_jax.model import Transformer
from layerskip_jax.sharding import tensor_parallel

SETTINGS = {field.name for field in dataclasses.fields(DecodeConfig)} - {"stop", "stream_every"}
"""The `DecodeConfig` settings that have an option here: all but ``stop``, which the task sets, and streaming."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The mean scores of a task, and the speed of generation; ``acceptance`` is NaN if nothing was drafted."""

    examples: int
    scores: Mapping[str, float]
    shortened: int  # prompts that were cut to fit
    longest: int  # tokens of the longest prompt with its answer
    new_tokens: int
    tokens_per_second: float  # of the rounds alone, without prefill and compilation
    acceptance: float


@dataclasses.dataclass(frozen=True)
class Answered:
    """The generated answer to one example, and its scores."""

    completion: Completion
    wanted: str
    scores: Mapping[str, float]


def run_task(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: TaskExamples,
    settings: DecodeConfig,
    *,
    prompt_tokens: int,
    batch_size: int = 1,
) -> tuple[TaskResult, list[Answered]]:
    """Generate answers with ``settings`` and score them.

    ``model`` is unstacked (`Transformer.unstacked`). Prompts are cut to ``prompt_tokens``. The task sets stop strings
    and the number of new tokens. Raises `UserError` for an example without a text in a field of the task.
    """
    for example, field in itertools.product((*examples.shots, *examples.asked), task.fields):
        _ = example[field]  # raises now, not after the other answers were generated
    for score in task.scores.values():
        score(examples.asked[0], task.wanted(examples.asked[0]), "")  # raises now if its library is missing
    settings = dataclasses.replace(settings, stop=task.stop, max_new_tokens=task.max_new_tokens)

    @functools.cache
    def length(text: str) -> int:
        return len(encode(tokenizer, settings, text))

    fits = lambda text: length(text) <= prompt_tokens  # noqa: E731
    prompts = [task.prompt_for(example, examples.shots, fits) for example in examples.asked]
    generator = TextGenerator(model, tokenizer, settings, max(length(text) for text, _ in prompts))
    starts = range(0, len(prompts), batch_size)
    answers = [
        generator.generate([text for text, _ in prompts[start : start + batch_size]], first=start)
        for start in tqdm(starts, desc="answers", leave=False)
    ]
    answered = []
    for example, completion in zip(examples.asked, (c for a in answers for c in a.completions), strict=True):
        wanted = task.wanted(example)
        scores = {name: score(example, wanted, completion.text) for name, score in task.scores.items()}
        answered.append(Answered(completion, wanted, scores))
    one = Generation.total([answer.generation for answer in answers])
    result = TaskResult(
        examples=len(examples.asked),
        scores={name: statistics.fmean(a.scores[name] for a in answered) for name in task.scores},
        shortened=sum(cut for _, cut in prompts),
        longest=max(length(a.completion.prompt) + len(a.completion.tokens) for a in answered),
        new_tokens=sum(len(a.completion.tokens) for a in answered),
        tokens_per_second=one.tokens_per_second,
        acceptance=one.acceptance,
    )
    return result, answered


def find_task(name: str) -> Task:
    """Return the task of `TASKS` with this name, or what ``get_task()`` of this Python file returns."""
    if name.endswith(".py"):
        return run_file(name, "get_task", Task, "task")
    if name not in TASKS:
        raise UserError(f"no task {name!r}{nearest(name, TASKS)} ({', '.join(TASKS)}, or a Python file)")
    return TASKS[name]


def read_examples(task: Task, file: str, data_dir: str, limit: int | None) -> TaskExamples:
    """Read examples from ``file``, else from TFDS. The first ``task.shots`` examples of a file are the solved ones."""
    if file:
        examples = read_file(file, None if limit is None else task.shots + limit)
        if len(examples) <= task.shots:
            raise UserError(f"{file} has {len(examples)} examples, but the task needs more than its {task.shots} shots")
        return TaskExamples(examples[task.shots :], examples[: task.shots])
    if not task.tfds:
        raise UserError(
            f"this task has no TFDS dataset: give --task NAME=FILE, with the fields {', '.join(task.fields)}"
        )
    shots = read_tfds(task.tfds, data_dir, task.shots_split, task.shots) if task.shots else []
    return TaskExamples(read_tfds(task.tfds, data_dir, task.split, limit), shots)


def _prompt_room(context: int, new_tokens: int) -> int:
    """Return the longest prompt [tokens]: ``context`` minus the new tokens, but at least half of ``context``.

    If an answer takes more than half, prompt and answer together may exceed the context.
    """
    return max(context - new_tokens, context // 2)


def table(results: dict[str, TaskResult]) -> str:
    """Return the results as text, a line per task."""
    lines = [f"{'task':<16}{'examples':>9}{'tokens/s':>10}{'acceptance':>12}  scores"]
    for name, result in results.items():
        scores = "  ".join(f"{score} {value:.3f}" for score, value in result.scores.items())
        accepted = "-" if math.isnan(result.acceptance) else f"{result.acceptance:.1%}"
        cut = f"  ({result.shortened} prompts shortened)" if result.shortened else ""
        lines.append(f"{name:<16}{result.examples:>9}{result.tokens_per_second:>10.0f}{accepted:>12}  {scores}{cut}")
    return "\n".join(lines)


def _as_json(result: TaskResult, task: str, settings: DecodeConfig) -> dict[str, Any]:
    mode = {name: getattr(settings, name) for name in ("mode", "policy", "exit_layer", "draft_length")}
    values = {"task": task, **mode, **dataclasses.asdict(result)}
    return {name: value for name, value in values.items() if not (isinstance(value, float) and math.isnan(value))}


def _parser() -> OneLineParser:
    parser = make_parser(
        "Generate and score the answers of tasks, in any mode and at any exit. The default settings are those of the "
        "run's config, with those that layerskip sweep stored on top.",
        "tasks",
    )
    add_run(parser)
    parser.add_argument(
        "--task",
        metavar="NAME[=FILE]",
        action="append",
        required=True,
        help=f"{', '.join(TASKS)}, or a Python file with get_task(); FILE (.jsonl, .csv or .tsv) replaces the TFDS "
        "dataset of the task; may be given several times",
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", default="data", help="folder of prepared TFDS datasets (default: data)"
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="at most N examples of each task")
    parser.add_argument(
        "--shots", metavar="N", type=not_negative, help="solved examples in a prompt (default: the task's)"
    )
    parser.add_argument("--batch_size", metavar="N", type=positive, default=1, help="prompts per batch (default: 1)")
    parser.add_argument(
        "--prompt_tokens",
        metavar="N",
        type=positive,
        help="cut prompts to N tokens (default: the model's context length minus the new tokens)",
    )
    add_tensor_parallel(parser)
    parser.add_argument("--run_code", action="store_true", help="run generated code in a sandbox, for pass@1")
    parser.add_argument("--answers", action="store_true", help="with --json: also print one line per answer")
    add_json(parser, "one per task")
    add_settings(parser, DecodeConfig(), names=SETTINGS)
    return parser


def _read_tasks(options: argparse.Namespace) -> list[tuple[str, Task, TaskExamples]]:
    """Return name, task and examples of every ``--task``, with the overrides of the command line.

    The name of a task that is given several times includes its file.
    """
    changes = {"shots": options.shots, "max_new_tokens": getattr(options, "max_new_tokens", None)}
    changes = {name: value for name, value in changes.items() if value is not None}
    tasks = []
    names = [word.partition("=")[0] for word in options.task]
    for word in options.task:
        name, _, file = word.partition("=")
        task = dataclasses.replace(find_task(name), **changes)
        if options.run_code:
            task = dataclasses.replace(task, scores={**task.scores, **task.code_scores})
        label = word if names.count(name) > 1 else name
        tasks.append((label, task, read_examples(task, file, options.data_dir, options.limit)))
    if options.answers and not options.json:
        raise UserError("--answers prints JSON lines: add --json")
    if options.run_code and not any(task.code_scores for _, task, _ in tasks):
        raise UserError("--run_code has no effect: none of these tasks has a score that runs code, as humaneval has")
    return tasks


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_known_options(argv)
    given = given_settings(options, DecodeConfig)
    folder = open_model_folder(options.run)
    settings = decode_settings(folder, folder.config, given)
    check_exits(settings, folder.config.model.num_layers)
    settings = dataclasses.replace(settings, exit_layer=resolve_exit_layer(settings, folder.config.model.num_layers))
    with tensor_parallel(options.tensor_parallel):
        _run_tasks(options, folder, settings, _read_tasks(options))


def _run_tasks(
    options: argparse.Namespace,
    folder: ModelFolder,
    settings: DecodeConfig,
    tasks: Sequence[tuple[str, Task, TaskExamples]],
) -> None:
    config, tokenizer = folder.config, load_tokenizer(str(folder.tokenizer))
    model = with_weights(load_model(folder, unstacked=True)[0], settings.weights)
    results: dict[str, TaskResult] = {}
    try:
        for name, task, examples in tasks:
            results[name], answered = run_task(
                model,
                tokenizer,
                task,
                examples,
                settings,
                prompt_tokens=options.prompt_tokens or _prompt_room(context_length(config), task.max_new_tokens),
                batch_size=options.batch_size,
            )
            warn_beyond_context(config, results[name].longest, f"{name}: the longest prompt and answer have")
            if options.json:
                for answer in answered if options.answers else []:
                    print(json.dumps({"task": name} | dataclasses.asdict(answer)))
                print(json.dumps(_as_json(results[name], name, settings)))
    finally:  # if a later task fails, print the results of the earlier ones
        if results and not options.json:
            print(table(results))
