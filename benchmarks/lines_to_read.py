"""How much there is to read of each loop: ``python benchmarks/lines_to_read.py``.

A line counts if it holds something: blank lines do not, comments and docstrings do.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN_LOOP = [
    "train.py",
    "layerskip_jax/training/loop.py",
    "layerskip_jax/training/step.py",
    "layerskip_jax/recipe/fused_exit_loss.py",
    "layerskip_jax/recipe/layer_dropout.py",
    "layerskip_jax/recipe/skipping.py",
    "layerskip_jax/recipe/early_exit.py",
    "layerskip_jax/recipe/recipe.py",
    "layerskip_jax/training/optimizer.py",
]
DECODE_LOOP = [
    "decode.py",
    "layerskip_jax/decoding/state.py",
    "layerskip_jax/decoding/rounds.py",
    "layerskip_jax/decoding/sampling.py",
    "layerskip_jax/decoding/engine.py",
]


def python_files() -> list[Path]:
    """Return the project's own files: the top level's and those of its folders, without virtual environments."""
    folders = ["layerskip_jax", "configs", "tests", "benchmarks", "examples", "docs", "tpu"]
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]


def lines_of(files: list[str]) -> int:
    return sum(bool(line.strip()) for file in files for line in (ROOT / file).read_text().splitlines())


def main() -> None:
    print(f"train loop: {lines_of(TRAIN_LOOP)} lines in {', '.join(TRAIN_LOOP)}")
    print(f"decode loop: {lines_of(DECODE_LOOP)} lines in {', '.join(DECODE_LOOP)}")
    longest = max(python_files(), key=lambda file: len(file.read_text().splitlines()))
    print(f"longest file: {len(longest.read_text().splitlines())} lines, {longest.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
