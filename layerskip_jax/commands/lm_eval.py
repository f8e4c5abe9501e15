"""``layerskip lm-eval RUN --tasks TASK [TASK ...]`` runs tasks of lm-evaluation-harness."""

import argparse
import json

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
    add_tensor_parallel,
    make_parser,
    not_negative,
    positive,
    typed,
)
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.quantization import with_weights
from layerskip_jax.errors import UserError
from layerskip_jax.sharding import tensor_parallel


def _parser() -> OneLineParser:
    parser = make_parser(
        "Run tasks of lm-evaluation-harness on a checkpoint, at any exit. Needs the extra lm-eval.", "lm-eval"
    )
    add_run(parser)
    parser.add_argument(
        "--task", "--tasks", metavar="TASK", nargs="+", action="extend", required=True, help="names of lm-eval tasks"
    )
    parser.add_argument("--include_path", metavar="DIR", help="folder with YAML files of more tasks")
    parser.add_argument(
        "--exit_layer", metavar="E", type=not_negative, default=0, help="exit to measure; 0 is the last"
    )
    parser.add_argument(
        "--shots",
        "--num_fewshot",
        metavar="N",
        type=not_negative,
        help="solved examples in a prompt (default: the task's)",
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="at most N examples of each task")
    parser.add_argument("--batch_size", metavar="N", type=positive, default=8, help="texts per batch (default: 8)")
    parser.add_argument(
        "--max_length", metavar="N", type=positive, help="context in tokens (default: the model's context length)"
    )
    parser.add_argument(
        "--add_bos_token",
        metavar="true|false",
        type=typed(bool),
        help="begin texts with BOS or not, as in lm-eval's hf class (default: as the tokenizer does)",
    )
    parser.add_argument(
        "--score_bos",
        metavar="true|false",
        type=typed(bool),
        default=True,
        help="false: leave BOS after BOS out of rolling likelihoods, unlike lm-eval's hf class (default: true)",
    )
    add_tensor_parallel(parser)
    add_json(parser, "one per task")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_known_options(argv)
    folder = open_model_folder(options.run)
    settings = decode_settings(folder, folder.config)  # before importing lm-eval, which takes a while
    with tensor_parallel(options.tensor_parallel):
        _run_tasks(options, folder, settings)


def _run_tasks(options: argparse.Namespace, folder: ModelFolder, settings: DecodeConfig) -> None:
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from layerskip_jax.evaluation.lm_eval_model import BosPolicy, LayerSkipLM
    except ImportError as error:
        raise UserError(f"{error}: pip install 'layerskip-jax[lm-eval]'") from None

    manager = TaskManager(include_path=options.include_path)
    unknown = [task for task in options.task if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-eval has no task {', '.join(unknown)}")
    config = folder.config
    max_length = options.max_length or context_length(config)
    warn_beyond_context(config, max_length, "--max_length allows")
    tokenizer = load_tokenizer(str(folder.tokenizer))
    lm = LayerSkipLM(
        with_weights(load_model(folder, unstacked=True)[0], settings.weights),
        tokenizer,
        settings,
        max_length=max_length,
        exit_layer=options.exit_layer,
        batch_size=options.batch_size,
        bos=BosPolicy(options.add_bos_token, options.score_bos),
    )
    try:
        results = evaluator.simple_evaluate(
            lm,
            tasks=options.task,
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # a dataset that cannot be downloaded or read
        raise UserError(f"lm-eval cannot read the data of its tasks: {error}") from error
    if options.json:
        for task, values in results["results"].items():
            print(json.dumps({"task": task, "exit_layer": lm.exit_layer, **values}))
    else:
        print(make_table(results))
