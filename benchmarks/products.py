"""Count the FLOPs of a compiled training step: ``python -m benchmarks.products``.

Counts with all exits and with none, and for the skipping form with all, half and none of the rows kept.
"""

import dataclasses

import jax
from hlo import Program, shares_by_scope

from benchmarks.common import header
from benchmarks.step_cost import PLAIN
from layerskip_jax.config import Config, EarlyExitConfig, LayerDropoutConfig
from layerskip_jax.errors import run_command
from layerskip_jax.recipe.chunked_loss import INNER_EXIT
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.step import Trainer


def compiled(config: Config) -> Program:
    mesh = make_mesh(config, jax.devices()[:1])  # the HLO text is that of one device
    return Program(Trainer(config, Recipe.from_config(config), mesh).compile_step().as_text())


def main() -> None:
    header()
    model = PLAIN.model
    exit_DV = model.num_layers * model.dim * model.vocab_size * PLAIN.train.batch_size * PLAIN.data.sequence_length
    exits = EarlyExitConfig(curriculum="all", e_scale=0.2)
    rows, last_exit = PLAIN.train.batch_size, shares_by_scope({INNER_EXIT: 0.0})
    dropout = LayerDropoutConfig(0.8, "linear", "constant", form="skipping", row_groups=rows)
    for remat in ("none", "dots", "full"):
        plain = dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, remat=remat))
        program = compiled(dataclasses.replace(plain, early_exit=exits))
        on, off = (program.work(shares_by_scope({INNER_EXIT: share})).flops for share in (1.0, 0.0))
        each = (on - off) / exit_DV
        print(
            f"all exits, remat {remat}: {on / 1e9:.1f} GFLOP in matmuls; an exit takes {each:.2f} D V FLOPs per token"
        )
        whole = compiled(plain).work(last_exit).flops
        skipping = compiled(dataclasses.replace(plain, layer_dropout=dropout))
        for kept in (rows, rows / 2, 0):
            share = skipping.work(last_exit, unknown_trip_count=kept).flops / whole
            print(f"skipping, remat {remat}, {kept:g} of {rows} rows kept: {share:.3f} of the step without dropout")


if __name__ == "__main__":
    run_command(main)
