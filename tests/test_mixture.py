"""Mixtures of corpora: shares, positions, repeats, held-out losses, resumed runs, and bad settings."""

import contextlib
import dataclasses
import html
import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from corpora import write_corpus
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import assert_equal_batches, make_config, shares, take
from test_position import save_position
from test_resumed_data import identify, write_lines

from layerskip_jax.checkpoint.reading import load_model, open_model_folder
from layerskip_jax.commands import report
from layerskip_jax.commands.data import main as command
from layerskip_jax.commands.plots import Run
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import DataConfig
from layerskip_jax.data.corpus import resume_mixture
from layerskip_jax.data.documents import components_of
from layerskip_jax.data.mixing import choose_components
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.position import DataPosition, read_corpus, read_positions
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.sources import open_documents, open_splits
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import exit_quality
from layerskip_jax.mixture import mixture_shares, parse_mixture
from layerskip_jax.training.loop import train


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory):
    """The settings of a mixture of three corpora: text, JSON lines and tokens."""
    folder = tmp_path_factory.mktemp("mixture")
    tokens = dataclasses.replace(corpus, path=str(write_corpus(folder / "more", 30, seed=5)))
    pretokenize(tokens, str(folder / "tokens"))
    lines = write_lines(folder / "lines.jsonl", {"text": "index"}, 30)
    words = f"5=text:{corpus.path}", f"3=jsonl:{lines}", f"2=tokens:{folder / 'tokens'}"
    return dataclasses.replace(corpus, source="python_stdlib", path="", mixture=words)


def rows_of(batches, row):
    """Return the row of every batch, hashable."""
    return [tuple(map(bytes, (batch[name][row] for name in sorted(batch)))) for batch in batches]


# Shares and rows


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 10**7),
)
def test_shares_follow_the_weights_within_1_percent_after_1000_rows(weights, batch_size, seed, start):
    rows = [choose_components(weights, batch_size, row, seed) for row in range(batch_size)]
    batches = -(-1000 // batch_size)
    counts = Counter(row[start + batch] for batch in range(batches) for row in rows)
    worst = max(abs(counts[i] / (batches * batch_size) - weight / sum(weights)) for i, weight in enumerate(weights))
    print(f"off by {worst:.2%}")
    assert worst <= 0.01


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_every_row_of_a_batch_reads_every_component(batch_size):
    """Otherwise the documents that a component deals out to the other rows would never be read."""
    for row in range(batch_size):
        components = choose_components([5, 3, 2], batch_size, row, seed=1)
        counts = Counter(components[batch] for batch in range(1000))
        assert [counts[i] / 1000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.06)


def test_each_component_yields_the_rows_of_a_run_on_it_alone(mixed):
    batches = take(iter(make_batches(make_config(mixed), "train", batch_size=4, seed=1)), 40)
    for number, data in enumerate(mixed.components.values()):
        alone = take(iter(make_batches(make_config(data), "train", batch_size=4, seed=1)), 40)
        for row in range(4):
            choices = choose_components([5, 3, 2], 4, row, seed=1)
            chosen = [step for step in range(40) if choices[step] == number]
            found = rows_of([batches[step] for step in chosen], row)
            assert found == rows_of(alone, row)[: len(chosen)]


@settings(max_examples=10)
@given(
    stop=st.integers(0, 40),
    processes=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    seed=st.integers(0, 5),
)
def test_a_mixture_of_three_corpora_resumes_bit_for_bit(mixed, tmp_path_factory, stop, processes, seed):
    """In 10 random stops, with any number of processes before and after."""
    config, saved = make_config(mixed), epath.Path(tmp_path_factory.mktemp("position"))
    before, after = processes
    for process, rows in enumerate(shares(4, before)):
        part = iter(make_batches(config, "train", batch_size=4, rows=rows, seed=seed))
        take(part, stop)
        save_position(part, rows, saved, process, before)
    alone = iter(make_batches(config, "train", batch_size=4, seed=seed))
    take(alone, stop)
    expected = take(alone, 6)
    for rows in shares(4, after):
        part = iter(make_batches(config, "train", batch_size=4, rows=rows, seed=seed))
        DataPosition(part, rows).set_state(read_positions(saved), 4)
        own = [{name: array[rows.start : rows.stop] for name, array in batch.items()} for batch in expected]
        assert_equal_batches(take(part, 6), own)


def test_workers_give_the_same_rows(mixed):
    plain, workers = (
        iter(make_batches(make_config(mixed, workers=workers), "train", batch_size=4, seed=1)) for workers in (0, 2)
    )
    assert_equal_batches(take(workers, 5), take(plain, 5))
    workers.close()


def test_a_component_that_runs_out_is_repeated_with_one_note(mixed, capfd):
    take(iter(make_batches(make_config(mixed), "train", batch_size=4, seed=1)), 400)
    lines = capfd.readouterr().err.splitlines()
    documents = components_of(open_documents(mixed, "train"))
    assert sorted(lines) == sorted(
        f"note: all {len(part)} documents of {name} (data.mixture) have been read once, so they are repeated from "
        "here on"
        for name, part in documents.items()
    )


# Runs


@pytest.fixture(scope="module")
def mixed_run(mixed, trained_run, tmp_path_factory):
    """A run on one corpus that has been continued on the mixture, and the config to continue it with."""
    run, saved = shutil.copytree(trained_run, tmp_path_factory.mktemp("mixed") / "run"), open_model_folder(trained_run)
    data = dataclasses.replace(saved.config.data, source="python_stdlib", path="", mixture=mixed.mixture)
    changes = dataclasses.replace(saved.config.train, run_dir=str(run), steps=4)
    config = dataclasses.replace(saved.config, data=data, train=changes)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(config)
    return run, config, printed.getvalue().splitlines()


def test_a_run_on_one_corpus_continues_on_a_mixture_with_a_note(mixed_run, mixed):
    _, _, lines = mixed_run
    text, *others = mixed.components
    line = next(line for line in lines if "resuming after step 3" in line)
    assert f"{', '.join(others)}: new in the mixture, read from the first document on" in line
    assert f"{text}: " not in line  # it goes on where it was
    assert "data.mixture: the rows follow the new shares from here on; overall held-out losses do not compare" in line
    assert any(line.startswith(f"rows: 50.0% {text}, 30.0% ") for line in lines)


def test_the_overall_loss_is_the_mean_of_the_components_by_their_shares(mixed_run):
    run, config, lines = mixed_run
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = next(record for record in reversed(records) if "validation/exit_loss/4" in record)
    shares_of_rows, model = mixture_shares(config.data.mixture), load_model(str(run))[0]
    for exit_layer in range(1, 5):
        parts = {name: record[f"validation/component_exit_loss/{name}/{exit_layer}"] for name in shares_of_rows}
        mean = sum(share * parts[name] for name, share in shares_of_rows.items())
        assert record[f"validation/exit_loss/{exit_layer}"] == pytest.approx(mean)
    for name, data in config.data.components.items():
        assert any(line.startswith(f"step 4  held-out loss of {name} by exit: 1: ") for line in lines)
        alone = exit_quality(model, dataclasses.replace(config, data=data))
        assert alone.loss_L[-1] == pytest.approx(parts[name])
    quality = exit_quality(model, config)
    assert quality.loss_L[-1] == pytest.approx(record["validation/exit_loss/4"])
    assert quality.agreement_L[-1] == pytest.approx(1)


def test_the_report_shows_the_held_out_losses_of_each_corpus(mixed_run):
    folder, config, _ = mixed_run
    record = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {name: value for values in record for name, value in values.items() if "component_exit_loss" in name}
    table = report._components(Run.open(str(folder)))
    for name, share in mixture_shares(config.data.mixture).items():
        cells = [name, f"{share:.1%}", *(f"{losses[f'validation/component_exit_loss/{name}/{n}']:.3f}" for n in (2, 4))]
        assert "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) in table


def change(config, *words):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=words))


def test_changes_of_a_mixture_are_reported(mixed, tmp_path):
    config, (text, lines, tokens) = make_config(mixed), mixed.mixture
    names, now = list(mixed.components), identify(make_config(mixed))

    def after(*words):
        changed = change(config, *words)
        return resume_mixture(config, changed, now, identify(changed))

    assert after(text, lines, tokens) == ({name: (name, "same rows") for name in names}, [])
    assert after(*(f"{float(word.split('=')[0]) * 2}={word.split('=')[1]}" for word in mixed.mixture))[1] == []
    shares_changed = (
        "data.mixture: the rows follow the new shares from here on; overall held-out losses do not compare with "
        "earlier ones"
    )
    assert after(text, lines, tokens.replace("2=", "9=")) == (
        {name: (name, "same rows") for name in names},
        [shares_changed],
    )
    resumed, notes = after(text, lines)
    assert list(resumed) == names[:2]
    assert notes == [f"{names[2]}: no longer read", shares_changed]
    moved = shutil.copy(names[1].partition(":")[2], tmp_path)
    resumed, notes = after(text, f"3=jsonl:{moved}", tokens)
    assert resumed[f"jsonl:{moved}"] == (names[1], "same rows")
    assert notes == [f"jsonl:{moved}: data.path: the same training documents"]
    seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    resumed, (note,) = resume_mixture(config, seed, now, identify(seed))
    assert set(resumed.values()) == {(name, "first document") for name in names}
    assert note == "train.seed: another order of the training documents, read from the first one on"


def test_the_kept_components_of_a_changed_mixture_go_on(mixed, tmp_path):
    """Each row reads on in the components that stay; a new one starts with its first document."""
    config, (text, _, tokens) = make_config(mixed), mixed.mixture
    original = iter(make_batches(config, "train", batch_size=4, seed=1))
    take(original, 13)
    folder = epath.Path(save_position(original, range(4), tmp_path / "position"))
    (file,) = folder.iterdir()
    file.write_bytes(DataPosition(original, range(4), identify(config)).get_state())
    assert read_corpus(folder) == identify(config)
    restored = iter(make_batches(change(config, tokens, text), "train", batch_size=4, seed=1))
    names = list(parse_mixture([tokens, text]))
    resumed = {names[0]: (names[0], "same rows")}
    DataPosition(restored, range(4)).set_state(read_positions(folder), 4, resumed)
    states = [row["streams"] for row in restored.get_state()["parents"]]
    saved = [row["streams"] for row in original.get_state()["parents"]]
    fresh = [row["streams"] for row in iter(make_batches(config, "train", batch_size=4, seed=1)).get_state()["parents"]]
    for row in range(4):
        assert states[row][names[0]] == saved[row][names[0]]
        assert states[row][names[1]] == fresh[row][names[1]]
        assert states[row]["choices"] == saved[row]["choices"]


# Settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text:a"], "data.mixture takes WEIGHT=SOURCE:PLACE for each corpus, such as .*; not 'text:a'"),
        (["1="], "takes WEIGHT=SOURCE:PLACE"),
        (["x=text:a"], "data.mixture x=text:a: the weight 'x' is not a number"),
        (["0=text:a"], "data.mixture 0=text:a: a weight must be finite and more than 0: leave out a corpus"),
        (["-1=text:a"], "a weight must be finite and more than 0"),
        (["nan=text:a"], "a weight must be finite and more than 0"),
        (["inf=text:a"], "a weight must be finite and more than 0"),
        (["1=text:a", "1e-9=text:b"], "must give every corpus a weight of at least 1e-6 of their sum"),
        (["1e308=text:a", "1e308=text:b"], "of their sum, which must be finite"),
        (["1=text:a", "2=text:a"], "data.mixture has text:a twice: name it once, with the sum of its weights"),
        (["1=txt:a"], "data.mixture 1=txt:a: no source 'txt'; did you mean 'text'"),
        (["1=text"], "data.mixture 1=text: text needs its data.path after a colon"),
        (["1=python_stdlib:a"], "data.mixture 1=python_stdlib:a: .* write 1=python_stdlib"),
        (["1=tfds:../a"], "data.name must be a name, not a path"),
    ],
)
def test_a_wrong_mixture_is_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(mixture=tuple(words))
    assert "\n" not in str(caught.value)


def test_a_mixture_has_no_other_corpus_beside_it(mixed):
    with pytest.raises(UserError, match=r"data.mixture names the corpora: set --data.name '' and --data.path ''"):
        dataclasses.replace(mixed, path="a")
    with pytest.raises(UserError, match=r"data.prompt_key needs data.source tfds or jsonl"):
        dataclasses.replace(mixed, prompt_key="prompt")


def test_a_component_without_documents_is_named(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "split").mkdir()
    write_lines(tmp_path / "split" / "train.jsonl", {"text": "x"})
    write_lines(tmp_path / "split" / "mine.jsonl", {"text": "x"})
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}')
    for name, message in (
        (f"text:{tmp_path}/none", r"no corpus at .*none"),
        (f"text:{tmp_path}/empty", r"no files under"),
        (f"jsonl:{tmp_path}/one.jsonl", "the .* split of .* is empty: there is no document to read: the corpus needs"),
        (f"jsonl:{tmp_path}/split", ".* has a 'train' split but no 'validation'.* WEIGHT=jsonl:.*train.jsonl"),
    ):
        data = dataclasses.replace(corpus, path="", mixture=(f"1=text:{corpus.path}", f"1={name}"), source="tfds")
        with pytest.raises(UserError, match=f"data.mixture {name}: {message}"):
            open_splits(data)


def test_the_data_commands_take_a_mixture(mixed, tmp_path, capsys):
    tokenizer = ["--data.tokenizer", str(tmp_path / "mixed.model"), "--model.vocab_size", "300"]
    text_and_lines = ["--data.mixture", *mixed.mixture[:2]]
    command(["tokenizer", *text_and_lines, *tokenizer])
    command(["show", *text_and_lines, *tokenizer])
    command(["prepare", *text_and_lines, *tokenizer])
    lines = capsys.readouterr().out.splitlines()
    for name in list(mixed.components)[:2]:
        assert any(line.startswith(f"train of {name}: ") for line in lines)
    with pytest.raises(
        UserError, match=r"pretokenize each of its corpora alone .* --data.mixture WEIGHT=tokens:FOLDER"
    ):
        command(["pretokenize", *text_and_lines, *tokenizer, "--out", str(tmp_path / "out")])


def test_held_out_prompts_come_from_each_corpus_in_turn(mixed):
    text, lines, _ = components_of(open_documents(mixed, "validation")).values()  # tokens give no prompts
    prompts = read_prompts(None, None, 2, make_config(mixed))
    for prompt, document in zip(prompts, (text[0], lines[0]), strict=True):
        assert document.startswith(prompt)


def test_documents_of_a_mixture_are_those_of_its_components(mixed):
    documents = open_documents(mixed, "validation")
    wanted = [part[i] for part in components_of(documents).values() for i in range(len(part))]
    assert len(documents) == len(wanted)
    assert all(np.array_equal(documents[i], document) for i, document in enumerate(wanted))
