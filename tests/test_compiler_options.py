"""Compiler options: their syntax, and the handling of those that a compiler (here a stub) rejects."""

import jax
import pytest

from layerskip_jax import compiler_options
from layerskip_jax.compiler_options import STEP_OPTIONS, compile_step, parse_options
from layerskip_jax.config import TrainConfig
from layerskip_jax.errors import UserError


class StubLowered:
    """A lowered program whose compiler raises ``messages``, one per call, and then returns its options."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def compile(self, compiler_options):
        if self.messages:
            raise jax.errors.JaxRuntimeError(self.messages.pop(0))
        return compiler_options


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(STEP_OPTIONS, "chip", {"xla_a": "1", "xla_b": "2"})


@pytest.mark.parametrize("text", ["a=1", "xla_a", "xla_a=", "=1", "xla_a=1;xla_b=2", "--xla_a=1"])
def test_wrong_syntax_is_rejected_with_the_config(text):
    with pytest.raises(UserError, match="must be written xla_NAME=VALUE"):
        TrainConfig(compiler_options=text)


def test_chosen_options_override_the_table_and_off_removes_one():
    assert parse_options(" xla_b=off, xla_c=3") == {"xla_b": "off", "xla_c": "3"}
    assert compile_step(StubLowered(), "chip", "xla_b=off,xla_c=3") == {"xla_a": "1", "xla_c": "3"}
    assert compile_step(StubLowered(), "cpu") == {}


def test_an_unknown_option_of_the_table_is_dropped_with_a_warning():
    unknown = "INVALID_ARGUMENT: No such compile option: 'xla_a'"
    with pytest.warns(UserWarning, match="compiling the step without xla_a: INVALID_ARGUMENT"):
        assert compile_step(StubLowered(unknown), "chip") == {"xla_b": "2"}


def test_an_unknown_chosen_option_is_an_error():
    with pytest.raises(UserError, match="the compiler rejects xla_c: INVALID_ARGUMENT: No such"):
        compile_step(StubLowered("INVALID_ARGUMENT: No such compile option: 'xla_c'"), "chip", "xla_c=3")


@pytest.mark.parametrize(
    "message", ["INVALID_ARGUMENT: Mosaic failed to compile", "RESOURCE_EXHAUSTED: raise xla_a to fit", ""]
)
def test_an_error_of_the_program_does_not_blame_an_option(message):
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_step(StubLowered(message), "chip", "xla_c=3")


def test_the_compiler_knows_the_options_for_decoding_and_others_are_left_out(monkeypatch):
    ours, known = ("cpu", "bfloat16"), compiler_options.ROUNDS_OPTIONS["cpu", "bfloat16"]
    assert compiler_options.rounds_options("cpu", "cpu", "bfloat16", 1e6) == known
    monkeypatch.setattr(compiler_options, "ROUNDS_OPTIONS", {ours: {"xla_no_such_option": "1"} | known})
    assert compiler_options.rounds_options("cpu", "cpu", "bfloat16", 1e6) == known


@pytest.mark.parametrize(
    ("platform", "kind", "size", "options"),
    [("cpu", "cpu", 1e6, 0), ("cpu", "cpu", 1e9, 1), ("tpu", "TPU v6 lite", 1e9, 0), ("tpu", "TPU v5 lite", 1e9, 1)],
)
def test_decoding_has_options_for_large_models_on_a_cpu_and_for_a_v5e(platform, kind, size, options):
    assert len(compiler_options.rounds_options(platform, kind, "float32", size)) == options
