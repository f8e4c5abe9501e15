"""``layerskip train --config configs/NAME.py [--group.setting value ...]`` trains a run, or resumes one."""

import shlex

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import warn


def main(argv: list[str] | None = None) -> None:
    """Train a new run, or resume one, with the config and its overrides."""
    parser = make_parser(
        "Pretrain a language model with LayerSkip: layer dropout and early-exit loss. A run resumes from the newest "
        "checkpoint in its run folder.",
        "train",
    )
    config, _ = parse_config(parser, argv)

    # Imported after parsing, so that --help and errors are immediate.
    import jax

    from layerskip_jax.distributed import distributed_session

    with distributed_session(config.distributed):
        from layerskip_jax.commands.plots import plot_run
        from layerskip_jax.locations import keep_compiled_programs
        from layerskip_jax.training.loop import train

        if jax.default_backend() != "cpu":
            keep_compiled_programs(config.train.run_dir)
        steps = int(train(config).step)
        if jax.process_index() == 0:
            run = config.train.run_dir
            try:
                for path in plot_run(run):
                    print(f"plot: {path}")
            except Exception as error:  # the run is complete and saved, so a failed plot is only a warning
                warn(f"no plots: {error}")
            print(f"{run} has {steps} steps; next: layerskip decode {shlex.quote(run)} --prompt ...")
