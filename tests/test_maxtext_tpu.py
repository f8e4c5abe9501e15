"""The comparison with MaxText: settings, options, errors and the table. Needs neither MaxText nor libtpu."""

import doctest
import sys

import jax
import pytest

from benchmarks import maxtext_driver, maxtext_tpu
from benchmarks.maxtext_driver import compile_accepted, recipe_flags
from benchmarks.maxtext_tpu import PLAIN, ROWS, Row, main, maxtext_settings, read_config, table
from layerskip_jax.errors import UserError, run_command

RESULT = {
    "config": "scratch_7b",
    "topology": "v6e:8x8",
    "step": "MaxText vmem",
    "fits": True,
    "hbm": {"peak": 5.93e9},
    "seconds": {"estimate": 1.0, "exposed": 0.05},
    "overlapped": 0.75,
    "mfu_at_estimate": 0.4321,
    "received": {"all-gather": 3e9, "all-reduce, exposed": 1e9},
    "compile_seconds": 321.4,
    "refused": ["xla_tpu_enable_async_collective_fusion"],
}


@pytest.mark.parametrize("module", [maxtext_driver, maxtext_tpu], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_settings_for_the_same_step(name):
    config = read_config(ROWS[name], PLAIN)
    settings = maxtext_settings(config, ROWS[name].topology)
    chips = settings["ici_fsdp_parallelism"]
    assert config.mesh.fsdp == chips
    assert settings["per_device_batch_size"] * chips == config.train.batch_size == 128
    assert settings["base_num_query_heads"] * settings["head_dim"] == settings["base_emb_dim"] == config.model.dim
    assert settings["max_target_length"] == config.data.sequence_length
    assert (settings["dtype"], settings["weight_dtype"]) == ("bfloat16", "float32")


def test_llama3_8b_settings():
    settings = maxtext_settings(read_config(ROWS["8b-v6e"], PLAIN), "v6e:8x8")
    expected = {
        "base_num_decoder_layers": 32,
        "base_mlp_dim": 14_336,
        "base_num_kv_heads": 8,
        "vocab_size": 128_256,
        "rope_max_timescale": 500_000,
        "max_target_length": 8192,
        "per_device_batch_size": 2,
        "compile_topology": "v6e-64",
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_step_without_an_equal_maxtext_step_is_refused():
    row = Row("scratch_7b", "v6e:8x8")
    for name, value in {
        "--train.remat": "dots",
        "--train.accumulate": "2",
        "--train.batch_size": "96",
        "--model.compute_dtype": "float32",
    }.items():
        with pytest.raises(UserError, match="remat full, accumulate 1"):
            maxtext_settings(read_config(row, [*PLAIN, name, value]), row.topology)


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable], ids=["nowhere", "without MaxText"])
def test_a_python_without_maxtext_is_one_line_and_status_2(python, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(["--maxtext", python]))
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: --maxtext must be a Python that has MaxText")
    assert printed.count("\n") == 1


def test_the_table():
    failed = {"config": "scratch_7b", "topology": "v5e:8x16", "step": "MaxText shipped", "error": "Used 17.1G of 15.7G"}
    lines = table([RESULT, failed]).splitlines()
    assert lines[2] == "| scratch_7b, v6e:8x8 | MaxText vmem | 1.000 | 43.2% | 5.93 | 4.0 | 25% | 5.0% | 321 |"
    assert lines[3].startswith("| scratch_7b, v5e:8x16 | MaxText shipped | Used 17.1G of 15.7G |  |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-1].endswith("libtpu refuses them: xla_tpu_enable_async_collective_fusion.")
    assert "does not fit" in table([RESULT | {"fits": False}])


def test_results_are_stored_and_only_errors_are_retried(tmp_path, monkeypatch, capsys):
    compiled = []

    def compile_maxtext(python, row, form):
        compiled.append(form)
        if form == "whole":
            raise UserError("Used 17.1G of 15.7G")
        return {name: value for name, value in RESULT.items() if name not in ("config", "topology", "step")}

    monkeypatch.setattr(maxtext_tpu, "find_maxtext", lambda word: (word, "0.2.5"))
    monkeypatch.setattr(maxtext_tpu, "compile_maxtext", compile_maxtext)
    arguments = ["--maxtext", "python", "--rows", "7b-v6e", "--ours", "--json", str(tmp_path / "results.json")]
    tables = []
    for _ in range(2):
        main([*arguments, "--forms", "shipped", "whole"])
        tables.append(capsys.readouterr().out.partition("| run")[2])
    assert tables[0] == tables[1]
    assert "MaxText shipped" in tables[0]
    main([*arguments, "--forms", "shipped", "vmem"])
    assert compiled == ["shipped", "whole", "whole", "vmem"]
    monkeypatch.setattr(maxtext_tpu, "find_maxtext", lambda word: (word, "0.2.6"))
    with pytest.raises(UserError, match=r"json has results of other maxtext: delete it"):
        main(arguments)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"about": [], "results": []}'])
def test_a_damaged_results_file_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json is damaged or .* an earlier commit .*: give another --json"):
        maxtext_tpu.read_results(tmp_path / "results.json", {})


def test_refused_options_are_omitted_and_listed():
    def compile_lowered(lowered, compiler_options):
        if compiler_options.get("xla_fusion") == "true":
            raise jax.errors.JaxRuntimeError("not on this chip. Please disable it with xla_fusion=false")
        if "xla_unknown" in compiler_options:
            raise jax.errors.JaxRuntimeError("No such compile option: 'xla_unknown'")
        if lowered == "too large":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return "compiled"

    outcome = {}
    compile_step = compile_accepted(compile_lowered, outcome)
    assert compile_step("lowered", {"xla_kept": "1", "xla_fusion": "true", "xla_unknown": "2"}) == "compiled"
    assert outcome["options"] == {"xla_kept": "1", "xla_fusion": "false"}
    assert outcome["refused"] == ["xla_fusion", "xla_unknown"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_step("too large", {"xla_kept": "1"})


def test_recipes_are_read_from_the_installed_package(tmp_path, monkeypatch):
    script = tmp_path / "maxtext" / "configs" / "tpu" / "v5e" / "llama2_7b.sh"
    script.parent.mkdir(parents=True)
    (tmp_path / "maxtext" / "__init__.py").touch()
    script.write_text('#!/bin/bash\nexport LIBTPU_INIT_ARGS="--xla_a=true --xla_b=2"\npython3 -m maxtext\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert recipe_flags("v5e/llama2_7b.sh") == "--xla_a=true --xla_b=2"
