"""The report of a run, its plot of exits and tokens, and the sinks of metrics."""

import base64
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib import pyplot
from models import tiny_model

from layerskip_jax.checkpoint.swept import store_swept
from layerskip_jax.commands import report, sweep
from layerskip_jax.commands.plots import _draw_schedules
from layerskip_jax.config import Config, EarlyExitConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.token_exits import settling_exits, token_exits
from layerskip_jax.training.monitoring.metrics import MetricsWriter, read_records


@given(arrays.arrays(int, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.integers(0, 2)))
def test_the_settling_exit_is_the_earliest_from_which_all_agree(next_LT):
    for token, settled in enumerate(settling_exits(next_LT).tolist()):
        column = next_LT[:, token].tolist()
        holds = [
            exit_layer for exit_layer in range(1, len(column) + 1) if set(column[exit_layer - 1 :]) == {column[-1]}
        ]
        assert settled == min(holds)


def test_each_exit_predicts_like_the_truncated_model(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    model = tiny_model(4, vocab_size=tokenizer.vocab_size, num_layers=2).unstacked()
    figure = token_exits(model, tokenizer, "def x", 5)
    assert len(figure.settled) == len(figure.predicted) <= 5
    forward = jax.jit(lambda model, tokens: model(tokens)[0].argmax(-1))
    prompt = [tokenizer.bos_id, *tokenizer.encode("def x")]
    tokens = jnp.zeros((1, 64), int).at[0, : len(prompt)].set(jnp.array(prompt))
    for at, predicted in enumerate(figure.predicted, len(prompt) - 1):
        for exit_layer in (1, 2):
            own = forward(model.first_layers(exit_layer), tokens)[at]
            assert predicted[exit_layer - 1] == tokenizer.decode([int(own)])
        tokens = tokens.at[0, at + 1].set(own)


def test_a_report_is_one_self_contained_page(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run").as_posix()
    measurement = sweep.Measurement({"exit_layer": 1}, 10.0, 1.5, 0.5, 2.0, 2.0, 1.0, True)
    sweep.plot([measurement, measurement], [1], [2], Path(run, "plots", "sweep.png"))
    store_swept(run, {"exit_layer": 1}, {"tokens_per_second": 10.0})
    report.main([run, "--new_tokens", "6", "--batches", "1", "--prompt", "def <x>"])
    page = Path(capsys.readouterr().out.strip()).read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "def &lt;x&gt;" in page
    assert "&quot;tokens_per_second&quot;: 10.0" in page  # stored by a sweep
    assert page.count("<tr>") - 1 <= 6
    assert {path.name for path in Path(run, "plots").iterdir()} >= {"quality.png", "tokens_0.png", "loss.png"}


def test_missing_text_is_reported_on_the_page(trained_run, tmp_path, monkeypatch):
    def no_text(*_):
        raise UserError("no corpus at <gone>")

    monkeypatch.setattr(report, "checkpoint_quality", no_text)
    page = report.write_report(shutil.copytree(trained_run, tmp_path / "run").as_posix(), ["x"], 2, 1).read_text()
    assert "Not measured: no corpus at &lt;gone&gt;" in page
    assert "Not swept yet" in page
    monkeypatch.setattr(report, "read_prompts", no_text)
    page = report.write_report((tmp_path / "run").as_posix(), None, 2, 1).read_text()
    assert "Not shown: no corpus at &lt;gone&gt;; --prompt TEXT names a text" in page
    with pytest.raises(UserError, match="no checkpoint at"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--batches: must be at least 1, not 0"):
        report.main([trained_run, "--batches", "0"])


def test_metrics_go_to_wandb(tmp_path, monkeypatch, capsys):
    """With a stub of the module that is strict about its arguments."""
    runs = []

    class Run:
        def __init__(self):
            self.logged, self.finished = [], False

        def log(self, data, *, step):
            assert type(data) is dict
            self.logged.append((step, data))

        def finish(self):
            self.finished = True

    def init(*, project, name, id, resume, config):
        assert (project, name, resume) == ("layers", "run", "allow")
        assert config["train"]["wandb_project"] == "layers"
        runs.append((id, Run()))
        return runs[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = Config(train=TrainConfig(run_dir=str(tmp_path / "run"), wandb_project="layers"))
    for step in (1, 2):  # the restarted run keeps its id
        writer = MetricsWriter(config)
        writer.write(step, {"train/loss": np.float64(2.5), "sample": "def"})
        writer.close()
    assert [run.logged for _, run in runs] == [[(step, {"train/loss": 2.5, "sample": "def"})] for step in (1, 2)]
    assert all(run.finished for _, run in runs)
    assert runs[0][0] == runs[1][0]
    assert [record["step"] for record in read_records(str(tmp_path / "run"))] == [1, 2]

    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    MetricsWriter(config).close()
    assert "WARNING: no more metrics are written to Weights & Biases: no API key" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'layerskip-jax\[wandb\]'"):
        MetricsWriter(config)


def test_schedules_show_a_few_rotations_or_else_the_whole_run():
    drawn = []
    for curriculum in ("rotational", "gradual", "all"):
        early = EarlyExitConfig(curriculum=curriculum, dilation=3)
        config = Config(early_exit=early, train=TrainConfig(steps=1000))
        _, axes = pyplot.subplots(1, 2)
        _draw_schedules(axes, {}, config)
        (image,) = axes[1].get_images()
        drawn.append((image.get_array().shape, image.get_extent()[:2]))
        weights = np.asarray(image.get_array())
        np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
        assert weights[1].max() > 0  # also the early exits of the gradual curriculum, which start late
        pyplot.close("all")
    assert drawn == [((12, 12), [-0.5, 11.5]), ((12, 200), [-0.5, 999.5]), ((12, 200), [-0.5, 999.5])]
