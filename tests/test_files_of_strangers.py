"""Checkpoints, tokenizers and prompts are data: nothing in them is run, unpickled, or leads out of the run folder."""

import contextlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from bucket import STEPS, sign, trained_run

from layerskip_jax.checkpoint.reading import SWEPT, find_checkpoint, load_model, read_config
from layerskip_jax.command_line import add_config_option, make_parser
from layerskip_jax.commands import decode, terminal
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.exits import quality_of_checkpoint


class Heard:
    """What Python's audit events tell while it listens. A hook cannot be taken away, so it listens by a flag."""

    def __init__(self):
        self.events, self._listens = [], False
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self._listens:
            self.events.append((event, arguments))

    @contextlib.contextmanager
    def listening(self):
        self.events, self._listens = [], True
        try:
            yield self
        finally:
            self._listens = False

    def written(self):
        """The files opened for writing, or made."""
        opened = [str(path) for event, (path, mode, _) in self._of("open") if mode and set(str(mode)) & set("wax+")]
        return [*opened, *(str(arguments[0]) for event, arguments in self._of("os.mkdir", "os.rename"))]

    def read(self):
        return [str(path) for _, (path, *_) in self._of("open")]

    def run(self):
        """What was executed that was not there before: programs, unpickled classes, code, connections."""
        names = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
        return self._of(*names, "marshal.loads", "import", "ctypes.dlopen")

    def _of(self, *names):
        return [(event, arguments) for event, arguments in self.events if event in names]


@pytest.fixture(scope="module")
def heard():
    return Heard()


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.fixture(scope="module")
def run(corpus):
    return trained_run(corpus)


def decoded(run, *argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        decode.main(["--checkpoint", str(run), *(argv or ("--prompt", "def x")), "--json"])
    return json.loads(out.getvalue().splitlines()[0])


@pytest.fixture
def hostile(run, tmp_path):
    """A copy of a good run whose config names what lies outside of it, and code."""
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


def test_nothing_of_a_checkpoint_is_run_and_nothing_outside_is_touched(run, hostile, heard, monkeypatch):
    monkeypatch.setattr(terminal, "measured_bandwidth", lambda: 1e10)
    before = decoded(run)  # what is imported late is imported now
    with heard.listening():
        assert decoded(hostile) == before
    assert heard.run() == []
    assert heard.written() == []
    outside = [path for path in heard.read() if not path.startswith((str(hostile), "/proc/", "/sys/", "/dev/"))]
    assert [path for path in outside if not path.isdigit() and not path.endswith(".py")] == []
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["hostile"]


def test_the_tokenizer_is_the_one_beside_the_checkpoint(hostile):
    _, config, tokenizer = load_model(str(hostile))
    assert "passwd" in config.data.tokenizer
    assert Path(str(tokenizer)) == hostile / "checkpoints" / TOKENIZER


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
def test_a_pickle_or_code_in_place_of_a_file_is_refused(run, tmp_path, heard, file, content):
    pwned = tmp_path / "pwned"
    shutil.copytree(run, tmp_path / "run")
    bomb = {
        "pickle": pickle.dumps(Bomb(pwned)),
        "python": f"open({str(pwned)!r}, 'w')\n".encode(),
        "yaml": f"!!python/object/apply:builtins.open [{str(pwned)!r}, w]\n".encode(),
    }
    (tmp_path / "run" / "checkpoints" / file).write_bytes(bomb[content])
    with heard.listening(), pytest.raises(UserError, match=r"not a SentencePiece|not what|no readable|is damaged"):
        decoded(tmp_path / "run")
    assert [event for event, _ in heard.run() if event not in ("import", "marshal.loads")] == []
    assert not pwned.exists()


def test_a_prompts_file_is_data(run, tmp_path, heard):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "pwned"), protocol=0))
    with heard.listening(), pytest.raises(UserError, match="must have a JSON object"):
        decoded(run, "--prompts", str(file))
    assert not (tmp_path / "pwned").exists()


def test_held_out_text_prepares_no_corpus(run, tmp_path):
    """Reading the corpus that a config names is what --held_out and an evaluation ask for; writing one there is not."""
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run, folder)
    file = Path(str(find_checkpoint(str(folder)))) / "config" / "metadata"
    config = json.loads(file.read_text())
    config["data"] |= {"source": "python_stdlib", "data_dir": str(data)}
    file.write_text(json.dumps(config))
    sign(file.parent.parent)
    with pytest.raises(UserError, match=f"python_stdlib is not prepared in {data}"):
        decoded(folder, "--held_out", "1")
    with pytest.raises(UserError, match=f"python_stdlib is not prepared in {data}"):
        quality_of_checkpoint(str(folder), batches=1)
    assert not data.exists()
    assert open_documents(read_config(find_checkpoint(run)).data, "validation", prepare=False)


def test_config_says_that_it_is_run():
    parser = make_parser("")
    add_config_option(parser)
    assert "it is executed" in parser.format_help()
    assert "`--config` runs that file" in (Path(__file__).parent.parent / "README.md").read_text()
