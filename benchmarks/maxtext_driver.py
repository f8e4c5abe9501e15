"""Compile MaxText's training step ahead of time, and write the files that `benchmarks.maxtext_tpu` reads.

    PYTHON benchmarks/maxtext_driver.py FOLDER RECIPE name=value ...

PYTHON needs MaxText, but not this package. MaxText's `train_compile.main` builds and compiles the step with the given
settings. Where it would store the compiled step, this writes the HLO text to FOLDER/step.hlo, and memory, compiler
options and seconds to FOLDER/step.json.

RECIPE is a script in MaxText's configs/tpu, for example v6e/llama2_7b_4096.sh, whose LIBTPU_INIT_ARGS become compiler
options, or "-" for none. Options that the compiler does not know or refuses are omitted; the JSON lists them.
"""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

Compile = Callable[..., jax.stages.Compiled]


def recipe_flags(script: str) -> str:
    """Return the LIBTPU_INIT_ARGS of one of MaxText's recipes, as ``--name=value --name=value``."""
    package = importlib.util.find_spec("maxtext")
    if package is None or package.origin is None:
        raise SystemExit("MaxText is not installed here: pip install --no-deps maxtext==0.2.5")
    text = (Path(package.origin).parent / "configs" / "tpu" / script).read_text()
    found = re.search(r'^export LIBTPU_INIT_ARGS="([^"]*)"', text, flags=re.M)
    if found is None:
        raise SystemExit(f"{script} of MaxText {version('maxtext')} sets no LIBTPU_INIT_ARGS")
    return found[1]


def compile_accepted(compile_lowered: Compile, outcome: dict[str, Any]) -> Compile:
    """Return a ``Lowered.compile`` that omits refused options, and stores the options in ``outcome``."""

    def compile_step(lowered: jax.stages.Lowered, compiler_options: dict[str, Any] | None = None) -> Any:
        options, outcome["refused"] = dict(compiler_options or {}), []
        while True:
            try:
                compiled = compile_lowered(lowered, compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                accepted = without_refused(options, str(error))
                if accepted == options:
                    raise
                outcome["refused"] += [name for name in options if accepted.get(name) != options[name]]
                options = accepted
            else:
                outcome["options"] = options
                return compiled

    return compile_step


def without_refused(options: dict[str, Any], error: str) -> dict[str, Any]:
    """Return ``options`` without those that a compiler's error names, and with those that it asks for.

    Omitting continuation fusion is not enough: it is on by default if gathers are asynchronous, and is refused again.

    >>> without_refused({"xla_a": "true", "xla_b": "true"}, "No such compile option: 'xla_a'")
    {'xla_b': 'true'}
    >>> without_refused({"xla_a": "true", "xla_b": "true"}, "Please disable it with xla_a=false")
    {'xla_b': 'true', 'xla_a': 'false'}
    """
    kept = {name: value for name, value in options.items() if not re.search(rf"\b{name}\b", error)}
    return kept | dict(re.findall(r"disable it with (\w+)=(\w+)", error))


def main(folder: Path, recipe: str, settings: list[str]) -> None:
    from maxtext.trainers.pre_train import train_compile  # here, so that tests run without MaxText

    outcome: dict[str, Any] = {"maxtext": version("maxtext"), "jax": jax.__version__, "libtpu": version("libtpu")}
    began = time.perf_counter()

    def keep(compiled: jax.stages.Compiled, _: str) -> None:
        memory, text = compiled.memory_analysis(), compiled.as_text()
        outcome["seconds"] = time.perf_counter() - began
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        outcome["peak_bytes"] = getattr(memory, "peak_memory_in_bytes", 0) or arguments + temporaries
        outcome["argument_bytes"], outcome["temporary_bytes"] = arguments, temporaries
        (folder / "step.hlo").write_text(text)
        (folder / "step.json").write_text(json.dumps(outcome))

    train_compile.save_compiled = keep
    jax.stages.Lowered.compile = compile_accepted(jax.stages.Lowered.compile, outcome)
    if recipe != "-":
        flags = next((word for word in settings if word.startswith("compile_xla_flags=")), "compile_xla_flags=")
        settings = [word for word in settings if word != flags] + [f"{flags} {recipe_flags(recipe)}"]
    train_compile.main(["train_compile.py", *settings, f"compiled_trainstep_file={folder / 'step'}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
