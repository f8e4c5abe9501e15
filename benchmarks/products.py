"""Count the operations of matrix products in a compiled step: ``python benchmarks/products.py``.

XLA's own count takes a loop's body once; this one multiplies by the trip counts that the compiler knows, and by a given
one where it does not (the loop over kept rows). Of a conditional it takes the dearest branch or the cheapest, and the
difference is what the exits cost.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.step_cost import PLAIN
from layerskip_jax.config import Config, EarlyExitConfig, LayerDropoutConfig
from layerskip_jax.losses import Batch
from layerskip_jax.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.train_step import Trainer

DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
DOT = re.compile(r" dot\(%?([\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def products(text: str, unknown_trips: float, branch: Callable[[Iterator[float]], float] = max) -> float:
    """Return the FLOP of all dot operations that a run of the HLO module ``text`` makes."""
    bodies: dict[str, list[str]] = {}
    top, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and "=" not in line.split("(")[0]:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            top = name if line.startswith("ENTRY") else top
            bodies[name] = lines = []
        else:
            lines.append(line)

    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            shapes = {m[1]: [int(n) for n in m[2].split(",") if n] for m in map(DEFINED.match, bodies[name]) if m}
            known[name] = sum(of_line(line, shapes) for line in bodies[name])
        return known[name]

    def of_line(line: str, shapes: dict[str, list[int]]) -> float:
        dot = DOT.search(line)
        if dot:
            out = DEFINED.match(line)
            assert out is not None
            contracted = [shapes[dot[1]][int(axis)] for axis in dot[2].split(",")]
            return 2.0 * _product(shapes[out[1]]) * _product(contracted)
        if " while(" in line:
            trips = TRIPS.search(line)
            body = re.search(r"body=%?([\w.-]+)", line)
            assert body is not None
            return of(body[1]) * (float(trips[1]) if trips else unknown_trips)
        if " conditional(" in line:
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = branches[1].split(",") if branches else re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
            return branch(of(name.strip().lstrip("%")) for name in names)
        called = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", line)
        return of(called[1]) if called and called[1] in bodies else 0.0

    return of(top)


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def compiled_text(config: Config) -> str:
    trainer = Trainer(config, Recipe.from_config(config), make_mesh(config))
    shape = (config.train.batch_size, config.data.sequence_length)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.float32)))
    return Trainer.step.lower(trainer, trainer.abstract_state(), batch).compile().as_text()


def main() -> None:
    model = PLAIN.model
    exit_DV = model.num_layers * model.dim * model.vocab_size * PLAIN.train.batch_size * PLAIN.data.sequence_length
    exits = EarlyExitConfig(curriculum="all", e_scale=0.2)
    for remat in ("none", "dots", "full"):
        train = dataclasses.replace(PLAIN.train, remat=remat)
        text = compiled_text(dataclasses.replace(PLAIN, train=train, early_exit=exits))
        on, off = (products(text, 0, branch) for branch in (max, min))
        each = (on - off) / exit_DV
        print(f"all exits, remat {remat}: {on / 1e9:.1f} GFLOP of products; an exit {each:.2f} D V a token")
    rows = PLAIN.train.batch_size
    dropout = LayerDropoutConfig(0.8, "linear", "constant", form="skipping", row_groups=rows)
    for remat in ("none", "dots", "full"):
        plain = dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, remat=remat))

        def last_exit(config: Config, kept: float) -> float:
            text = compiled_text(config)
            off = products(text, kept, min)
            return off + (products(text, kept, max) - off) / model.num_layers

        whole = last_exit(plain, 0)
        for kept in (rows, rows / 2, 0):
            share = last_exit(dataclasses.replace(plain, layer_dropout=dropout), kept) / whole
            print(f"skipping, remat {remat}, {kept:g} of {rows} rows kept: {share:.3f} of the step without dropout")


if __name__ == "__main__":
    main()
