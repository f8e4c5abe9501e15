"""Untrusted checkpoints, tokenizers and prompts: nothing is executed, unpickled, or read outside the run folder."""

import contextlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from bucket import STEPS, sign, train_once
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Victim, split_weights, try_input
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.checkpoint.swept import SWEPT, store_swept, swept_settings
from layerskip_jax.command_line import add_config_option, make_parser
from layerskip_jax.commands import decode
from layerskip_jax.commands.export import export_model
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.data.sources import open_documents
from layerskip_jax.decoding import cost
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import checkpoint_quality


class AuditEvents:
    """Records Python's audit events inside `recording`. A flag turns it off, because hooks cannot be removed."""

    def __init__(self):
        self.events, self._active = [], False
        sys.addaudithook(self._record)

    def _record(self, event, arguments):
        if self._active:
            self.events.append((event, arguments))

    @contextlib.contextmanager
    def recording(self):
        self.events, self._active = [], True
        try:
            yield self
        finally:
            self._active = False

    def written(self):
        """Return the files that were created or opened for writing."""
        opened = [str(path) for event, (path, mode, _) in self._select("open") if mode and set(str(mode)) & set("wax+")]
        return [*opened, *(str(arguments[0]) for event, arguments in self._select("os.mkdir", "os.rename"))]

    def read(self):
        return [str(path) for _, (path, *_) in self._select("open")]

    def executed(self):
        """Return events that execute something: programs, unpickled classes, imports, connections."""
        names = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
        return self._select(*names, "marshal.loads", "import", "ctypes.dlopen")

    def _select(self, *names):
        return [(event, arguments) for event, arguments in self.events if event in names]


@pytest.fixture(scope="module")
def events():
    return AuditEvents()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.fixture(scope="module")
def run(corpus):
    return train_once(corpus)


def decoded(run, *argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        decode.main(["--checkpoint", str(run), *(argv or ("--prompt", "def x")), "--json"])
    return json.loads(out.getvalue().splitlines()[0])


@pytest.fixture
def hostile(run, tmp_path):
    """A copy of a good run whose config names paths outside of it, and code."""
    folder = tmp_path / "hostile"
    shutil.copytree(run, folder)
    file = Path(str(find_checkpoint(str(folder)))) / "config" / "metadata"
    config = json.loads(file.read_text())
    outside, code = str(tmp_path / "outside"), f"__import__('os').mkdir({str(tmp_path / 'pwned')!r})"
    config["train"] |= {"run_dir": f"{outside}/run", "sample_prompt": code}
    config["data"] |= {"tokenizer": "../../../../etc/passwd", "path": code, "data_dir": f"{outside}/data", "name": code}
    file.write_text(json.dumps(config))
    sign(file.parent.parent)
    return folder


def test_a_checkpoint_executes_nothing_and_touches_nothing_outside(run, hostile, events, monkeypatch):
    monkeypatch.setattr(cost, "measured_bandwidth", lambda: 1e10)
    before = decoded(run)  # does the late imports, so that they are not recorded
    with events.recording():
        assert decoded(hostile) == before
    assert events.executed() == []
    assert events.written() == []
    outside = [path for path in events.read() if not path.startswith((str(hostile), "/proc/", "/sys/", "/dev/"))]
    assert [path for path in outside if not path.isdigit() and not path.endswith(".py")] == []
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["hostile"]


def test_the_tokenizer_comes_from_the_run_folder(hostile):
    _, config, tokenizer = load_model(str(hostile))
    assert "passwd" in config.data.tokenizer
    assert Path(str(tokenizer)) == hostile / "checkpoints" / TOKENIZER


@pytest.mark.parametrize("kind", ["run", "exported"])
@pytest.mark.parametrize("name", [SWEPT, "tokenizer.json", TOKENIZER, "chat_template.jinja", "generation_config.json"])
def test_a_link_out_of_the_folder_is_neither_read_nor_written(trained_run, tmp_path, kind, name):
    """Its target would be copied into runs and exports, or ``layerskip sweep`` would overwrite it."""
    folder, secret = tmp_path / kind, tmp_path / "secret"
    if kind == "run":
        shutil.copytree(trained_run, folder)
    else:
        export_model(trained_run, str(folder))
    file = folder / ("checkpoints" if kind == "run" else "") / name
    file.unlink(missing_ok=True)
    secret.write_text('{"secret": 1}')
    file.symlink_to(secret)
    with pytest.raises(UserError, match=f"'{name}' in .* leads out of the folder"):
        store_swept(str(folder), {}, {}) if name == SWEPT else load_tokenizer(str(load_model(str(folder))[2]))
    if name == SWEPT:
        with pytest.raises(UserError, match="leads out of the folder"):
            swept_settings(str(folder), [])
    assert secret.read_text() == '{"secret": 1}'


@pytest.mark.parametrize(
    "file",
    [
        TOKENIZER,
        SWEPT,
        f"{STEPS}/config/metadata",
        f"{STEPS}/model/_METADATA",
        f"{STEPS}/model/manifest.ocdbt",
    ],
)
@pytest.mark.parametrize("content", ["pickle", "python", "yaml"])
def test_a_pickle_or_code_in_place_of_a_file_is_refused(run, tmp_path, events, file, content):
    pwned = tmp_path / "pwned"
    shutil.copytree(run, tmp_path / "run")
    bomb = {
        "pickle": pickle.dumps(Bomb(pwned)),
        "python": f"open({str(pwned)!r}, 'w')\n".encode(),
        "yaml": f"!!python/object/apply:builtins.open [{str(pwned)!r}, w]\n".encode(),
    }
    (tmp_path / "run" / "checkpoints" / file).write_bytes(bomb[content])
    with events.recording(), pytest.raises(UserError, match=r"not a SentencePiece|not what|no readable|is damaged"):
        decoded(tmp_path / "run")
    assert [event for event, _ in events.executed() if event not in ("import", "marshal.loads")] == []
    assert not pwned.exists()


def test_a_file_of_prompts_is_data(run, tmp_path, events):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "pwned"), protocol=0))
    with events.recording(), pytest.raises(UserError, match="must have a JSON object"):
        decoded(run, "--prompts", str(file))
    assert not (tmp_path / "pwned").exists()


def test_held_out_text_prepares_no_corpus(run, tmp_path):
    """--held_out and evaluations may read the corpus that a config names, but not create one."""
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run, folder)
    file = Path(str(find_checkpoint(str(folder)))) / "config" / "metadata"
    config = json.loads(file.read_text())
    config["data"] |= {"source": "python_stdlib", "data_dir": str(data)}
    file.write_text(json.dumps(config))
    sign(file.parent.parent)
    missing = rf"python_stdlib/python\d_\d+ is not prepared in {data}"
    with pytest.raises(UserError, match=missing):
        decoded(folder, "--held_out", "1")
    with pytest.raises(UserError, match=missing):
        checkpoint_quality(str(folder), batches=1)
    assert not data.exists()
    (data / "python_stdlib" / "python2_7").mkdir(parents=True)  # of another Python
    with pytest.raises(UserError, match=missing):
        checkpoint_quality(str(folder), batches=1)
    assert [path.name for path in data.rglob("*")] == ["python_stdlib", "python2_7"]
    assert open_documents(read_config(find_checkpoint(run)).data, "validation", prepare=False)


def no_special_tokens(values):
    values["post_processor"]["special_tokens"] = {}


def rename_special_token(values):
    tokens = values["post_processor"]["special_tokens"]
    tokens["x"] = tokens.pop("<s>")


def add_prefix(values):
    values["model"]["continuing_subword_prefix"] = "x" * 50


@pytest.mark.parametrize("change", [no_special_tokens, rename_special_token, add_prefix])
def test_a_tokenizer_json_that_makes_the_library_panic_is_refused(trained_run, tmp_path, change):
    """A panic of Rust is no `Exception`."""
    export_model(trained_run, str(tmp_path / "hf"))
    file = tmp_path / "hf" / "tokenizer.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(str(file))


@pytest.fixture(scope="module")
def victims(trained_run, tmp_path_factory):
    found = []
    for name in ("victim", "split"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(trained_run, folder / "run")
        found.append(Victim(folder / "run", folder))
    split_weights(found[1].llama)
    return found


FUZZED = ("config.json", "index", "safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
FUZZED += ("sentencepiece", "decode.json", "metrics.jsonl", "config", "checksums", "batches", "model")


@pytest.mark.parametrize("name", FUZZED)
@given(seed=st.integers(0, 2**40))
@settings(max_examples=25)
def test_damaged_files_open_or_are_refused_in_one_line(victims, name, seed):
    """No traceback, and nothing opened or started outside; ``python -m benchmarks.fuzz`` tries more."""
    victim = victims[name == "index"]
    assert set(FUZZED) == victim.files.keys()
    victim.files[name][2]()  # imports what it needs
    finding, _ = try_input(victim, name, seed)
    assert finding == ""


def test_help_warns_that_config_files_are_executed():
    parser = make_parser("")
    add_config_option(parser)
    assert "it is executed" in parser.format_help()
    assert "`--config` runs that file" in (Path(__file__).parent.parent / "docs" / "training.md").read_text()
