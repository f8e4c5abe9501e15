"""Compile our training step and MaxText's for TPUs: ``python -m benchmarks.maxtext_tpu --maxtext PYTHON``.

On any machine, one libtpu compiles both steps for the same topology: same model, global batch, sequence length and mesh
(fsdp = chips), bfloat16 compute, float32 parameters, AdamW, splash attention, remat full. One parser (tpu/hlo.py) and
one calculation (`report` in tpu/compile_ahead.py) read both HLO texts. The estimate is the compiler's
`estimated_cycles` over the chip's clock, plus attention at the chip's peak, plus the exposed collectives. The cost
model does not cover kernels, so attention counts the same on both sides, whatever its tiles. The HLO texts lack trip
counts, so those come from the constants in the loop conditions; the JSON has the resulting FLOPs and the formula's.
Nothing runs, so no figure is a measured time.

MaxText's step is compiled in up to six forms:

    shipped  `maxtext.trainers.pre_train.train_compile` with its defaults, and only the compiler option that it sets
             itself (xla_tpu_spmd_rng_bit_generator_unsafe)
    recipe   with the flags of its Llama 2 7B recipe for that chip from the installed package (configs/tpu;
             benchmarks/xla_flags_library.py in its repository explains them), without the ones that libtpu refuses:
             continuation fusion, which from 0.0.44 on is only for v5e
    whole    with xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 (also in its flag library)
    vmem     with xla_tpu_scoped_vmem_limit_kib=98304 (also in its v6e recipe)
    both     with both
    ours     with all options of our step on that chip (layerskip_jax/compiler_options.py)

PYTHON is a Python 3.12 with MaxText and with the libtpu version of the Python that runs this. Compiling does not need
most of MaxText's dependencies:

    pip install 'jax[tpu]==0.12.0' libtpu==VERSION flax optax orbax-checkpoint grain transformers pydantic omegaconf \\
      sentencepiece tiktoken pillow sympy fastapi uvicorn jinja2 immutabledict portpicker opentelemetry-api
    pip install --no-deps maxtext==0.2.5 aqtp drjax einshape fire jaxtyping pathwaysutils qwix six termcolor tokamax \\
      wadler-lindig xprof

"Exposed bytes" is the share of the received bytes that no computation hides, "exposed time" the share of the estimate
that they take. A step compiles in 2 to 15 minutes. ``--json FILE`` stores every result; the next call with the same
versions and commit compiles only the missing steps.
"""

import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from chips import CHIPS
from hlo import Program, shares_by_scope

from benchmarks.common import ROOT, header, markdown_table, write_json
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.compiler_options import STEP_OPTIONS, WHOLE_MATMULS, Options, vmem_limit
from layerskip_jax.config import Config, ModelConfig
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS

DRIVER = Path(__file__).with_name("maxtext_driver.py")
COMPILER = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Row(NamedTuple):
    """A step to compile: a config of configs/, and a topology."""

    config: str
    topology: str


ROWS = {
    "1b5-v5e": Row("scratch_1b5", "v5e:4x8"),
    "1b5-v6e": Row("scratch_1b5", "v6e:4x8"),
    "7b-v6e": Row("scratch_7b", "v6e:8x8"),
    "7b-v5p": Row("scratch_7b", "v5p:4x4x4"),
    "7b-v5e": Row("scratch_7b", "v5e:8x16"),
    "8b-v6e": Row("continual_llama3_8b", "v6e:8x8"),
}

PLAIN = ["--early_exit.curriculum", "none", "--layer_dropout.p_max", "0"]
OURS = {"plain": PLAIN, "layerskip": []}
"""Our steps, and the settings that each adds to the config."""

FORMS = ("shipped", "recipe", "whole", "vmem", "both", "ours")
"""MaxText's steps; the docstring of this module explains them."""

RECIPES = {"v5e": "v5e/llama2_7b.sh", "v5p": "v5p/llama2_7b.sh", "v6e": "v6e/llama2_7b_4096.sh"}
STATE = ("versions", "maxtext", "commit", "changes")
"""Fields of ``about`` in the results file that must be equal for a second call to add to its results."""

Result = dict[str, Any]


def chip_count(topology: str) -> int:
    """
    >>> chip_count("v5p:4x4x4")
    64
    """
    return math.prod(int(size) for size in topology.split(":")[1].split("x"))


def maxtext_topology(topology: str) -> str:
    """Return MaxText's name of a topology, which counts cores: a v5p chip has two.

    >>> maxtext_topology("v6e:8x8"), maxtext_topology("v5p:4x4x4")
    ('v6e-64', 'v5p-128')
    """
    chip = topology.split(":")[0]
    return f"{chip}-{chip_count(topology) * (2 if chip == 'v5p' else 1)}"


def read_config(row: Row, more: list[str]) -> Config:
    arguments = [
        "--config",
        str(ROOT / f"configs/{row.config}.py"),
        "--mesh.fsdp",
        str(chip_count(row.topology)),
        *more,
    ]
    return parse_config(make_parser(""), arguments)[0]


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """Return MaxText's settings for a model of the same shape."""
    return {
        "base_num_decoder_layers": model.num_layers,
        "base_emb_dim": model.dim,
        "base_mlp_dim": model.ffn_dim,
        "base_num_query_heads": model.num_heads,
        "base_num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rope_max_timescale": int(model.rope_base),
        "logits_via_embedding": str(model.tied_embedding).lower(),
    }


def maxtext_settings(config: Config, topology: str) -> dict[str, Any]:
    """Return MaxText's settings for the same training step.

    Its base.yml has the rest: splash attention on a TPU, AdamW with clipping, the loss from all logits at once.
    """
    model, chips = config.model, chip_count(topology)
    comparable = config.train.remat == "full" and config.train.accumulate == 1 and config.train.batch_size % chips == 0
    if not comparable or model.compute_dtype not in ("auto", "bfloat16"):
        raise UserError(
            "the comparison needs bfloat16, remat full, accumulate 1, and a batch_size in multiples of the chips"
        )
    return model_settings(model) | {
        "enable_dropout": "false",
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "remat_policy": "full",
        "max_target_length": config.data.sequence_length,
        "per_device_batch_size": config.train.batch_size // chips,
        "ici_fsdp_parallelism": chips,
        "compile_topology": maxtext_topology(topology),
        "compile_topology_num_slices": 1,
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "run_name": "compiled",
        "jax_cache_dir": "",  # a cached step has no HLO text
    }


def extra_options(form: str, chip: str) -> Options:
    """Return the compiler options that a form adds to MaxText's. The driver adds those of the recipe.

    >>> extra_options("whole", "v6e")
    {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}
    """
    options = {"whole": WHOLE_MATMULS, "vmem": vmem_limit(96 * 1024), "ours": STEP_OPTIONS[CHIPS[chip].kind]}
    return options["whole"] | options["vmem"] if form == "both" else options.get(form, {})


def compile_ahead() -> ModuleType:
    """Import tpu/compile_ahead.py; not at the top, because it sets environment variables of the process."""
    return importlib.import_module("compile_ahead")


def compile_maxtext(python: str, row: Row, form: str) -> Result:
    """Compile MaxText's step in a separate process, and read its HLO text the same way as ours."""
    compile_ahead()  # fails here, if at all, and not after minutes of compilation
    config, chip = read_config(row, PLAIN), row.topology.split(":")[0]
    settings = maxtext_settings(config, row.topology)
    if options := extra_options(form, chip):
        settings["compile_xla_flags"] = " ".join(f"--{name}={value}" for name, value in options.items())
    with tempfile.TemporaryDirectory() as folder:
        settings["base_output_directory"] = folder
        recipe = RECIPES[chip] if form == "recipe" else "-"
        arguments = [f"{name}={value}" for name, value in settings.items()]
        done = run_compiler([python, str(DRIVER), folder, recipe, *arguments], folder)
        if not (Path(folder) / "step.json").exists():
            raise UserError(last_error(done))
        return read_step(Path(folder), config, row.topology)


def read_step(folder: Path, config: Config, topology: str) -> Result:
    """Return the figures of the step that benchmarks/maxtext_driver.py has written to ``folder``."""
    ahead, chip = compile_ahead(), CHIPS[topology.split(":")[0]]
    step, text = json.loads((folder / "step.json").read_text()), (folder / "step.hlo").read_text()
    memory = step["peak_bytes"], step["argument_bytes"], step["temporary_bytes"]
    compiled = ahead.Compiled(*memory, Program(text).work(shares_by_scope({})), "splash" in text, step["seconds"])
    found = ahead.report(config, chip, PEAK_FLOPS[chip.kind], chip_count(topology), compiled)
    return found | {name: step[name] for name in ("options", "refused", "maxtext", "jax", "libtpu")}


def compile_ours(row: Row, form: str) -> Result:
    """Compile our step with tpu/compile_ahead.py in a separate process."""
    command = [sys.executable, str(ROOT / "tpu/compile_ahead.py"), "--config", str(ROOT / f"configs/{row.config}.py")]
    command += ["--topology", row.topology, "--mesh.fsdp", str(chip_count(row.topology)), "--json", *OURS[form]]
    with tempfile.TemporaryDirectory() as folder:
        done = run_compiler(command, folder)
    if not done.stdout.strip():
        raise UserError(last_error(done))
    return json.loads(done.stdout.splitlines()[-1]) | {"jax": version("jax"), "libtpu": version("libtpu")}


def run_compiler(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` with libtpu as a compiler, without this environment's options and modules."""
    dropped = ("LIBTPU_INIT_ARGS", "PYTHONPATH", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | COMPILER
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line with the reason of a failed compilation: the memory that it needed, or the last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    used = [line for line in lines if re.search(r"Used \S+ of \S+", line)]
    return [f"ended with status {done.returncode}", *lines, *used][-1][:300]


def find_maxtext(program: str) -> tuple[str, str]:
    """Return the path of a Python with MaxText and our version of libtpu, and MaxText's version.

    Raises `UserError` if it lacks one.
    """
    python = shutil.which(program)
    if python is None:
        raise UserError(f"--maxtext must be a Python that has MaxText, but there is no program {program}")
    code = "from importlib.metadata import version; print(version('maxtext'), version('libtpu'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--maxtext must be a Python that has MaxText and libtpu, not {program}: {last_error(done)}")
    try:
        ours, (maxtext, theirs) = version("libtpu"), done.stdout.split()[-2:]
    except PackageNotFoundError as error:
        raise UserError("this needs libtpu, the TPU's compiler: pip install -e '.[tpu]'") from error
    if theirs != ours:
        raise UserError(f"both steps need the same libtpu, but {program} has {theirs}, and this Python has {ours}")
    return os.path.abspath(python), maxtext  # without resolving links: the Python of a virtual environment is a link


def figures(result: Result) -> list[str]:
    """Return a result's cells: estimate, MFU, peak, bytes received, exposed bytes and time, compile seconds."""
    if "error" in result:
        return [result["error"], *[""] * 6]
    seconds = result["seconds"]
    return [
        f"{seconds['estimate']:.3f}",
        f"{result['mfu_at_estimate']:.1%}",
        f"{result['hbm']['peak'] / 1e9:.2f}" + ("" if result["fits"] else ", does not fit"),
        f"{sum(result['received'].values()) / 1e9:.1f}",
        f"{1 - result['overlapped']:.0%}",
        f"{seconds['exposed'] / seconds['estimate']:.1%}",
        f"{result['compile_seconds']:.0f}",
    ]


def table(results: list[Result]) -> str:
    """Return a Markdown table of the results, and the options that libtpu refused."""
    heads = ["estimate [s]", "MFU", "peak [GB]", "received [GB]", "exposed bytes", "exposed time", "compile time [s]"]
    rows = [[f"{one['config']}, {one['topology']}", one["step"], *figures(one)] for one in results]
    text = markdown_table(["run", "step", *heads], rows)
    if refused := sorted({name for one in results for name in one.get("refused", [])}):
        text += f"\n\nOmitted from MaxText's recipes, because libtpu refuses them: {', '.join(refused)}."
    return text


def read_results(file: Path, about: dict[str, Any]) -> dict[tuple[str, ...], Result]:
    """Return the stored results by config, topology and step.

    Raises `UserError` if the file is damaged, or if its results are not of ``about``'s versions and commit.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        before = stored["about"]
        results = {(one["config"], one["topology"], one["step"]): one for one in stored["results"]}
        changed = [name for name in STATE if before.get(name) != about[name]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged or has the format of an earlier commit ({error!r}): give another --json"
        ) from error
    if changed:
        raise UserError(f"{file} has results of other {', '.join(changed)}: delete it, or give another --json")
    return results


def compile_one(python: str, row: Row, side: str, form: str) -> Result:
    """Compile one step. If it does not compile, the result has an ``error`` instead of figures."""
    about = {"config": row.config, "topology": row.topology, "step": f"{side} {form}"}
    try:
        return about | (compile_ours(row, form) if side == "ours" else compile_maxtext(python, row, form))
    except UserError as error:
        return about | {"error": str(error)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--maxtext", metavar="PYTHON", required=True, help="a Python with MaxText and libtpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="steps to compile (default: all)")
    parser.add_argument(
        "--ours", nargs="*", choices=OURS, default=list(OURS), help="variants of our step (default: all)"
    )
    parser.add_argument(
        "--forms", nargs="*", choices=FORMS, default=list(FORMS), help="forms of MaxText's step (default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="store results here, and compile only the missing ones"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    python, maxtext = find_maxtext(options.maxtext)
    about = header() | {"maxtext": maxtext}
    known = read_results(options.json, about) if options.json and options.json.exists() else {}
    shown = []
    for row in (ROWS[name] for name in options.rows):
        for side, form in [("MaxText", form) for form in options.forms] + [("ours", form) for form in options.ours]:
            key = (row.config, row.topology, f"{side} {form}")
            if "error" in known.get(key, {"error": "not compiled yet"}):
                known[key] = compile_one(python, row, side, form)
                print(" ".join([*key, *figures(known[key])]), file=sys.stderr, flush=True)
                write_json(options.json, about, list(known.values()))
            shown.append(known[key])
    print(table(shown))


if __name__ == "__main__":
    run_command(main)
