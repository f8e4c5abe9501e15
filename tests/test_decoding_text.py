"""Text generation: stop strings, EOS, streaming, reports, and the decode command."""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.commands import decode
from layerskip_jax.commands.terminal import summary_text
from layerskip_jax.config import (
    DecodeConfig,
    ModelConfig,
)
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.cost import head_share, predicted_speedup, round_cost
from layerskip_jax.decoding.engine import begin, generate, rounds_program
from layerskip_jax.decoding.policies import Fixed, Plan
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.summary import Summary
from layerskip_jax.decoding.text import Answer, TextGenerator, encode
from layerskip_jax.errors import UserError

PROMPTS = ["def x", "", "漢字 for y"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(3, vocab_size=VOCABULARY).unstacked()


def generator(model, tokenizer, **values):
    return TextGenerator(model, tokenizer, DecodeConfig(**({"exit_layer": 2, "max_new_tokens": 24} | values)))


@pytest.mark.parametrize("mode", ["self_speculative", "autoregressive", "early_exit"])
def test_texts_and_tokens_agree(model, tokenizer, mode):
    for completion in generator(model, tokenizer, mode=mode).generate(PROMPTS).completions:
        assert completion.text == tokenizer.decode([t for t in completion.tokens if t != tokenizer.eos_id])
        assert completion.finish in ("length", "eos")
        assert len(completion.tokens) == 24 or completion.finish == "eos"


@pytest.mark.parametrize("mode", ["self_speculative", "autoregressive"])
def test_stop_strings_cut_the_same_text_in_every_mode(model, tokenizer, mode):
    free = generator(model, tokenizer, ignore_eos=True).generate(PROMPTS).completions
    stop = free[0].text[5:8]
    stopped = generator(model, tokenizer, ignore_eos=True, mode=mode, stop=(stop, "never there")).generate(PROMPTS)
    for before, after in zip(free, stopped.completions, strict=True):
        if stop in before.text:
            assert after.finish == "stop"
            assert after.text == before.text[: before.text.index(stop)]
            assert stop in tokenizer.decode(after.tokens)
            assert stop not in tokenizer.decode(after.tokens[:-1])
        else:
            assert (after.text, after.finish) == (before.text, before.finish)


@given(seed=st.integers(0, 30), use_stop=st.booleans(), mode=st.sampled_from(["self_speculative", "autoregressive"]))
@settings(max_examples=12)
def test_streamed_pieces_join_to_the_text(tokenizer, seed, use_stop, mode):
    model = tiny_model(seed, vocab_size=VOCABULARY).unstacked()
    whole = generator(model, tokenizer, mode=mode).generate(["x"]).completions[0]
    stop = (whole.text[4:7],) if use_stop and len(whole.text) > 7 else ()
    pieces = []
    streaming = generator(model, tokenizer, mode=mode, stop=stop)
    answer = streaming.generate(["x"], pieces.append)
    assert "".join(piece.text for piece in pieces) == answer.completions[0].text
    assert all(piece.text for piece in pieces)
    if mode == "autoregressive":
        assert not any(piece.drafted for piece in pieces)
    if not stop:
        assert answer.completions[0] == whole


def test_pieces_tell_drafts_from_the_full_models_tokens(model, tokenizer):
    """With a draft that is the full model, all but the last token of a round are drafts."""
    pieces = []
    full = generator(model, tokenizer, exit_layer=4, draft_length=3, ignore_eos=True)
    answer = full.generate(["x"], pieces.append)
    drafted = sum(len(piece.text) for piece in pieces if piece.drafted)
    assert answer.generation.acceptance == 1
    assert 0 < drafted < len(answer.completions[0].text)


def test_texts_end_at_the_first_stop_string_however_often_it_is_searched_for(model, tokenizer):
    """One stop string is inside another, which begins earlier. The one that is complete first must win."""
    text = generator(model, tokenizer, ignore_eos=True, max_new_tokens=40).generate(["x"]).completions[0].text
    first, late = text[6:7], text[3:20]
    answers = {}
    for values in ({"mode": "autoregressive"}, {"draft_length": 5}, {"stream_every": 3}, {"exit_layer": 4}):
        own = generator(model, tokenizer, ignore_eos=True, max_new_tokens=40, stop=(first, late), **values)
        pieces = []
        answers[str(values)] = own.generate(["x"]).completions[0]
        assert own.generate(["x"], pieces.append).completions[0] == answers[str(values)]
        assert "".join(piece.text for piece in pieces) == answers[str(values)].text
    assert len({answer.text for answer in answers.values()}) == 1
    (answer,) = {(answer.text, answer.finish) for answer in answers.values()}
    assert answer == (text[: text.index(first)], "stop")


def test_rates_include_the_tokens_after_a_stop_string(model, tokenizer):
    free = generator(model, tokenizer, ignore_eos=True).generate(["x"]).completions[0]
    plain = generator(model, tokenizer, ignore_eos=True, mode="autoregressive", stop=(free.text[1:3],))
    answer = plain.generate(["x"])
    summary = Summary.from_answers([answer], model.config, plain.config)
    assert summary.new_tokens == len(answer.completions[0].tokens) < summary.rounds
    assert summary.tokens_per_round == 1
    assert summary.predicted_speedup == pytest.approx(1)


def test_streaming_compiles_nothing(model, tokenizer):
    """Compilation during the rounds would count as decoding time."""
    own, compiled = generator(model, tokenizer, ignore_eos=True, stop=("never there",)), []
    jax.clear_caches()
    generator(model, tokenizer, ignore_eos=True).generate(["x"])  # compiles the same rounds, without streaming
    count = lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    own.generate(["x"], lambda piece: None)
    assert not compiled


def test_batches_of_different_lengths_share_one_loop(model, tokenizer):
    prompts = ["x", "x = y " * 30]
    settings = DecodeConfig(exit_layer=2, draft_length=5, max_new_tokens=9, ignore_eos=True)
    lengths = [len(encode(tokenizer, settings, prompt)) for prompt in prompts]
    assert lengths[1] - lengths[0] > 64  # alone, their caches differ in length
    apart, together = (TextGenerator(model, tokenizer, settings, longest) for longest in (0, max(lengths)))
    expected = [apart.generate([prompt]).completions for prompt in prompts]
    program = rounds_program(model.config)
    before = program._cache_size()
    assert [together.generate([prompt]).completions for prompt in prompts] == expected
    assert program._cache_size() == before  # the second prompt alone has compiled this loop


def test_a_total_adds_up_rows_times_and_counts(model):
    strategy = SelfSpeculative(Greedy(), Fixed(2, 3))
    parts = [generate(model, prompts, 12, strategy) for prompts in ([[1, 2]], [[3], [4, 5]])]
    one = Generation.total(parts)
    assert one.tokens == parts[0].tokens + parts[1].tokens
    for name in ("seconds", "prefill_seconds", "rounds", "drafted", "accepted", "new_tokens", "row_rounds"):
        assert getattr(one, name) == sum(getattr(part, name) for part in parts)
    assert one.exit_drafts == {2: one.drafted}
    assert one.accepted_histogram == np.sum([part.accepted_histogram for part in parts], axis=0).tolist()
    assert Generation.total(parts[:1]) == parts[0]


def test_equal_prompts_in_several_batches_get_different_samples(run_folder, capsys):
    request = ["--checkpoint", run_folder, "--temperature", "1", "--max_new_tokens", "12", "--json"]
    same = [word for _ in range(3) for word in ("--prompt", "def ")]
    texts = []
    for _ in range(2):
        *answers, _ = map(json.loads, decoded(capsys, *request, *same).splitlines())
        texts.append([answer["text"] for answer in answers])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_early_exits_are_counted_in_every_row(model, tokenizer):
    config = DecodeConfig(mode="early_exit", exit_layer=2, max_new_tokens=5, ignore_eos=True)
    answer = TextGenerator(model, tokenizer, config).generate(["x", "y"])
    summary = Summary.from_answers([answer], model.config, config)
    assert summary.exit_rounds == {2: 10}
    assert "tokens exited after layer 2 of 4 (10)" in summary_text(summary)


def test_engine_refuses_bad_prompts(model):
    strategy = SelfSpeculative(Greedy(), Fixed(2, 3))
    for prompts, more, message in [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 has no token"),
        ([[1] * 30], {"max_length": 30}, r"prompt 0 has 30 tokens, so max_length 30 leaves no room.*at least 31"),
        ([[1, VOCABULARY]], {}, r"prompt 0 has a token outside the model's vocabulary 0\.\.339"),
    ]:
        with pytest.raises(UserError, match=message):
            begin(model, prompts, 4, strategy, **more)


def test_rows_end_exactly_at_max_length(model):
    for strategy in (Autoregressive(Greedy()), SelfSpeculative(Greedy(), Fixed(2, 5))):
        result = generate(model, [[1] * 29, [1] * 3], 100, strategy, max_length=30)
        assert [len(tokens) for tokens in result.tokens] == [1, 27]


def test_cost_model_by_hand():
    # Without a head, 4 drafts at a quarter of the depth cost one more pass of the model.
    config = ModelConfig(num_layers=8, vocab_size=1)
    assert predicted_speedup(config, 2, 4, 5) == pytest.approx(2.5, rel=1e-3)
    assert predicted_speedup(config, 8, 4, 5) == pytest.approx(1.0, rel=1e-3)


class Alternating(Fixed):
    """Rounds alternate: two drafts from exit 1, one draft from exit 3, no draft."""

    exits = (1, 3)
    verify_widths = (1, 2, 3)

    def init_state(self, model):
        return jnp.int32(0)

    def plan(self, rounds):
        kind = rounds % 3
        return Plan(jnp.where(kind == 1, 1, 0), jnp.array([2, 1, 0])[kind])

    def update(self, rounds, outcome):
        return rounds + 1


def test_a_report_predicts_the_cost_of_the_measured_rounds(model):
    strategy, config = AdaptiveSpeculative(Greedy(), Alternating(1, 2)), DecodeConfig(exit_layer=1, draft_length=2)
    generation = generate(model, [[1, 2, 3]], 30, strategy)
    kinds = [((1, 2), (3, 1), (1, 0))[n % 3] for n in range(generation.rounds)]
    assert generation.exit_drafts == {exit_layer: sum(d for e, d in kinds if e == exit_layer) for exit_layer in (1, 3)}
    cost = sum(round_cost(model.config, *kind) for kind in kinds) / len(kinds)
    assert generation.exit_rounds == {
        exit_layer: sum(d > 0 for e, d in kinds if e == exit_layer) for exit_layer in (1, 3)
    }
    summary = Summary.from_answers([Answer([], generation)], model.config, config)
    undrafted = sum(d == 0 for _, d in kinds)
    assert (
        f"exit 1 of 4 ({kinds.count((1, 2))}), 3 of 4 ({kinds.count((3, 1))}), no draft ({undrafted}): "
        in summary_text(summary)
    )
    assert summary.predicted_speedup == pytest.approx(generation.tokens_per_round / cost)


def test_a_report_counts_the_heads_of_a_confident_exit(model, tokenizer):
    """All tokens exit at the third exit of 1, 2, 4, which takes all blocks and three heads."""
    config = DecodeConfig(mode="early_exit", exit_threshold=1.0, exits=(1, 2), max_new_tokens=5)
    summary = Summary.from_answers([TextGenerator(model, tokenizer, config).generate(["x"])], model.config, config)
    h = head_share(model.config)
    assert summary.predicted_speedup == pytest.approx(1 / (1 - h + 3 * h))


def test_report_says_when_speculation_does_not_pay(model, tokenizer):
    config = DecodeConfig(exit_layer=3, draft_length=8, max_new_tokens=24)
    answers = [TextGenerator(model, tokenizer, config).generate(["x"])]
    summary = Summary.from_answers(answers, model.config, config)
    assert summary.predicted_speedup < 1
    assert re.search("speculation does not pay here .* try --policy adaptive", summary_text(summary))
    adaptive = dataclasses.replace(summary, policy="adaptive")
    assert re.search("try other --exits, or --mode", summary_text(adaptive))
    # The adaptive policy refuses several choices.
    assert "try --choices 1, another" in summary_text(dataclasses.replace(summary, choices=4))
    assert "does not pay" not in summary_text(dataclasses.replace(summary, speedup=1.4, plain_tokens_per_second=1.0))
    assert not any(isinstance(v, float) and math.isnan(v) for v in summary.as_dict().values())
    assert sum(summary.accepted_histogram) == summary.rounds


# The command


@pytest.fixture(scope="module")
def run_folder(trained_run, tmp_path_factory):
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("decode") / "run").as_posix()


def decoded(capsys, *argv):
    decode.main(list(argv))
    return capsys.readouterr().out


def test_decode_needs_only_a_checkpoint_and_a_prompt(run_folder, capsys):
    out = decoded(capsys, "--checkpoint", run_folder, "--prompt", "def x")
    assert out.startswith("def x")
    assert "self-speculative, exit 2 of 4 (" in out
    assert "drafts a round, acceptance" in out
    assert re.search(
        r"reading the weights from memory at \d+\.\d GB/s allows \d+ tokens/s; the measured speed is \d+% of that", out
    )
    assert "tokens/s" in out


def test_decode_json_lines(run_folder, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "def x"}\n{"prompt": "for"}\n\n{"prompt": "if"}\n')
    request = ["--checkpoint", run_folder, "--prompts", str(file), "--json", "--batch_size", "2", "--compare"]
    *completions, numbers = map(json.loads, decoded(capsys, *request, "--max_new_tokens", "6").splitlines())
    assert [completion["prompt"] for completion in completions] == ["def x", "for", "if"]
    assert numbers["prompts"] == 3
    assert numbers["new_tokens"] == sum(len(completion["tokens"]) for completion in completions)
    assert numbers["identical"] is True
    assert {"speedup", "plain_tokens_per_second", "predicted_speedup", "acceptance"} <= numbers.keys()
    assert np.isfinite([value for value in numbers.values() if isinstance(value, float)]).all()


def test_sampled_texts_are_not_reported_as_different(run_folder, capsys):
    request = [
        "--checkpoint",
        run_folder,
        "--prompt",
        "def x",
        "--compare",
        "--temperature",
        "1",
        "--max_new_tokens",
        "6",
    ]
    out = decoded(capsys, *request)
    assert "sampled texts are not compared" in out
    assert "DIFFER" not in out
    assert "identical" not in json.loads(decoded(capsys, *request, "--json").splitlines()[-1])


def test_decode_from_held_out_text_and_early_exit(run_folder, capsys):
    out = decoded(capsys, "--checkpoint", run_folder, "--held_out", "1", "--mode", "early_exit", "--quiet")
    assert "lossy, not the full model's text; tokens exited after layer 2 of 4" in out


def test_decode_command_errors(run_folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    base = ["--checkpoint", run_folder]
    for argv, message in [
        ([*base], "give the prompts in one way"),
        ([*base, "--prompt", "a", "--held_out", "1"], "give the prompts in one way"),
        ([*base, "--prompts", str(tmp_path / "none.txt")], "cannot read the prompts file"),
        ([*base, "--prompts", str(tmp_path / "bad.jsonl")], "must have a JSON object with a 'prompt'"),
        ([*base, "--prompt", "a", "--exit_layer", "5"], r"exit_layer 5 must be in 1\.\.4"),
        ([*base, "--prompt", "a", "--draft_length", "0"], r"draft_length must be in 1\.\.63"),
        ([*base, "--prompt", "a", "--exit_layr", "2"], r"unknown setting --exit_layr; did you mean '--exit_layer'"),
        ([*base, "--prompt", "a", "--top_p", "two"], "--top_p: must be a finite number, not 'two'"),
        ([*base, "--prompt", "a", "--mode", "earlyexit"], "did you mean 'early_exit'"),
        (["--checkpoint", str(tmp_path / "none"), "--prompt", "a"], "no checkpoint at"),
    ]:
        with pytest.raises(UserError, match=message):
            decode.main(argv)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_streaming_in_chunks_of_rounds_gives_the_same_text_and_colours(model, tokenizer, every):
    def streamed(stream_every):
        pieces = []
        generator(model, tokenizer, ignore_eos=True, stream_every=stream_every).generate(["x"], pieces.append)
        return "".join(("G" if piece.drafted else "Y") * len(piece.text) for piece in pieces)

    assert streamed(every) == streamed(2)


def test_every_mode_and_policy_is_a_setting(model, tokenizer):
    full = generator(model, tokenizer, mode="autoregressive").generate(PROMPTS).completions
    lossless = [{"policy": "confidence", "draft_threshold": 0.1}, {"policy": "adaptive"}, {"mode": "prompt_lookup"}]
    lossless += [{"lookup_length": 5}, {"policy": "adaptive", "lookup_length": 3}, {"choices": 3}]
    for values in [*lossless, {"mode": "autoregressive"}]:
        one = generator(model, tokenizer, **values)
        answer = one.generate(PROMPTS)
        assert answer.completions == full
        json.dumps(Summary.from_answers([answer], model.config, one.config).as_dict(), allow_nan=False)
    lossy = generator(model, tokenizer, mode="early_exit", exit_threshold=1e-6, exits=(1,))
    answer = lossy.generate(PROMPTS)
    assert set(answer.generation.exit_rounds) == {1, 4}
    summary = Summary.from_answers([answer], model.config, lossy.config)
    assert "lossy" in summary_text(summary)
    assert summary.predicted_speedup > 1


def test_exits_are_checked(model, tokenizer):
    with pytest.raises(UserError, match="exits must be strictly increasing and at least 1, got 3 2"):
        DecodeConfig(exits=(3, 2))
    with pytest.raises(UserError, match=r"exits 2 9 must be in 1\.\.4"):
        generator(model, tokenizer, policy="adaptive", exits=(2, 9))
