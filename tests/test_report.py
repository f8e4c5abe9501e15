"""The report of a run, its plot of exits and tokens, and the sinks of metrics."""

import base64
import contextlib
import dataclasses
import html.parser
import json
import math
import re
import shlex
import shutil
import sys
import types
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from models import tiny_model

from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.checkpoint.swept import store_swept
from layerskip_jax.command_line import load_config_file, make_parser, parse_config
from layerskip_jax.commands import plots, report, sweep
from layerskip_jax.commands.plots import Run, exits_picture, find_plain, loss_picture, plot_run, schedules_picture
from layerskip_jax.config import Config, DecodeConfig, EarlyExitConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import ExitQuality
from layerskip_jax.evaluation.pictures import DEPTHS, LINES, PAGE, contrast, smooth
from layerskip_jax.evaluation.token_exits import (
    TokenExits,
    acceptance_by_exit,
    as_html,
    predict_continuations,
    settling_exits,
    token_exits,
    visible,
)
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


class Page(html.parser.HTMLParser):
    """Collects the headings, pictures, texts outside the style, and external resources of a report."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.alts, self.loads, self.dark, self.texts = [], [], [], [], 0, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "srcset", "href", "data")]
        if tag == "img":
            self.alts.append(attributes["alt"])
        self.dark += tag == "source" and attributes["media"] == "(prefers-color-scheme: dark)"
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append((tuple(self.open), data))
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)

    def within(self, tag):
        return "".join(data for path, data in self.texts if tag in path)


def test_a_report_is_one_self_contained_page(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run").as_posix()
    shutil.copytree(trained_run, tmp_path / "run_plain")
    measurement = sweep.Measurement({"exit_layer": 1}, 10.0, 1.5, 0.5, 2.0, 2.0, 1.0, True, 1.2)
    sweep.save_picture([measurement, measurement], [1], [2], Path(run, "plots", "sweep.png"))
    store_swept(run, {"exit_layer": 1}, {"tokens_per_second": 10.0})
    report.main([run, "--new_tokens", "6", "--batches", "1", "--prompt", "def <x>"])
    text = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"url\(|@import|https?:", text)
    assert all(link.startswith("data:image/png;base64,") for link in page.loads)
    assert all(base64.b64decode(link.partition(",")[2]).startswith(b"\x89PNG") for link in page.loads)
    assert page.headings == [
        "run: step 3", "Loss of a few exits", "Loss, agreement and acceptance by exit", "Speed", "Schedules",
        "A sample", "Which layer first predicts each token", "Settings",
    ]  # fmt: skip
    assert len(page.alts) == page.dark + 1 == 5  # the picture of the sweep is light only
    assert all(len(alt) > 30 and "nan" not in alt for alt in page.alts)
    lead = next(data for path, data in page.texts if path[-1:] == ("p",))
    assert re.fullmatch(
        r"A language model of 18\.7k parameters in 4 layers, trained with LayerSkip \(a loss at exits 2-3\) on \d+ "
        r"tokens of .*; its first layer drafts the text that all 4 verify\.", lead
    ), lead  # fmt: skip
    names = [data for path, data in page.texts if path[-1:] == ("dt",)]
    assert names == ["Parameters", "Tokens", "Held-out loss", "Acceptance", "Decoding", "Training"]
    assert "; plain model " in page.within("dd")
    assert "layerskip train --model.num_layers 4 --model.dim 16" in page.within("pre")
    assert "def <x>" in page.within("pre")  # the sample
    assert "Exit 1 (\u2020) had no loss in training" in page.within("p")
    assert '"tokens_per_second": 10.0' in page.within("details")  # stored by a sweep
    assert '"run_dir"' in page.within("details")
    assert "run_dir" not in "".join(data for path, data in page.texts if "details" not in path and "pre" not in path)
    assert 1 <= text.partition('class="tokens"')[2].count("<tr>") - 1 <= 6
    written = {path.name for path in Path(run, "plots").iterdir()}
    assert written == {f"{name}.png" for name in ("loss", "exits", "speed", "schedules", "sweep")}


def test_the_command_of_a_report_gives_the_same_config(trained_run):
    tricky = TrainConfig(sample_prompt='it\'s "a b" $HOME\n', run_dir="my runs/é", batch_size=4)
    configs = [load_config_file(str(file)) for file in sorted(Path("configs").glob("[a-z]*.py"))]
    early = EarlyExitConfig(curriculum="fixed", always_last=False, exits=(2, 3), exit_weights=(0.5, 1.0))
    for config in [
        Config(),
        Config(train=tricky, early_exit=early),
        read_config(find_checkpoint(trained_run)),
        *configs,
    ]:
        words = shlex.split(" ".join(report.train_command(config)))
        assert words[:2] == ["layerskip", "train"]
        same = dataclasses.replace(config, distributed=Config().distributed)  # it describes machines, not the run
        assert parse_config(make_parser(""), words[2:])[0] == same


def drawn(picture):
    """Return the axes of a picture, as drawn."""
    figure = Figure()
    axes = figure.subplots(1, picture.panels, squeeze=False)[0]
    picture.draw(axes)
    return axes


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_loss_of_a_few_exits_is_smoothed_and_shown_with_the_plain_models(trained_run):
    run = Run.open(trained_run)
    steps = range(1, 101)
    noise = np.random.default_rng(0).normal(size=(16, 100))
    losses = {
        f"{kind}/exit_loss/{e}": {step: 8 / (1 + step / 20) + 1 / e + noise[e - 1, step - 1] for step in steps}
        for kind in ("train", "validation")
        for e in range(1, 17)
    }
    losses["train/exit_loss/16"][50] = math.nan  # of a step that was not applied
    model = dataclasses.replace(run.config.model, num_layers=16)
    config = dataclasses.replace(run.config, model=model, early_exit=EarlyExitConfig("all"))
    run = dataclasses.replace(run, config=config, metrics=losses)
    plain = dataclasses.replace(run, config=dataclasses.replace(config, early_exit=EarlyExitConfig("none")))
    for axis in drawn(loss_picture(run, plain)):
        assert labels(axis) == ["exit 2, drafts", "exit 8", "exit 16, full model", "plain model"]
    (train, _) = drawn(loss_picture(run, plain))
    smoothed = {line.get_label(): line for line in train.lines if not line.get_label().startswith("_")}
    assert len(train.lines) == 2 * len(smoothed)  # the values are faint behind the averages
    true = 8 / (1 + np.arange(21, 81) / 20) + 1 / 8
    error = np.abs(smoothed["exit 8"].get_ydata()[20:80] - true)
    assert error.max() < np.abs(noise[7, 20:80]).max() / 2
    rarely = {name: values for name, values in losses.items() if name != "train/exit_loss/2"}  # never logged
    rare, held_out = drawn(loss_picture(dataclasses.replace(run, metrics=rarely)))
    assert labels(rare) == ["exit 8", "exit 16, full model"]
    assert labels(held_out) == ["exit 2, drafts", "exit 8", "exit 16, full model"]
    shades = [contrast(to_rgb(smoothed[name].get_color()), (1, 1, 1)) for name in labels(train)[:3]]
    assert shades in (sorted(shades), sorted(shades, reverse=True))  # a sequential scale
    distilled = dataclasses.replace(config, early_exit=EarlyExitConfig("all", distillation="kl"))
    train, validation = drawn(loss_picture(dataclasses.replace(run, config=distilled)))
    assert labels(train) == ["exit 16, full model"]  # the losses of the others are no cross-entropies
    assert labels(validation) == ["exit 2, drafts", "exit 8", "exit 16, full model"]
    assert len(labels(drawn(loss_picture(plain))[0])) == 1  # a plain model has no other loss than that of the last exit


def test_exits_show_loss_agreement_acceptance_the_draft_exit_and_the_plain_model(trained_run):
    run = Run.open(trained_run)
    quality = ExitQuality(np.array([4.0, 3, 2.5, 2]), np.array([0.2, 0.6, 0.8, 1]))
    plain = ExitQuality(np.array([9.0, 8, 6, 2]), np.array([0.1, 0.2, 0.5, 1]))
    loss, agreement = drawn(exits_picture(run, quality, plain, np.array([0.1, 0.4, 0.6, 1])))
    assert labels(loss) == ["this model", "plain model", "draft exit 2"]
    assert labels(agreement) == ["this model", "plain model", "acceptance, 3 drafts a round", "draft exit 2"]
    curves = {line.get_label(): line for line in agreement.lines}
    np.testing.assert_array_equal(curves["this model"].get_xydata(), np.c_[1:5, quality.agreement_L])
    np.testing.assert_array_equal(curves["plain model"].get_ydata(), plain.agreement_L)
    np.testing.assert_array_equal(curves["acceptance, 3 drafts a round"].get_xydata(), np.c_[1:4, [0.1, 0.4, 0.6]])
    assert set(curves["draft exit 2"].get_xdata()) == {2}
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), plain.loss_L)
    unmeasured = exits_picture(run, run.last_quality())
    (loss,) = drawn(unmeasured)
    assert labels(loss) == ["this model", "draft exit 2"]
    assert "nan" not in unmeasured.alt


def test_the_metrics_of_a_checkpoint_end_at_its_step(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 4, "train/objective": 2.5}) + "\n")
    assert list(Run.open(str(run)).series("train/objective")[0]) == [1, 2, 3, 4]
    assert list(Run.open(str(run / "checkpoints" / "3")).series("train/objective")[0]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"draft_length": 5}, "drafts from exit 2"),
        ({"policy": "adaptive", "exits": (1, 3)}, "drafts from exits 1 3"),
        ({"lookup_length": 4}, "drafts from exit 2 and lookups"),
    ],
)
def test_the_report_names_where_drafts_come_from(trained_run, settings, expected):
    run = Run.open(trained_run)
    run = dataclasses.replace(run, decode=dataclasses.replace(run.decode, **settings))
    assert report._draft_source(run) == expected


def test_a_plain_run_in_the_same_folder_is_found_and_a_given_one_must_exist(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run").as_posix()
    assert find_plain(run, None) == ""
    shutil.copytree(trained_run, tmp_path / "run_plain")
    assert find_plain(run, None) == find_plain(f"{run}/", None) == f"{run}_plain"
    assert find_plain(run, "other") == "other"
    with pytest.raises(UserError, match="no checkpoint at"):
        plot_run(run, f"{tmp_path}/nowhere")


def test_acceptance_by_exit_is_that_of_decoding_from_each_exit():
    model, tokens, d = tiny_model(5, num_layers=3).unstacked(), 40, 3
    prompts = [[1, 2, 3], [4], [9, 8, 7, 6]]
    plain = generate(model, prompts, tokens + d - 1, Autoregressive(Greedy()))  # the last round drafts beyond the text
    acceptance_L = acceptance_by_exit(predict_continuations(model, prompts, plain.tokens), d)
    for exit_layer in (1, 2, 3):
        ours = generate(model, prompts, tokens, SelfSpeculative(Greedy(), Fixed(exit_layer, d)))
        assert acceptance_L[exit_layer - 1] == pytest.approx(ours.acceptance)
    assert acceptance_L[0] < acceptance_L[2] == 1
    assert np.isnan(acceptance_by_exit([np.zeros((2, d - 1))], d)).all()


@given(st.text(), st.sampled_from(["", " ", " \n\t"]))
def test_every_character_of_a_token_is_visible(text, keep):
    shown = visible(text, keep)
    assert all(c in keep or unicodedata.category(c)[0] not in "ZC" for c in shown)
    rest = iter(shown)  # its other characters stay, in their order
    assert all(c in rest for c in text if c in keep or unicodedata.category(c)[0] not in "ZC")
    plain = "".join(c for c in text if unicodedata.category(c)[0] not in "ZCM")
    assert visible(plain) == plain


@given(st.lists(st.lists(st.text(max_size=4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_cells_show_tokens_as_they_are_with_enough_contrast(predicted):
    figure = TokenExits("x", predicted, [1 + number % 3 for number in range(len(predicted))])
    cells = re.findall(r"<td(?: style=\"background:(#\w+);color:(#\w+)\")?>(.*?)</td>", as_html(figure, [1]), re.DOTALL)
    assert [html.unescape(text) for *_, text in cells] == [visible(token) for row in predicted for token in row]
    assert all(contrast(to_rgb(color), to_rgb(ink)) >= 4.5 for color, ink, _ in cells if color)


def test_texts_and_lines_have_enough_contrast_in_both_modes():
    for theme, page in PAGE.items():
        back = [to_rgb(page["background"]), to_rgb(page["panel"])]
        for name in ("text", "muted", "accent"):
            assert min(contrast(to_rgb(page[name]), color) for color in back) >= 4.5
        depths = colormaps["viridis"](np.linspace(*DEPTHS[theme], 33))
        assert min(contrast(color, back[0]) for color in [*depths, *map(to_rgb, LINES[theme].split())]) >= 3


@given(arrays.arrays(float, st.integers(1, 200), elements=st.floats(-10, 10)))
def test_smoothing_keeps_straight_lines_and_the_range(values):
    averages = smooth(values)
    assert averages.shape == values.shape
    assert values.min() - 1e-9 <= averages.min() <= averages.max() <= values.max() + 1e-9
    line, edge = np.arange(len(values)), len(values) // 10 + 1
    np.testing.assert_allclose(smooth(line)[edge:-edge], line[edge:-edge], atol=1e-9)


def test_missing_text_is_reported_on_the_page(trained_run, tmp_path, monkeypatch):
    def no_text(*_, **__):
        raise UserError("no corpus at <gone>")

    monkeypatch.setattr(plots, "checkpoint_quality", no_text)
    page = report.write_report(shutil.copytree(trained_run, tmp_path / "run").as_posix(), ["x"], 2, 1).read_text()
    assert "Not measured: no corpus at &lt;gone&gt;" in page
    assert "Not swept yet" in page
    monkeypatch.setattr(report, "read_prompts", no_text)
    page = report.write_report((tmp_path / "run").as_posix(), None, 2, 1).read_text()
    assert "Not shown: no corpus at &lt;gone&gt;; give a prompt with --prompt TEXT" in page
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
    assert [record["step"] for record in read_records(str(tmp_path / "run"))] == [1, 2]
    assert runs[0][0] == runs[1][0]
    shutil.rmtree(tmp_path / "run")
    MetricsWriter(config).close()
    assert runs[2][0] != runs[0][0]  # another run in a folder of the same name
    runs.clear()
    for step in (1, 2):
        with contextlib.closing(MetricsWriter(config)) as writer:
            writer.write(step, {"train/loss": math.nan})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines][-1] == {"step": 2, "train/loss": None}

    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    MetricsWriter(config).close()
    assert "WARNING: no more metrics are written to Weights & Biases: no API key" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'layerskip-jax\[wandb\]'"):
        MetricsWriter(config)


def test_schedules_show_a_few_rotations_or_else_the_whole_run_and_count_from_1(trained_run):
    shown = []
    for curriculum in ("rotational", "gradual", "all"):
        early = EarlyExitConfig(curriculum=curriculum, dilation=3)
        run = dataclasses.replace(
            Run.open(trained_run), config=Config(early_exit=early, train=TrainConfig(steps=1000)), decode=DecodeConfig()
        )
        rates, weights = drawn(schedules_picture(run))[:2]
        assert all(line.get_xdata().tolist() == list(range(1, 13)) for line in rates.lines)
        assert labels(rates) == ["step 1", "step 501", "step 1000"]
        (image,) = weights.get_images()
        shown.append((image.get_array().shape, image.get_extent()))
        weight_LN = np.ma.filled(image.get_array(), 0)
        np.testing.assert_allclose(weight_LN.sum(axis=0), 1, rtol=1e-5)
        assert weight_LN[1].max() > 0  # also the early exits of the gradual curriculum, which start late
        assert run.exits_with_loss == list(range(2, 13))  # e(1) = 0
    few, whole = [0.5, 12.5, 0.5, 12.5], [0.5, 1000.5, 0.5, 12.5]
    assert shown == [((12, 12), few), ((12, 200), whole), ((12, 200), whole)]
