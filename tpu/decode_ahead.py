"""Compile decoding for one TPU chip or several, on any machine; predict tokens/s and the speedup of self-speculation.

    python tpu/decode_ahead.py --config configs/scratch_1b5.py --chip v5e --exit_layer 6 --draft_length 4 8
    python tpu/decode_ahead.py --config configs/scratch_7b.py --chip v5e --tensor_parallel 8

Prints the time of each pass: the prefill, a plain pass, a draft (blocks [0, E) and the head), the last early pass of a
round (no head), and the verification (blocks [E, L) and the head). A time is the larger of the compiler's estimate for
the operations and the time to read the weights and the cache at the chip's HBM bandwidth, because the compiler's
estimate omits the wait for prefetched weights. From these times follow the tokens/s if each draft is accepted with
probability a, given that those before it were. With C choices at each position, the estimate of a draft is too high by
the head of C - 1 nodes, which a round does not run, and too low by the selection of the best tokens. With several
chips, a time includes the transfers at the bandwidth of the links, but not the latency of the collectives, which can
take as long as the rest; their number is printed. A tpu7x chip counts as the two devices that JAX shows. The memory is
that of a chip, by the compiler. The model never runs: only the time to compile is measured. Needs libtpu
(``pip install -e '.[tpu]'``), but no TPU.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chips import CHIPS, Chip
from compile_ahead import topology_devices  # sets the environment for libtpu
from etils import epath
from flax import nnx
from hlo import Program, shares_by_scope
from jax.sharding import NamedSharding

from layerskip_jax.cache import LayerCache
from layerskip_jax.checkpoint.huggingface.config_json import read_model_config
from layerskip_jax.checks import require
from layerskip_jax.command_line import make_parser, parse_config, positive
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.branching import Branching, GreedyBranches
from layerskip_jax.decoding.configure import default_exit
from layerskip_jax.decoding.cost import predicted_speedup, weight_bytes
from layerskip_jax.decoding.engine import prefill, program_options, rounds_program
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.request import BUCKET, Request, check_strategy
from layerskip_jax.decoding.rounds import SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer, empty_cache, weight_count
from layerskip_jax.sharding import auto_mesh, check_tensor_divides, named_shardings, spec

PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities of accepting a draft, given that the earlier drafts of the round were accepted."""
PASSES = 64
"""Passes in the loop that is compiled for each kind of pass, so that work before the loop counts little."""

Carry = tuple[jax.Array, list[LayerCache]]
"""The state of a loop of passes: ``x_BWD`` and the cache."""


class Pass(NamedTuple):
    """Blocks [first, last) on ``width`` positions, with or without the head."""

    first: int
    last: int
    width: int
    head: bool
    prefill: bool = False  # the positions are the first of a text

    def weights(self, config: ModelConfig) -> int:
        """Return how many weights the pass reads."""
        head = config.vocab_size * config.dim
        blocks = (weight_count(config) - head) * (self.last - self.first) // config.num_layers
        return blocks + (head if self.head else 0)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time of a pass: max(operations, reading) + transfers."""

    operations: float  # the compiler's estimate [s]
    reading: float  # weights and cache at the HBM bandwidth [s]
    transfers: float  # exposed collectives at the bandwidth of the links [s]
    collectives: float  # their number

    @property
    def seconds(self) -> float:
        return max(self.operations, self.reading) + self.transfers


class ChipCompiler:
    """Compiles programs of one model, split over ``chips`` chips. Arrays are only shapes, so no model is made."""

    def __init__(self, config: ModelConfig, chip: str, rows: int, capacity: int, chips: int = 1):
        shapes = ("2x2", "2x4") if chip in ("v5e", "v6e") else ("2x2x1", "2x2x2")
        devices = topology_devices(f"{chip}:{shapes[chips > 4]}", 1)[:chips]
        self.mesh = auto_mesh(np.reshape(devices, (1, 1, 1, chips)))
        self.chip, self.config, self.rows, self.capacity, self.chips = CHIPS[chip], config, rows, capacity, chips
        with jax.set_mesh(self.mesh):
            model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)).unstacked())
            shardings = named_shardings(model, model, self.mesh)
            self.model = jax.tree.map(lambda array, sharding: array.update(sharding=sharding), model, shardings)

    def shapes(self, f: Callable[..., Any], *arguments: Any) -> Any:
        """Return the shapes of ``f(*arguments)``, on the chips: caches split by heads, and the rest replicated."""

        def place(leaf: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec(("batch", "kv_heads") if isinstance(leaf, LayerCache) else ()))
            return jax.tree.map(lambda array: array.update(sharding=sharding), leaf)

        return jax.tree.map(place, jax.eval_shape(f, *arguments), is_leaf=lambda leaf: isinstance(leaf, LayerCache))

    def estimate(self, one: Pass) -> Estimate:
        """Compile a loop of passes, each of which starts at the next position, and estimate one."""

        def passes(model: Transformer, x_BWD: jax.Array, layers: list[LayerCache]) -> Carry:
            def run(index: jax.Array, carry: Carry) -> Carry:
                x_BWD, layers = carry
                index_BW = jnp.zeros((self.rows, 1), jnp.int32) + index + jnp.arange(one.width)[None]
                x_BWD, layers = model.run_cached(
                    x_BWD,
                    model.rotary_tables(index_BW),
                    layers,
                    one.first,
                    one.last,
                    filled=one.width if one.prefill else None,
                )
                return (model.embed(jnp.argmax(model.unembed(x_BWD), -1)) if one.head else x_BWD), layers

            return jax.lax.fori_loop(0, PASSES, run, (x_BWD, layers))

        with jax.set_mesh(self.mesh):
            tokens_BW = self.shapes(lambda: jnp.zeros((self.rows, one.width), jnp.int32))
            x_BWD = self.shapes(lambda model, tokens: model.embed(tokens), self.model, tokens_BW)
            layers = self.shapes(partial(empty_cache, self.config, self.rows, self.capacity))
            jitted = jax.jit(passes, donate_argnums=2, compiler_options=program_options(self.config))
            compiled = jitted.lower(self.model, x_BWD, layers).compile()
        work, c = Program(compiled.as_text()).work(shares_by_scope({})), self.config
        # The cache is half full on average, and empty before the prefill.
        positions = 0 if one.prefill else self.rows * self.capacity // 2
        cached = (one.last - one.first) * positions * 2 * c.num_kv_heads * c.head_dim
        size = (one.weights(c) + cached) * weight_bytes(c) / self.chips
        exposed = sum(size for transfer, size in work.received.items() if not transfer.overlapped)
        return Estimate(
            work.cycles / PASSES / self.chip.clock,
            size / self.chip.hbm_bandwidth,
            exposed / PASSES / self.chip.ici,
            work.collectives / PASSES,
        )

    def rounds(self, strategy: Strategy) -> jax.stages.Compiled:
        """Compile the decode loop."""

        def prefilled(model: Transformer) -> Any:
            tokens_BS, row_B = jnp.zeros((self.rows, self.capacity), jnp.int32), jnp.full(self.rows, 9)
            request = Request(tokens_BS, row_B, row_B + 8, jnp.full(1, -1), jax.random.key(0))
            return prefill(strategy, model, request, 8)

        with jax.set_mesh(self.mesh):
            state, until = self.shapes(prefilled, self.model), self.shapes(lambda: jnp.int32(1))
            return rounds_program(self.config).lower(strategy, self.model, state, until).compile()


def report(
    compiler: ChipCompiler, exit_layer: int, draft_lengths: Sequence[int], choices: Sequence[int], prompt_length: int
) -> dict[str, Any]:
    """Return the estimates of every pass, and of a round for every draft length and number of choices.

    With one choice at each position, a round also has the predictions for every probability.
    """
    E, L = exit_layer, compiler.config.num_layers
    prefill = compiler.estimate(Pass(0, L, prompt_length, False, prefill=True))
    passes = {f"prefill of {prompt_length} tokens": prefill, "plain": compiler.estimate(Pass(0, L, 1, True))}
    rounds: list[dict[str, Any]] = []
    for C in choices:
        suffix = f", {C} choices" * (C > 1)
        draft, early = (compiler.estimate(Pass(0, E, C, head)) for head in (True, False))
        passes |= {f"draft{suffix}": draft, f"last early pass{suffix}": early}
        for d in draft_lengths:
            verification = passes[f"verify {(d + 1) * C} positions"] = compiler.estimate(Pass(E, L, (d + 1) * C, True))
            seconds = d * draft.seconds + early.seconds + verification.seconds
            by_bytes = d * draft.reading + early.reading + verification.reading
            strategy = SelfSpeculative(Greedy(), Fixed(E, d)) if C == 1 else Branching(GreedyBranches(), E, d, C)
            began = time.perf_counter()
            memory = compiler.rounds(strategy).memory_analysis()
            rounds.append(
                {"draft_length": d, "choices": C, "seconds": seconds, "over_bytes": seconds / by_bytes,
                 "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                 "compile_seconds": time.perf_counter() - began,
                 "predictions": predictions(compiler, E, d, seconds, passes["plain"].seconds) if C == 1 else []}
            )  # fmt: skip
    return {
        "exit_layer": E,
        "passes": {name: {**dataclasses.asdict(one), "seconds": one.seconds} for name, one in passes.items()},
        "plain_tokens_per_second": compiler.rows / passes["plain"].seconds,
        "rounds": rounds,
    }


def predictions(
    compiler: ChipCompiler, exit_layer: int, draft_length: int, seconds: float, plain_seconds: float
) -> list[dict[str, float]]:
    """Return tokens/s and speedup of rounds that take ``seconds``, for every probability of accepting a draft."""
    rows = []
    for probability in PROBABILITIES:
        tokens = sum(probability**drafted for drafted in range(draft_length + 1))
        rows.append(
            {"probability": probability, "accepted": (tokens - 1) / draft_length,
             "tokens_per_second": compiler.rows * tokens / seconds,
             "speedup": tokens * plain_seconds / seconds,
             "speedup_by_bytes": predicted_speedup(compiler.config, exit_layer, draft_length, tokens)}
        )  # fmt: skip
    return rows


def show(found: dict[str, Any], chip: Chip) -> None:
    print(f"  {'pass':24}{'ms':>8}{'operations':>12}{'reading':>9}{'transfers':>11}{'collectives':>13}")
    for name, one in found["passes"].items():
        milliseconds = (1e3 * one[key] for key in ("seconds", "operations", "reading", "transfers"))
        print(f"  {name:24}{'{:8.3f}{:12.3f}{:9.3f}{:11.3f}'.format(*milliseconds)}{one['collectives']:13.0f}")
    print(f"  plain decoding: {found['plain_tokens_per_second']:.0f} tokens/s")
    for one in found["rounds"]:
        memory, temporaries = (one["arguments"] + one["temporaries"]) / 1e9, one["temporaries"] / 1e6
        print(f"  d = {one['draft_length']}, {one['choices']} choice{'s' * (one['choices'] > 1)}: ", end="")
        print(f"{1e3 * one['seconds']:.3f} ms a round, ", end="")
        print(f"{one['over_bytes']:.2f}x the time to read its bytes;")
        print(f"    {memory:.2f} GB of {chip.hbm / 1e9:.0f}, including {temporaries:.0f} MB of temporaries; ", end="")
        print(f"compiles in {one['compile_seconds']:.0f} s")
        for row in one["predictions"]:
            print(f"    a = {row['probability']:.1f} ({row['accepted']:.0%} of the drafts accepted): ", end="")
            print(f"{row['tokens_per_second']:6.0f} tokens/s, ", end="")
            print(f"{row['speedup']:.2f}x plain ({row['speedup_by_bytes']:.2f}x by the bytes of the weights)")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Compile decoding for one TPU chip or several, without a TPU, and predict its speed.")
    parser.add_argument("--folder", help="take the model of this Hugging Face folder, not of the config")
    parser.add_argument("--chip", required=True, choices=CHIPS)
    parser.add_argument("--exit_layer", type=positive, help="E; by default a quarter of the layers")
    parser.add_argument(
        "--draft_length", type=positive, nargs="+", default=[4, 8], metavar="D", help="drafts (default: 4 8)"
    )
    parser.add_argument(
        "--choices", type=positive, nargs="+", default=[1], metavar="C", help="tokens at each position (default: 1)"
    )
    parser.add_argument(
        "--rows", type=positive, default=1, metavar="N", help="texts that are decoded together (default: 1)"
    )
    parser.add_argument(
        "--length", type=positive, default=1000, metavar="N", help="positions of a text with its prompt (default: 1000)"
    )
    parser.add_argument(
        "--prompt_length", type=positive, metavar="N", help="positions of the prefill (default: half of --length)"
    )
    parser.add_argument(
        "--tensor_parallel", type=positive, default=1, metavar="N", help="chips per model, up to 8 (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    config, options = parse_config(parser, argv)
    model = read_model_config(epath.Path(options.folder)) if options.folder else config.model
    exit_layer = options.exit_layer or default_exit(model.num_layers)
    require(1 <= exit_layer < model.num_layers, f"--exit_layer must be in 1..{model.num_layers - 1}, not {exit_layer}")
    prompt_length = options.prompt_length or -(-options.length // 2)
    require(prompt_length <= options.length, f"--prompt_length must be at most --length {options.length}")
    chips = options.tensor_parallel
    require(chips <= 8, f"--tensor_parallel must be at most 8, not {chips}")
    check_tensor_divides(model, "--tensor_parallel", chips)
    model = dataclasses.replace(model, compute_dtype="bfloat16")
    check_strategy(model, SelfSpeculative(Greedy(), Fixed(exit_layer, max(options.draft_length))))
    widest = (max(options.draft_length) + 1) * max(options.choices)
    require(widest <= 512, f"a round must verify at most 512 positions, (draft_length + 1) * choices, not {widest}")
    # `write_cache` needs pieces that are no shorter than a pass. They end at multiples of this power of two.
    step = max(BUCKET, 1 << (widest - 1).bit_length())
    capacity = -(-(options.length + widest) // step) * step
    compiler = ChipCompiler(model, options.chip, options.rows, capacity, chips)
    found = report(compiler, exit_layer, options.draft_length, options.choices, prompt_length)
    if options.json:
        about = {"config": options.config, "chip": options.chip, "chips": chips, "rows": options.rows}
        print(json.dumps(about | found))
    else:
        print(f"{options.folder or options.config} on {chips} x {options.chip}, rows: {options.rows}, ", end="")
        print(f"exit {exit_layer} of {model.num_layers}. Estimates from the compiler and the data sheet:")
        show(found, CHIPS[options.chip])


if __name__ == "__main__":
    run_command(main)
