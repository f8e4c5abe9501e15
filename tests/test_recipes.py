"""`benchmarks.recipes`: a row from training to the page, and its numbers by hand."""

import json
import sys
from pathlib import Path

import pytest
from corpora import VOCABULARY

from benchmarks import recipes
from benchmarks.recipes import mean_and_spread, page, parse, repeated_share, run_config, study_of
from layerskip_jax.errors import UserError


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        (list(range(20)), 0),
        ([7] * 10, 9 / 10),  # all but the first token are in an 8-gram that occurred one position before
        ([*range(8), *range(8)], 1 / 2),
        ([*range(8), 90, 91, *range(8), 92, 93], 8 / 20),
    ],
)
def test_loops_are_repeated_8_grams(tokens, share):
    assert repeated_share(tokens) == pytest.approx(share)


def test_a_spread_is_half_the_distance_of_the_extremes():
    assert mean_and_spread([1.0, 2.0, 6.0], ".1f") == "3.0 ± 2.5"
    assert mean_and_spread([2.0], ".1f") == "2.0"


def test_a_mean_names_the_settings_and_commits_of_all_seeds():
    mode = {"acceptance": 0.5, "loops": 0.0, "by_bytes": 1.5, "speedup": 1.0}
    rows = [
        {"study": "s", "name": "fixed", "seed": seed, "exit": 3, "loss_by_exit": [2.0], "agreement_by_exit": [1, 1, 1],
         "greedy": mode | {"by_bytes_settings": [3, d]}, "sampled": mode | {"by_bytes_settings": [3, 2]},
         "step_time": 1.0, "step_memory": 1.0, "command": f"python {seed}", "commit": commit, "machine": "m"}
        for seed, d, commit in ((0, 2, "abc"), (1, 4, "abc"), (2, 2, "def"))
    ]  # fmt: skip
    text = page(rows)
    assert "1.50 ± 0.00x (E=3 d=2, E=3 d=4)" in text
    assert "1.50 ± 0.00x (E=3 d=2) |" in text
    assert "| abc, def |" in text
    assert text.endswith("    python 0\n    python 1\n    python 2\n")


def test_plain_has_no_exits_and_its_own_folder():
    config, _ = parse(["plain", "--early_exit.curriculum", "fixed", "--early_exit.exits", "3"])
    run = run_config(config, "plain", seed=2)
    assert (run.early_exit.curriculum, run.early_exit.exits, run.layer_dropout.p_max) == ("none", (), 0.0)
    assert study_of(run) == "python_stdlib 12x64 10M"
    assert run.train.run_dir == "runs/evidence/python_stdlib-12x64-10M/plain-2"
    mixed, _ = parse(["plain", "--data.mixture", "0.7=text:my/texts", "0.3=python_stdlib"])
    assert study_of(mixed) == "0.7=text:my_texts+0.3=python_stdlib 12x64 10M"


def test_a_name_that_is_no_folder_is_refused():
    with pytest.raises(UserError, match="NAME becomes a folder"):
        parse(["../plain"])


def test_a_row_is_trained_measured_and_written(corpus, tmp_path, monkeypatch):
    """The page keeps a stored row of the plain model; a second call trains nothing."""
    model = {"num_layers": 2, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": VOCABULARY}
    settings = {f"model.{name}": value for name, value in model.items()}
    settings |= {f"data.{name}": getattr(corpus, name) for name in ("source", "path", "sequence_length")}
    settings |= {"train.steps": 2, "train.loss_chunk": 8, "train.evaluate_every": 2, "train.checkpoint_every": 2}
    settings |= {"train.batch_size": 8, "train.run_dir": tmp_path / "runs", "optimizer.warmup_steps": 1}
    settings |= {"early_exit.curriculum": "fixed", "early_exit.exits": 1, "early_exit.distillation": "kl"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    study = study_of(parse(["fixed", *words])[0])
    generated = {"acceptance": 0.25, "loops": 0.5, "by_bytes": 1.5, "by_bytes_settings": [1, 2], "speedup": 1.25}
    plain = {"study": study, "name": "plain", "seed": 0, "exit": 1, "loss_by_exit": [9.0, 4.0], "commit": "abc"}
    plain |= {
        "agreement_by_exit": [0.5, 1],
        "greedy": generated,
        "sampled": generated,
        "command": "plain",
        "machine": "m",
    }
    file = tmp_path / "recipes.md"
    file.write_text(f"# Recipes\n\n## An introduction\n\n{recipes.ROWS_BELOW}\n\n## old\n\nnumbers\n")
    file.with_suffix(".json").write_text(json.dumps([plain | {"step_time": 1.0, "step_memory": 1.0}]))
    for name, value in {"NEW_TOKENS": 12, "DRAFT_LENGTHS": (4,), "PROMPTS": 1, "HELD_OUT_BATCHES": 1}.items():
        monkeypatch.setattr(recipes, name, value)
    measure_generation = recipes.generation
    monkeypatch.setattr(
        recipes, "generation", lambda run, sampled: generated if sampled else measure_generation(run, False)
    )
    monkeypatch.setattr(recipes, "step_cost", lambda config: {"step_time": 1.5, "step_memory": 1.25})
    monkeypatch.setattr(sys, "argv", ["recipes", "fixed", "--page", str(file), *words])
    recipes.main()
    namesake = str(tmp_path / Path(corpus.path).name)  # a corpus whose path ends with the same name
    for changes, message in {
        ("--early_exit.distillation", "none"): r"trained with another early_exit\.distillation: remove it",
        ("--train.skip_spikes", "3"): r"trained with another train\.skip_spikes: remove it",
        ("--data.path", namesake): "was made for .*: rename one",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*sys.argv, "--again", *changes])
            with pytest.raises(UserError, match=message):
                recipes.main()
    monkeypatch.setattr(recipes, "measured_row", None)
    recipes.main()

    rows = json.loads(file.with_suffix(".json").read_text())
    assert [(row["name"], row["exit"], row["early_exit"]["distillation"]) for row in rows[1:]] == [("fixed", 1, "kl")]
    assert rows[1]["greedy"]["identical"]
    text = file.read_text()
    assert text == f"# Recipes\n\n## An introduction\n\n{recipes.ROWS_BELOW}\n\n" + page(rows)
    by_name = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("|")}
    assert "| 4.000 | +0.00 % | 1 | 50.0 % | 25.0 % | 50 % | 1.50x (E=1 d=2) | 1.25x |" in by_name["| plain"]
    assert by_name["| fixed"].split(" | ")[-3:-1] == ["1.50x", "1.25x"]
    assert f"| {100 * (rows[1]['loss_by_exit'][-1] / 4 - 1):+.2f} % |" in by_name["| fixed"]
