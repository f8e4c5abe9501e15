"""``python train.py --config configs/NAME.py [--group.setting value ...]``"""

import sys

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Train (or go on training) as the config and its overrides say."""
    parser = make_parser(
        "Pretrain a language model with LayerSkip: layer dropout and early-exit loss. A run goes on from the newest "
        "checkpoint in its run folder."
    )
    config, _ = parse_config(parser, argv)

    # After parsing, so that --help and mistakes answer at once.
    import jax

    from layerskip_jax.distributed import joined

    with joined(config.distributed):
        from layerskip_jax.commands.plots import plot_run
        from layerskip_jax.locations import keep_compiled_programs
        from layerskip_jax.training.loop import train

        if jax.default_backend() != "cpu":
            keep_compiled_programs(config.train.run_dir)
        train(config)
        if jax.process_index() == 0:
            run = config.train.run_dir
            try:
                for path in plot_run(run):
                    print(f"plot: {path}")
            except Exception as error:  # the run is done and saved, whatever a picture lacks
                print(f"WARNING: no plots: {error}", file=sys.stderr)
            print(f"trained: {run}; next: python decode.py --checkpoint {run} --prompt ...")


def run() -> None:
    """The installed command ``layerskip-train``."""
    run_command(main)
