"""Configs are checked when constructed, overridden from the command line, and survive a JSON round trip."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.command_line import add_settings, load_config_file, make_parser, parse_config
from layerskip_jax.config import Config, DecodeConfig, EarlyExitConfig, ModelConfig, OptimizerConfig
from layerskip_jax.config_dict import apply_overrides, from_dict
from layerskip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
ROTATIONAL = ["--early_exit.curriculum", "rotational", "--early_exit.exits"]
FIXED = ["--early_exit.curriculum", "fixed", "--early_exit.exits"]


def parsed(*argv):
    return parse_config(make_parser(""), list(argv))[0]


def test_overrides_reach_their_fields():
    config = parsed(
        *["--optimizer.learning_rate", "1e-3", "--train.steps=2_000", "--model.tied_embedding"],
        *["--train.remat", "full", "--early_exit.curriculum", "gradual", "--decode.stop", "\n\n", "def"],
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.steps == 2000
    assert config.model.tied_embedding
    assert config.train.remat == "full"
    assert config.early_exit.curriculum == "gradual"
    assert config.decode.stop == ("\n\n", "def")
    assert config.model == dataclasses.replace(Config().model, tied_embedding=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--optimizer.learning_rat", "1"],
            r"unknown setting --optimizer.learning_rat; did you mean '--optimizer.lear",
        ),
        (["--model.num_layer=3"], r"unknown setting --model.num_layer; did you mean '--model.num_layers'"),
        (["--train.steps", "ten"], r"--train.steps: must be a whole number, not 'ten'"),
        (["--train.steps", "1.5"], r"--train.steps: must be a whole number, not '1.5'"),
        (["--model.tied_embedding", "maybe"], r"--model.tied_embedding: must be true or false, not 'maybe'"),
        (["--optimizer.learning_rate", "nan"], r"must be a finite number, not 'nan'"),
        (["--early_exit.curriculum", "rotate"], r"must be one of rotational, .* did you mean 'rotational'"),
        (["--model.dim", "100", "--model.num_heads", "8"], r"model.dim 100 must be a multiple of .* = 16"),
        (["--layer_dropout.p_max", "1"], r"layer_dropout.p_max must be in \[0, 1\), not 1.0"),
        (["--train.accumulate", "3"], r"train.batch_size 8 must be a multiple of train.accumulate 3"),
        (["--train.seed", "-1"], r"train.seed must be in 0..4294967295, not -1"),
        (
            [
                "--early_exit.curriculum",
                "rotational",
                "--early_exit.always_last",
                "false",
                "--early_exit.dilation",
                "12",
            ],
            r"leaves steps without a loss: early_exit.dilation, 12, must be less than model.num_layers, 12",
        ),
        (["--decode.top_k", "-1"], r"^decode.top_k must be at least 0, not -1"),
        (["--optimizer.beta2", "2"], r"^optimizer.beta2 must be in \[0, 1\), not 2.0"),
        (["--decode.exit_layer", "13"], r"decode.exit_layer 13 must be in 1..12"),
        (["--early_exit.curriculum", "fixed"], r"curriculum fixed needs early_exit.exits, such as 3"),
        ([*FIXED, "3", "3"], r"early_exit.exits must be strictly increasing and at least 1, got 3 3"),
        ([*FIXED, "0"], r"early_exit.exits must be strictly increasing and at least 1, got 0"),
        ([*FIXED, "3", "12"], r"early_exit.exits 3 12 must be in 1..11 \(model.num_layers is 12\)"),
        ([*FIXED, "3", "--early_exit.exit_weights", "-1"], r"early_exit.exit_weights must be at least 0, not -1.0"),
        ([*FIXED, "3", "--early_exit.exit_weights", "0"], r"early_exit.exit_weights must not all be 0, got 0"),
        ([*FIXED, "3", "6", "--early_exit.exit_weights", "1", "2", "3"], r"one for each of .* \(3 6\), got 1 2 3"),
        (["--early_exit.exits", "3"], r"early_exit.exits 3 needs early_exit.curriculum fixed or rotational"),
        (["--early_exit.exit_weights", "1"], r"one for each of early_exit.exits \(none\), got 1"),
        (
            [*ROTATIONAL, "3", "--early_exit.always_last", "false"],
            r"early_exit.exits needs early_exit.always_last true",
        ),
        (["--early_exit.distillation_weight", "2"], r"early_exit.distillation_weight must be in \[0, 1\], not 2.0"),
        (["--early_exit.agreement_weight", "0.1"], r"early_exit.agreement_weight needs early_exit.exits, such as 3"),
        ([*FIXED, "3", "--early_exit.agreement_weight", "1"], r"agreement_weight must be in \[0, 1\), not 1.0"),
        (["--early_exit.distillation", "kd"], r"must be one of none, kl, argmax, acceptance"),
        (["--train.loss_chunk", "100"], r"train.loss_chunk 100 must divide data.sequence_length 256"),
        (["--decode.temperature", "-1"], r"^decode.temperature must be in"),
        (
            ["--config", "configs/scratch_1b5.py", "--decode.choices", "4", "--decode.lookup_length", "2"],
            r"^decode.choices",
        ),
        (["--data.source", "jsonl"], r"data.source 'jsonl' needs data.path"),
        (["--config", "configs/quickstrat.py"], r"no config file .*did you mean 'configs/quickstart.py'"),
        (["--config"], r"--config: expected one argument"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early_exit.curiculum", "unknown setting early_exit.curiculum; did you mean 'early_exit.curriculum'"),
        ("model", "unknown setting model"),
        ("nonsense.x", "unknown setting nonsense.x"),
    ],
)
def test_unknown_overrides_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(Config(), {name: "fixed"})


@given(
    layers=st.integers(10, 100),
    rate=st.floats(1e-9, 10),
    stop=st.lists(st.text(min_size=1), max_size=3),
    exits=st.sets(st.integers(1, 9), min_size=1),
    weight=st.floats(0, 10, exclude_min=True),
)
def test_a_config_survives_a_json_round_trip(layers, rate, stop, exits, weight):
    config = Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=layers),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        early_exit=EarlyExitConfig("fixed", exits=tuple(sorted(exits)), exit_weights=(weight,) * len(exits)),
        decode=dataclasses.replace(config.decode, stop=tuple(stop)),
    )
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config))), Config) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layer": 3}}, "unknown setting model.num_layer; did you mean 'num_layers'"),
        ({"modle": {}}, "unknown setting modle; did you mean 'model'"),
        ({"model": {"dim": "wide"}}, "model.dim must be a whole number, not 'wide'"),
        ({"model": {"dim": True}}, "model.dim must be a whole number, not True"),
        ({"early_exit": {"curriculum": "some"}}, "early_exit.curriculum must be one of"),
    ],
)
def test_a_stored_config_is_checked_like_any_other(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(change, Config)


NUMBERS = [
    (group.name, field)
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), group.name))
    if str(field.type).startswith(("int", "float", "<class 'int'>", "<class 'float'>", "tuple[int", "tuple[float"))
]
NAN, INF = float("nan"), float("inf")


def with_number(group, field, value):
    """Make the group of settings ``group`` with one number changed, which is the only item of a tuple."""
    return dataclasses.replace(
        getattr(Config(), group), **{field.name: value if type(field.default) is not tuple else (value,)}
    )


@pytest.mark.parametrize(("group", "field"), NUMBERS, ids=[f"{group}.{field.name}" for group, field in NUMBERS])
@given(data=st.data())
@settings(max_examples=15)
def test_every_number_out_of_its_range_is_refused_at_its_own_name(group, field, data):
    within = field.metadata["within"]
    low, high = map(float, within[1:-1].split(","))
    ends = [end + step for end in (low, high) for step in (-1e-6, 0, 1e-6, -1, 1)]
    drawn = data.draw(st.integers() | st.floats() | st.sampled_from([*ends, *map(int, filter(math.isfinite, ends))]))
    above = drawn > low or (drawn == low and within[0] == "[")
    below = drawn < high or (drawn == high and within[-1] == "]")
    name = field.name if group == "decode" else f"{group}.{field.name}"
    for value in (NAN, INF, -INF, 1e39, 10**400, True, "1", None, *([] if above and below else [drawn])):
        with pytest.raises(UserError, match=rf"^{re.escape(name)} must be ") as error:
            with_number(group, field, value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, value) for name in ("beta1", "beta2") for value in (-3.0, -1e-9, 1.0, 2.0)),
        *((name, value) for name in ("learning_rate", "clip_norm") for value in (0.0, -1.0)),
        ("weight_decay", -1.0),
        ("final_fraction", 1.1),
        ("decay_fraction", -0.1),
    ],
)
def test_meaningless_optimizer_settings_are_refused(name, wrong):
    with pytest.raises(UserError, match=rf"optimizer.{name} must be .*, not {wrong}"):
        OptimizerConfig(**{name: wrong})
    with pytest.raises(UserError, match=rf"optimizer.{name} must be .*, not {wrong}"):
        parsed(f"--optimizer.{name}={wrong}")


@pytest.mark.parametrize(
    ("exits", "given", "expected"),
    [
        ((), {}, (0, ())),
        ((3,), {}, (3, (3,))),
        ((2, 4, 8), {}, (2, (2, 4, 8))),  # 12 layers: 2 and 4 are equally near to 3
        ((5, 9), {}, (5, (5, 9))),
        ((3,), {"exit_layer": 6, "exits": (6, 9)}, (6, (6, 9))),
    ],
)
def test_decoding_drafts_from_a_trained_exit(exits, given, expected):
    early = EarlyExitConfig("fixed" if exits else "none", exits=exits)
    config = Config(ModelConfig(num_layers=12), early_exit=early, decode=DecodeConfig(**given))
    settings = config.decode_settings
    assert (settings.exit_layer, settings.exits) == expected


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.py")), ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_documents_its_command(file):
    assert isinstance(load_config_file(str(file)), Config)
    assert f"configs/{file.name}" in file.read_text().split('"""')[1]


def test_config_files_that_do_not_work_are_named(tmp_path):
    for text, message in [
        ("def get_config(: pass", "line 1: SyntaxError"),
        ("import no_such_module", "line 1: ModuleNotFoundError"),
        ("x = 1", r"has no get_config\(\)"),
        ("def get_config():\n\n  return no_such_name", "line 3: NameError"),
        (
            "from layerskip_jax.config import *\ndef get_config(): return TrainConfig(stepss=1)",
            "line 2: TypeError: .*unexpected keyword argument 'stepss'",
        ),
        (
            "from layerskip_jax.config import *\ndef get_config(): return TrainConfig(steps=0)",
            "line 2: train.steps must be at least 1, not 0",
        ),
        ("def get_config(): return 3", "returned a int, not a layerskip_jax.config.Config"),
        ("get_config = 3", "line 1: TypeError|'int' object is not callable"),
        ("\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')", "line 2: JSONDecodeError"),  # raised in another file
        ("{}['a']", "line 1: KeyError: 'a'"),
        ("open('nowhere')", r"line 1: FileNotFoundError: .*nowhere"),
        ("def f(): f()\nf()", "line 1: RecursionError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("raise ValueError('two\\nlines')", "line 1: ValueError: two lines"),
        ("raise Exception", "line 1: Exception$"),
        ("assert False", "line 1: AssertionError$"),
        ("x = '\0'", "SyntaxError|ValueError"),
        ("\udcff", "SyntaxError"),
        ("# coding: no_such_encoding", "SyntaxError: .*encoding"),
    ]:
        (tmp_path / "bad.py").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=message) as error:
            load_config_file(str(tmp_path / "bad.py"))
        assert str(tmp_path / "bad.py") in str(error.value)
        assert "\n" not in str(error.value)


def test_a_config_file_may_define_dataclasses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom layerskip_jax import Config\n"
        "@dataclasses.dataclass\nclass Mine:\n    x: int = 1\n"
        "def get_config(): return Config()\n"
    )
    assert load_config_file(str(tmp_path / "mine.py")) == Config()


@pytest.mark.parametrize(
    "name", ["config.yaml", "config.json", "config", "config.PY", "config.pyc", "config.so", "x.py"]
)
def test_config_files_that_are_not_python_are_named(name, tmp_path):
    if name == "x.py":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("steps: 3")
    with pytest.raises(UserError, match=rf"config file {re.escape(str(tmp_path / name))}.* is a Python file"):
        load_config_file(str(tmp_path / name))


def test_a_config_file_may_have_any_name_and_a_byte_order_mark(tmp_path):
    """The file is read each time. Python's cache misses a change within a second, or after the clock is set back."""
    file = tmp_path / "größe 1.py"
    for steps in (3, 4):
        file.write_bytes(
            b"\xef\xbb\xbf"
            + "import dataclasses\nfrom layerskip_jax.config import Config, OptimizerConfig, TrainConfig\n"
            f"def get_config(): return Config(train=TrainConfig(steps={steps}), "
            "optimizer=OptimizerConfig(warmup_steps=1))".encode()
        )
        assert load_config_file(str(file)).train.steps == steps
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_help_explains_every_field_once():
    parser = make_parser("")
    add_settings(parser, Config())
    shown = parser.format_help()
    for group in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), group.name)):
            assert f"--{group.name}.{field.name} " in shown
            assert field.metadata["doc"]


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--model.num_layer", "3"],
        ["decode.py", "--checkpoint", "nowhere", "--prompt", "x"],
        ["-m", "layerskip_jax", "data", "tokeniser"],
    ],
)
def test_commands_end_with_one_line_and_status_2(command, tmp_path):
    arguments = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
