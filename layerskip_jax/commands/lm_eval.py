"""Tasks of lm-eval-harness: ``python -m layerskip_jax lm-eval RUN --tasks TASK [TASK ...]``."""

import json

from layerskip_jax.checkpoint.reading import context_length, home, load_model
from layerskip_jax.command_line import integer, make_parser
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Run tasks of lm-eval-harness on a checkpoint, at any exit. Needs the extra lm_eval.")
    parser.add_argument("run", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", required=True, help="names of lm-eval tasks")
    parser.add_argument("--include_path", metavar="DIR", help="folder with yaml files of tasks of your own")
    parser.add_argument(
        "--exit_layer", metavar="E", type=integer, default=0, help="exit to measure (default: the last)"
    )
    parser.add_argument("--num_fewshot", metavar="N", type=integer, help="solved examples (default: the task's)")
    parser.add_argument("--limit", metavar="N", type=integer, help="examples of a task, at most")
    parser.add_argument("--batch_size", metavar="N", type=integer, default=8, help="texts at once (default: 8)")
    parser.add_argument(
        "--max_length", metavar="N", type=integer, help="tokens seen at once (default: the model's context length)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line a task instead of the table")
    options = parser.parse_known_options(argv)
    home(options.run)  # before lm-eval is imported, which takes a while
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from layerskip_jax.evaluation.lm_eval_model import LayerSkipLM
    except ImportError as error:
        raise UserError(f"{error}: it comes with pip install 'layerskip-jax[lm_eval]'") from None

    model, config, tokenizer_path = load_model(options.run)
    lm = LayerSkipLM(
        model.unstacked(),
        load_tokenizer(str(tokenizer_path)),
        config.decode,
        max_length=options.max_length or context_length(config),
        exit_layer=options.exit_layer,
        batch_size=options.batch_size,
    )
    manager = TaskManager(include_path=options.include_path)
    unknown = [task for task in options.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-eval-harness knows no task {', '.join(unknown)}")
    results = evaluator.simple_evaluate(
        lm,
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    if options.json:
        for task, values in results["results"].items():
            print(json.dumps({"task": task, "exit_layer": lm.exit_layer, **values}))
    else:
        print(make_table(results))
