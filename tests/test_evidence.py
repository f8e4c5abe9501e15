"""`benchmarks.evidence`: its variants, its stored results and its page, docs/results/evidence.md."""

import json
import math

import numpy as np
import pytest

from benchmarks.evidence import VARIANTS, Results, held_out_losses, is_trained, parse, study_config, variant_config
from benchmarks.evidence_page import TABLES, write_page
from configs.evidence import get_config
from layerskip_jax.errors import UserError
from layerskip_jax.recipe.recipe import Recipe


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_the_recipe_of_its_name(name):
    config = variant_config(study_config(get_config(), None, []), name, seed=3)
    recipe, layers = Recipe.from_config(config), config.model.num_layers
    steps = range(0, config.train.steps, config.train.steps // 20)
    dropped = max(float(np.max(recipe.drop_rates(step))) for step in steps)
    exits = [int(np.sum(np.asarray(recipe.exit_weights(step)) > 0)) for step in range(2 * layers)]
    assert (dropped > 0) == (name not in ("plain", "exits"))
    assert (max(exits) == 1) == (name in ("plain", "dropout", "tuned"))
    assert (min(exits) > 2) == (name == "all_exits")
    assert config.train.seed == 3
    assert config.train.run_dir == f"runs/evidence/code/{name}-3"
    assert config.train.steps * config.train.batch_size * config.data.sequence_length >= 10_000_000
    assert not is_trained(config)


def test_prose_has_a_separate_folder_and_tokenizer():
    config = study_config(get_config(), "texts", [])
    assert (config.data.source, config.data.path) == ("text", "texts")
    assert config.data.tokenizer == "runs/evidence/prose/tokenizer.model"


def test_a_variant_that_is_not_trained_cannot_be_decoded():
    assert parse(["--variants", "plain", "tuned", "--decoded", "tuned"])[1].decoded == ["tuned"]
    with pytest.raises(UserError, match="--decoded must be among --variants, and tuned is not"):
        parse(["--variants", "plain", "--decoded", "plain", "tuned"])


def test_a_variant_at_a_width_has_the_same_recipe_and_the_wider_model():
    study = study_config(get_config(), None, [64, 128])
    narrow, wide = (variant_config(study, f"tuned@{dim}", seed=1) for dim in (64, 128))
    assert narrow.model == get_config().model
    assert (wide.model.dim, wide.model.ffn_dim, wide.model.num_heads) == (128, 352, 2)
    assert wide.early_exit == narrow.early_exit == variant_config(study, "tuned", seed=1).early_exit
    assert wide.train.run_dir == "runs/evidence/widths/tuned@128-1"


def test_measured_parts_are_stored_before_the_next_part_fails(tmp_path):
    results, calls = Results(tmp_path), []

    def fail():
        raise OSError("no space left")

    for _ in range(2):
        assert results.once("quality/plain-0", lambda: calls.append(1) or {"value": 1}) == {"value": 1}
        with pytest.raises(OSError, match="no space left"):
            results.once("steps", fail)
    assert calls == [1]
    assert results.parts()["quality/plain-0"]["measured"] == {"value": 1}
    assert set(results.parts()) == {"quality/plain-0"}


def test_the_losses_of_every_evaluation_are_read_from_the_metrics(tmp_path):
    lines = [
        {"step": step, "validation/exit_loss/1": 3.0 - step, "validation/exit_loss/2": 2.0 - step} for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_losses(str(tmp_path), 2) == {"1": [2.0, 1.0], "2": [1.0, 0.0]}


def measurement(name, speedup, **settings):
    return {
        "name": name, "settings": settings, "speedup": speedup, "predicted": 1.5 if settings else None,
        "acceptance": 0.5, "tokens_per_second": 100.0 * speedup, "identical": True,
    }  # fmt: skip


def make_parts(middles):
    """Return parts of runs with twelve exits: the middle one's loss as given, all others 2."""
    about = {"commit": "abc", "machine": "here", "seconds": 1.0}
    parts = {}
    for run, middle in middles.items():
        loss = [2.0] * 5 + [middle] + [2.0] * 6
        quality = {
            "held_out_loss_by_exit": loss, "agreement_by_exit": [0.5] * 12, "tokens": 1_000_000, "seconds": 60.0,
            "held_out_loss": {str(step): loss for step in range(1, 11)}, "arrays": "f" * 64,
        }  # fmt: skip
        parts[f"quality/{run}"] = {"measured": quality, "about": about}
    ways = [measurement("plain", 1.0), measurement("E=3 d=2", 1.2, exit_layer=3, draft_length=2)]
    ways += [
        measurement("E=4 d=2", 1.4, exit_layer=4, draft_length=2),
        measurement("adaptive", 1.3),
        measurement("prompt_lookup", 0.9),
    ]
    last = {"one_fixed_for_all": "E=4 d=2", "speedup": 1.4, "adaptive": 1.3, "adaptive/one_fixed": 1.3 / 1.4}
    more = {"exit_layer": 4, "draft_length": 2, "reuse": {"tokens_per_second": 1.0, "with/without": 1.1}}
    more["temperature"] = [{"temperature": 0.0, "acceptance": 0.5, "speedup": 1.4}]
    steps = {"plain": {"of_plain": 1.0, "tokens_per_second": 1000.0}}
    for name, one in {
        "decoding/layerskip": {"ways": {"code": ways}, "summary": [last]}, "more/layerskip": more, "steps": steps,
    }.items():  # fmt: skip
        parts[name] = {"measured": one, "about": about}
    return parts


def test_the_page_gets_its_tables_and_plots_and_keeps_the_text_between_them(tmp_path):
    page = tmp_path / "evidence.md"
    marks = "\n".join(f"<!-- evidence: code {name} -->\nold\n<!-- end -->" for name in TABLES)
    page.write_text(f"# By hand\n{marks}\n<!-- evidence: prose exits -->\nkept\n<!-- end -->\nthe end\n")
    # Two seeds of one variant are averaged; `-again` is a rerun, and not a seed.
    parts = make_parts({"plain-0": 4.0, "layerskip-0": 1.0, "layerskip-1": 2.0, "plain-0-again": 9.0})
    for _ in range(2):
        written = write_page(page, "code", get_config(), parts)
    text = page.read_text()
    assert text.startswith("# By hand\n")
    assert text.endswith("kept\n<!-- end -->\nthe end\n")
    assert "old" not in text
    assert f"| {math.exp(1.5):.1f} | {math.exp(2.5):.2f}x | +0.0% |" in text  # e^(4 - 1.5) times the perplexity
    assert "| layerskip | code | 100 | E=4 d=2 | 50.0% | 1.40x | 1.50x |" in text
    assert "| plain-0-again | 1.0M | 1 min |" in text
    assert all(path.exists() for path in written)
    assert len(written) == 5
    # Published parts are added to another folder, except those that it has.
    results = Results(tmp_path / "elsewhere")
    results.once("steps", lambda: {"own": 1})
    results.add_published(tmp_path / "code.json")
    assert results.parts() == parts | {"steps": results.parts()["steps"]}
    assert results.once("steps", pytest.fail) == {"own": 1}
    assert results.has("quality/layerskip-1")
    write_page(tmp_path / "new.md", "code", get_config(), parts)
    assert "| layerskip | code | 100 | E=4 d=2 |" in (tmp_path / "new.md").read_text()


def test_widths_are_compared_with_the_plain_model_of_the_same_width_and_steps_are_not(tmp_path):
    parts = make_parts(
        {"plain@64-0": 4.0, "tuned@64-0": 1.0, "plain@128-0": 2.0, "tuned@128-0": 1.0, "tuned@256-0": 0.5}
    )
    del parts["steps"]
    write_page(tmp_path / "new.md", "widths", get_config(), parts)
    rows = [line for line in (tmp_path / "new.md").read_text().splitlines() if line.startswith("| tuned@")]
    assert f"| {math.exp(3.0):.2f}x | +0.0% |" in rows[0]
    assert f"| {math.exp(1.0):.2f}x | +0.0% |" in rows[1]
    assert rows[2].endswith("|  |  |")  # no plain model of this width
    assert "steps" not in (tmp_path / "new.md").read_text()
