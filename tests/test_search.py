"""`layerskip search`: a study from a cold start to a config file, its resumption, and its errors."""

import dataclasses
import json
import math
import os
import signal

import jax
import optuna
import pytest
from corpora import VOCABULARY

from layerskip_jax.command_line import load_config_file
from layerskip_jax.commands import search, search_report
from layerskip_jax.commands.search import proxy_config
from layerskip_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.decoding.cost import best_speedup, predicted_speedup
from layerskip_jax.errors import Interrupted, UserError
from layerskip_jax.locations import folder_lock
from layerskip_jax.presets import pretraining, trained_to_draft
from layerskip_jax.training.bad_steps import Diverged
from layerskip_jax.training.search_space import RECOMMENDED, RecipeQuality, default_space, frontier

SPACE = """
def get_space():
    def space(trial, config, exits):
        weight = trial.suggest_float("weight", 0.1, 1.0)
        return {"early_exit.curriculum": "fixed", "early_exit.exits": (exits[0],), "early_exit.exit_weights": (weight,)}
    return space
"""


@pytest.fixture
def options(corpus, tmp_path):
    """The words of a search over a model of four layers, nine steps a trial."""
    (tmp_path / "space.py").write_text(SPACE)
    model = {"num_layers": 4, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": VOCABULARY}
    settings = {f"model.{name}": value for name, value in model.items()}
    settings |= {
        f"data.{name}": getattr(corpus, name)
        for name in ("source", "path", "tokenizer", "sequence_length", "shuffle_window")
    }
    settings |= {"train.batch_size": 8, "train.loss_chunk": 8, "train.evaluate_batches": 1, "optimizer.warmup_steps": 1}
    words = [
        str(tmp_path / "study"),
        "--steps",
        "9",
        "--trials",
        "3",
        "--width",
        "8",
        "--space",
        str(tmp_path / "space.py"),
    ]
    return words + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_a_search_writes_the_best_recipe_and_resumes(options, tmp_path, capsys, monkeypatch):
    """The first trial is interrupted after its last step, and the last before its first; each is taken up again."""
    trained, train = [], search.train

    def interrupted(config, **more):
        trained.append(config)
        if len(trained) != 5:
            train(config, **more)
        if len(trained) in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(search, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search.main(options)
    search.main(options)
    capsys.readouterr()
    plain, stopped, resumed, _, last, resumed_last = trained
    assert (plain.early_exit.curriculum, plain.layer_dropout.p_max) == ("none", 0)
    assert (resumed, resumed_last) == (stopped, last)
    assert all(config.model.dim == 8 and config.model.num_layers == 4 for config in trained)

    rows = json.loads((tmp_path / "study/search.json").read_text())
    scores = [RecipeQuality(row["loss_increase"], row["agreement"], row["speedup"]).score(0.005) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert any(row["frontier"] for row in rows)
    assert (tmp_path / "study/frontier.png").read_bytes().startswith(b"\x89PNG")
    best = load_config_file(str(tmp_path / "study/best.py"))
    assert best.early_exit.exits == (1,)
    assert (best.model.num_layers, best.data.sequence_length) == (
        4,
        trained[0].data.sequence_length,
    )  # from the command
    assert best.train.run_dir == str(tmp_path / f"study/best-{rows[0]['trial']}")
    assert list(best.early_exit.exit_weights) == rows[0]["settings"]["early_exit.exit_weights"]

    before = len(trained)
    search.main([*options, "--json"])  # all three trials are there
    assert len(trained) == before
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows

    with pytest.raises(UserError, match="belongs to another config"):
        search.main([*options, "--steps", "18"])


def test_a_signal_in_the_last_evaluation_of_a_trial_stops_the_search(options, monkeypatch):
    quality, calls = search.exit_quality, []

    def measured(*arguments):
        calls.append(arguments)
        if len(calls) == 9:  # the first trial has nine steps, each with an evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return quality(*arguments)

    monkeypatch.setattr(search, "exit_quality", measured)
    with pytest.raises(Interrupted, match="SIGINT: the search stopped between two trials"):
        search.main(options)
    assert len(calls) == 9


def test_a_space_without_a_valid_recipe_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr(search.Search, "train_plain", lambda self: None)
    (tmp_path / "space.py").write_text(SPACE.replace("(weight,)", "(-weight,)"))
    with pytest.raises(UserError, match=r"the search space has no valid point: 20 .*exit_weights must be at least 0"):
        search.main(options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("return None", r"the function of .*space\.py returned a NoneType, not a dict"),
        ("return {'a': 1 / 0}", r"search space file .*space\.py, line 4: ZeroDivisionError"),
    ],
)
def test_an_error_in_the_space_is_one_line(options, tmp_path, monkeypatch, function, message):
    monkeypatch.setattr(search.Search, "train_plain", lambda self: None)
    lines = ["def get_space():", "    def space(trial, config, exits):", "        # chooses", f"        {function}"]
    (tmp_path / "space.py").write_text("\n".join([*lines, "    return space", ""]))
    with pytest.raises(UserError, match=f"^{message}"):  # not only if it happens in all trials
        search.main(options)


def test_a_folder_has_one_search_at_a_time(options, tmp_path):
    (tmp_path / "study").mkdir()
    with (
        folder_lock(tmp_path / "study", wait=False),
        pytest.raises(UserError, match="another layerskip search runs in"),
    ):
        search.main(options)
    assert not list((tmp_path / "study").iterdir())


def test_an_error_that_is_not_the_recipes_ends_the_search(options, monkeypatch):
    """A resumed search then takes the same trial up."""
    tried = []

    def full_disk(config, **more):
        tried.append(config)
        raise UserError("no space left")

    monkeypatch.setattr(search.Search, "train_plain", lambda self: None)
    monkeypatch.setattr(search, "train", full_disk)
    for _ in range(2):
        with pytest.raises(UserError, match="no space left"):
            search.main(options)
    assert tried[0] == tried[1]


def test_a_recipe_that_diverges_counts_as_a_trial(options, monkeypatch, capsys):
    def diverges(config, **more):
        raise Diverged("4 steps in a row were not applied")

    monkeypatch.setattr(search.Search, "train_plain", lambda self: None)
    monkeypatch.setattr(search, "train", diverges)
    with pytest.raises(UserError, match="no trial was trained to the end"):
        search.main(options)
    assert capsys.readouterr().out.count("diverged") == 3


@pytest.mark.parametrize(("devices", "rows"), [(1, 8), (3, 9), (8, 8), (16, 16)])
def test_a_proxy_has_rows_for_every_device(devices, rows, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert proxy_config(Config(train=TrainConfig(batch_size=64)), 64, 9).train.batch_size == rows
    assert proxy_config(Config(train=TrainConfig(batch_size=2)), 64, 9).train.batch_size == max(2, devices)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--draft_exits", "4"], "--draft_exits must be in 1..3, not 4"),
        (["--width", "7"], "--width must be a multiple of 2, or 0"),
        (["--width", "130"], "--width must be a multiple of 4, or 0"),
        (["--loss_tolerance", "nan"], "nan"),
    ],
)
def test_wrong_options_are_refused(options, more, message):
    with pytest.raises(UserError, match=message):
        search.main([*options, *more])


@pytest.mark.parametrize("folder", ["gs://bucket/study", "space.py"])
def test_a_folder_that_cannot_hold_a_database_is_refused(options, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="FOLDER must be a local folder"):
        search.main([folder, *options[1:]])
    assert {path.name for path in tmp_path.iterdir()} == {"space.py"}


def test_trials_without_their_database_are_refused(options, tmp_path):
    (tmp_path / "study/trials/plain").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(UserError, match="trials belongs to a study that is gone"):
            search.main(options)


def test_a_file_that_is_no_database_is_refused(options, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match="cannot be opened as a study"):
        search.main(options)


def test_the_default_space_gives_valid_recipes():
    config, study = Config(model=ModelConfig(num_layers=8)), optuna.create_study()
    for _ in range(100):
        overrides = default_space(study.ask(), config, [1, 2])
        recipe = search.apply_overrides(config, overrides)
        assert recipe.early_exit.exits[0] in (1, 2)
        assert set(recipe.early_exit.exits[1:]) <= {4}


def test_a_search_tries_the_recommended_recipe_first():
    study = optuna.create_study()
    study.enqueue_trial(RECOMMENDED | {"exit": 3})
    config = Config(model=ModelConfig(num_layers=12))
    overrides = default_space(study.ask(), config, [2, 3])
    found, wanted = apply_overrides(config, overrides), trained_to_draft(pretraining(config.model), exit_layer=3)
    early = dataclasses.replace(wanted.early_exit, exit_weights=(0.5,))
    assert (found.early_exit, found.layer_dropout) == (early, wanted.layer_dropout)
    assert found.optimizer == config.optimizer


def test_a_proxy_keeps_the_layers_and_whole_rungs():
    config = Config(model=dataclasses.replace(ModelConfig(), num_layers=24, dim=2048, ffn_dim=5504))
    proxy = proxy_config(config, width=64, steps=100)
    assert (proxy.model.num_layers, proxy.model.dim, proxy.model.ffn_dim) == (24, 64, 176)
    assert proxy.train.steps == 9 * proxy.train.evaluate_every == 108
    assert proxy_config(config, width=0, steps=9).model == config.model


def test_a_proxy_fits_its_schedule_and_prompts(corpus):
    """The warmup ends before the decay of wsd begins; prompts and responses keep the length that they need."""
    wsd = OptimizerConfig(schedule="wsd", decay_fraction=0.95, warmup_steps=40)
    assert proxy_config(Config(optimizer=wsd), width=64, steps=450).optimizer.warmup_steps == 22
    pairs = DataConfig(source="jsonl", path="pairs", prompt_key="prompt", sequence_length=512)
    assert proxy_config(Config(data=pairs), width=64, steps=9).data.sequence_length == 512


@pytest.mark.parametrize(("length", "chunk"), [(200, 200), (300, 50), (96, 96), (64, 64)])
def test_a_proxy_of_a_valid_config_is_valid(corpus, length, chunk):
    """Whatever its batches, chunks and initial weights are."""
    data = dataclasses.replace(corpus, sequence_length=length)
    train = TrainConfig(batch_size=32, accumulate=16, loss_chunk=chunk, init_from="meta-llama")
    proxy = proxy_config(Config(data=data, train=train), width=64, steps=9)
    assert proxy.data.sequence_length % proxy.train.loss_chunk == 0
    assert (proxy.train.init_from, proxy.model.vocab_size) == ("", VOCABULARY)


def test_scores_and_the_best_draft_length():
    assert RecipeQuality(0.004, 0.7, 1.5).score(0.005) == 1.5
    assert RecipeQuality(math.nan, 1.0, 3.0).score(0.005) == -math.inf
    assert RecipeQuality(0.007, 0.7, 1.5).score(0.005) == pytest.approx(1.3)
    config = ModelConfig(num_layers=8)
    assert best_speedup(config, 2, 0.0) == 1  # drafts nothing
    assert best_speedup(config, 2, 1.0) == pytest.approx(predicted_speedup(config, 2, 12, 13))
    assert frontier([RecipeQuality(0, 0.5, 1), RecipeQuality(0, 0.5, 1)]) == [True, True]


def test_progress_goes_to_stderr_if_the_result_is_json(options, capsys):
    search.main([*options, "--json"])
    printed = capsys.readouterr()
    assert {"trial", "loss_increase", "frontier"} <= json.loads(printed.out.splitlines()[0]).keys()
    assert "plain: loss" in printed.err
    assert "trial 0:" in printed.err


def test_a_wrong_space_can_be_corrected(options, tmp_path, monkeypatch):
    """Until a trial ends. The trials of the wrong space are not resumed, but the plain model's losses are kept."""
    monkeypatch.setattr(search.Search, "train_plain", lambda self: self.study.set_user_attr("plain_loss", {"9": 2.5}))
    space, tried = tmp_path / "space.py", []

    def stop(config, **more):
        tried.append(config)
        raise UserError("stopped")

    monkeypatch.setattr(search, "train", stop)
    correct = space.read_text()
    for text, message in [("1 / 0", "ZeroDivisionError"), ("2 * weight,", "stopped"), ("weight,", "stopped")]:
        space.write_text(correct.replace("(weight,)", f"({text})"))
        with pytest.raises(UserError, match=message):
            search.main(options)
    study = optuna.load_study(study_name="layerskip", storage=f"sqlite:///{tmp_path}/study/study.db")
    assert [trial.user_attrs["overrides"]["early_exit.exit_weights"] for trial in study.trials] == [
        [trial.params["weight"]] for trial in study.trials
    ]
    assert len(study.trials) == 1
    assert study.user_attrs["plain_loss"] == {"9": 2.5}
    assert len(tried) == 2


def test_a_note_says_that_the_best_recipe_exceeds_the_tolerance(capsys):
    good, better = (RecipeQuality(0.004, 0.7, 1.45), {}, 1), (RecipeQuality(0.006, 0.8, 1.6), {}, 2)
    search_report._note_tolerance([better, good], 0.005)
    assert "exceeds the loss tolerance of 0.50 % by 0.10 %; trial 1 is the best within it" in capsys.readouterr().err
    search_report._note_tolerance([better], 0.005)
    assert "no recipe is within it" in capsys.readouterr().err
    search_report._note_tolerance([good], 0.005)
    assert not capsys.readouterr().err
