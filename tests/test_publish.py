"""The model card that an export writes, and publishing."""

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import yaml

from layerskip_jax.checkpoint.reading import open_model_folder
from layerskip_jax.checkpoint.swept import store_swept
from layerskip_jax.commands import layerskip
from layerskip_jax.commands.export import export_model
from layerskip_jax.commands.model_card import ExitTable, model_card
from layerskip_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.training.loop import train
from layerskip_jax.training.monitoring.metrics import read_records


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "my-model"
    export_model(trained_run, str(folder))
    return folder


def test_the_card_says_what_the_model_is_and_how_to_run_it(exported, trained_run):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert "license" not in values  # the user's choice
    assert "# license: " in front
    assert values["library_name"] == "transformers"
    assert "4 layers, width 16, 2 heads (1 for keys and values), feed-forward width 24" in body
    assert "3 steps of 8 sequences of 32 tokens" in body
    assert "early_exit.curriculum rotational" in body
    assert "assistant_early_exit=2)" in body
    assert 'layerskip decode my-model --prompt "Once upon a time" --exit_layer 2 --draft_length 3' in body
    last = [record for record in read_records(trained_run) if "validation/exit_loss/4" in record][-1]
    for exit_layer in range(1, 5):
        mark = " (drafts)" if exit_layer == 2 else ""
        assert f"| {exit_layer}{mark} | {last[f'validation/exit_loss/{exit_layer}']:.3f} |" in body
    assert trained_run not in card  # no path of the machine
    assert not (exported / "README.md.partial").exists()


def test_the_card_of_a_checkpoint_has_its_own_losses(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 4, "validation/exit_loss/4": 99.5}) + "\n")
    export_model(str(run / "checkpoints" / "3"), str(tmp_path / "exported"))
    assert "99.5" not in (tmp_path / "exported" / "README.md").read_text()


def test_a_swept_exit_is_exported(trained_run, tmp_path):
    """Unless the sweep chose what transformers does not have: then the run's own settings."""
    run = shutil.copytree(trained_run, tmp_path / "run").as_posix()
    for policy, drafts in [("fixed", (1, 2)), ("adaptive", (2, 3))]:
        store_swept(run, {"policy": policy, "exit_layer": 1, "draft_length": 2}, {})
        assert export_model(run, str(tmp_path / policy)) == drafts[0]
        assert (
            json.loads((tmp_path / policy / "generation_config.json").read_text())["num_assistant_tokens"] == drafts[1]
        )


def test_the_card_shows_no_path_of_a_mixture():
    config = Config(data=DataConfig(mixture=("1=text:private/corpus",)))
    assert "private" not in model_card("m", config, 3, ExitTable({}, {}), draft_exit=1, draft_length=4)


def test_the_command_measures_agreement(trained_run, tmp_path, capsys):
    layerskip.main(["export", trained_run, str(tmp_path / "hf"), "--batches", "1"])
    rows = [line for line in (tmp_path / "hf" / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[-1].startswith("| 4 | ")
    assert rows[-1].endswith("| 100.0% |")
    assert "assistant_early_exit=2" in capsys.readouterr().out


def test_a_model_that_was_not_trained_here_has_no_recipe(exported, tmp_path):
    export_model(str(exported), str(tmp_path / "again"))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "## Training" not in card
    assert "## Exits" not in card
    assert "early layers" not in card  # nothing is known about its training
    assert "assistant_early_exit=1)" in card  # a quarter of four layers


def test_a_dry_run_lists_the_files_and_sends_nothing(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    folder = tmp_path / "my [1e-3] model"
    shutil.copytree(exported, folder)
    for name in (".env", "notes.txt", ".token.json"):
        (folder / name).write_text("secret")
    layerskip.main(["publish", str(folder), "me/my-model", "--dry_run"])
    captured = capsys.readouterr()
    names = [line.split()[-1] for line in captured.out.splitlines()[:-1]]
    assert sorted(names) == sorted(file.name for file in exported.iterdir())
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    total = sum(file.stat().st_size for file in exported.iterdir())
    assert captured.out.splitlines()[-1].split(maxsplit=1) == [
        f"{total:,}",
        "bytes would be pushed to https://huggingface.co/me/my-model",
    ]
    assert "README.md names no license: add a line such as" in captured.err
    card = folder / "README.md"
    card.write_text(card.read_text().replace("# license: fill in", "license: apache-2.0 #"))
    layerskip.main(["publish", str(folder), "me/my-model", "--dry_run"])
    assert capsys.readouterr().err == ""


def test_publishing_creates_the_repository_and_uploads_the_files(exported, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], options["allow_patterns"], options["folder_path"]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    layerskip.main(["publish", str(exported), "me/my-model", "--private"])
    names = sorted(file.name for file in exported.iterdir())
    assert calls == [
        ("create", "me/my-model", {"private": True, "exist_ok": True}),
        ("upload", "me/my-model", names, str(exported)),
    ]
    assert "bytes pushed to https://huggingface.co/me/my-model" in capsys.readouterr().out

    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match=r"cannot be pushed to me/my-model: no route"):
        layerskip.main(["publish", str(exported), "me/my-model"])


@pytest.mark.parametrize(
    ("change", "repository", "message"),
    [
        (None, "me/my model", "REPO_ID is the name of a repository"),
        (None, "a/b/c", "REPO_ID is the name of a repository"),
        (None, "me/my-model", "you are not logged in .*hf auth login"),
        ("model.safetensors", "me/my-model", "no weights in"),
        ("tokenizer", "me/my-model", r"is not a tokenizer\.json"),
        ("link", "me/my-model", "chat_template.jinja.* leads out of the folder"),
    ],
)
def test_a_folder_that_cannot_be_published_is_a_one_line_error(
    exported, tmp_path, monkeypatch, change, repository, message
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    if change == "link":
        (tmp_path / "private").write_text("secret")
        (folder / "chat_template.jinja").symlink_to(tmp_path / "private")
    elif change == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif change:
        (folder / change).unlink()
    with pytest.raises(UserError, match=message):
        layerskip.main(["publish", str(folder), repository])


def test_a_run_is_exported_first(trained_run):
    with pytest.raises(UserError, match=r"is a run: write it as a Hugging Face folder with layerskip export"):
        layerskip.main(["publish", trained_run, "me/my-model", "--dry_run"])


@pytest.mark.parametrize("ends", [[2, 5], 2, None])
def test_an_export_after_init_from_keeps_the_settings_of_the_folder(exported, corpus, tmp_path, ends):
    """The chat template, every end token and the defaults of sampling are those of the weights it started from."""
    base, template = tmp_path / "base", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    shutil.copytree(exported, base)
    (base / "chat_template.jinja").write_text(template)
    given = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": ends}
    (base / "generation_config.json").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    config = open_model_folder(str(base)).config
    train(
        dataclasses.replace(
            config,
            data=dataclasses.replace(corpus, tokenizer=str(base / "tokenizer.json")),
            train=TrainConfig(
                str(tmp_path / "run"), steps=1, batch_size=8, evaluate_batches=1, loss_chunk=32, init_from=str(base)
            ),
            optimizer=OptimizerConfig(warmup_steps=0),
        )
    )
    export_model(str(tmp_path / "run"), str(tmp_path / "new"))
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == template
    found = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {name: found[name] for name in ("temperature", "top_p", "do_sample")} == {
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert found["eos_token_id"] == ([2, 5] if ends == [2, 5] else 2)
