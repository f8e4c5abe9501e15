"""The files of a tokenizer decide: settings that tokenizer.json can store, BOS and EOS, lone surrogates, U+2581."""

import contextlib
import dataclasses
import json
import pickle

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.tokenizer import SPACE, valid_text
from layerskip_jax.data.tokenizer_json import JsonTokenizer
from layerskip_jax.data.tokenizer_settings import SETTINGS, TokenizerSettings
from layerskip_jax.errors import UserError

TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 16},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
}
SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<sep>"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The tokenizer.json of a byte-level BPE and of a BPE with byte fallback, as JSON objects."""
    made = {}
    text = ["def x: return the value of x", "naïve 漢字 for y in the index", "if x == 1:\n    return None"] * 4
    for kind in ("byte_level", "byte_fallback"):
        library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=kind == "byte_fallback", unk_token="<unk>"))
        alphabet = []
        if kind == "byte_level":
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            library.decoder = tokenizers.decoders.ByteLevel()
            alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        else:
            library.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
            library.decoder = tokenizers.decoders.Sequence(
                [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.ByteFallback()]
            )
        in_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte_fallback" else []
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=380, special_tokens=[*SPECIALS[:3], *in_bytes], initial_alphabet=alphabet, show_progress=False
        )
        library.train_from_iterator(text, trainer)
        made[kind] = json.loads(library.to_str())
        made[kind]["added_tokens"] = made[kind]["added_tokens"][:3]  # the bytes are ordinary pieces
    return made


def write(folder, values, config):
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder / "tokenizer.json"))


def template(*parts):
    """A post-processor that puts special tokens around the text, "$A"."""
    ids = {name: number for number, name in enumerate(SPECIALS)}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "$A" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in parts if name != "$A"}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_truncation_padding_and_dropout_of_the_file_are_off(plain, tmp_path):
    for kind, values in plain.items():
        text = "def x: return the value of the index " * 4
        ids = write(tmp_path / kind, values, NAMES).encode(text)
        changed = values | {"truncation": TRUNCATION, "padding": PADDING}
        changed["model"] = values["model"] | {"dropout": 0.5}
        tokenizer = write(tmp_path / "changed", changed, NAMES)
        assert len(ids) > 16
        assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == ids
        assert pickle.loads(pickle.dumps(tokenizer)).encode_document(text) == [*ids, 2]


@pytest.mark.parametrize(
    ("post_processor", "config", "before", "after"),
    [
        (("<s>", "$A"), {}, [1], []),
        (("<s>", "$A"), {"add_bos_token": False}, [], []),
        (("<s>", "$A"), {"add_bos_token": None}, [1], []),
        (("$A",), {}, [], []),
        (("$A",), {"add_bos_token": True}, [1], []),
        (("<s>", "$A", "</s>"), {}, [1], [2]),
        (("<s>", "$A", "</s>"), {"add_eos_token": False}, [1], []),
        (("<s>", "$A"), {"add_eos_token": True}, [1], [2]),
        (("<s>", "<unk>", "$A"), {}, [1, 0], []),
        (None, {}, [], []),
        (None, {"add_bos_token": True}, [1], []),
        (None, {"add_bos_token": True, "bos_token": None}, [], []),
        (("$A",), {"bos_token": None}, [], []),
    ],
)
def test_the_files_decide_about_bos_and_eos(plain, tmp_path, post_processor, config, before, after):
    for values in plain.values():
        changed = values | {"post_processor": template(*post_processor) if post_processor else None}
        tokenizer = write(tmp_path / "files", changed, NAMES | config)
        text = tokenizer.encode("def x")
        assert tokenizer.encode_prompt("def x") == [*before, *text, *after]
        assert tokenizer.encode_document("def x") == [*before, *text, 2]
        assert tokenizer.bos_id == (None if config.get("bos_token", 1) is None else 1)


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"bos_token": 0}, None, 0),
    ],
)
def test_the_settings_next_to_a_sentencepiece_model_decide(corpus, tmp_path, config, before, after):
    ours = load_tokenizer(corpus.tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(ours.model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "other.model").write_bytes(ours.model)
    assert load_tokenizer(str(tmp_path / "other.model")).encode_prompt("x") == ours.encode_prompt("x")
    if before is None:
        with pytest.raises(UserError, match="a special token must be text"):
            load_tokenizer(str(tmp_path / "tokenizer.model"))
        return
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode_prompt("def x") == [*before, *ours.encode("def x"), *after]
    assert tokenizer.fingerprint() == ours.fingerprint()


def test_a_second_bos_gets_one_warning(plain, tmp_path, capsys):
    tokenizer = write(tmp_path / "files", plain["byte_level"] | {"post_processor": template("<s>", "$A")}, NAMES)
    assert tokenizer.encode_prompt("def") == [1, *tokenizer.encode("def")]
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert tokenizer.encode_prompt("<s>def") == [1, 1, *tokenizer.encode("def")]
    assert capsys.readouterr().err.count("WARNING: a text starts with BOS twice") == 1


def test_config_json_names_eos_where_the_tokenizer_does_not(plain, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain["byte_level"]))
    with pytest.raises(UserError, match=r"needs its tokenizer_config\.json in the same folder"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_tokens(400)) == (None, 2, (2, 5))
    assert list(tokenizer.files) == ["tokenizer.json"]
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "<unk>"}')
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 500) | st.sampled_from(["<s>", "</s>", "", "x", "1", "[PAD]"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["1", "content", "400"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["bos_token", "eos_token", "pad_token", "add_bos_token", "added_tokens_decoder", "extra_special_tokens"]


@given(
    config=st.dictionaries(st.sampled_from([*KEYS, "chat_template", "split_special_tokens"]), anything), end=anything
)
def test_any_settings_are_read_or_refused(plain, corpus, tmp_path_factory, config, end):
    folder = tmp_path_factory.getbasetemp() / "any_settings"
    with contextlib.suppress(UserError):
        write(folder, plain["byte_fallback"], config)
    (folder / "tokenizer.model").write_bytes(load_tokenizer(corpus.tokenizer).model)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    for name in ("tokenizer.json", "tokenizer.model"):
        with contextlib.suppress(UserError):
            tokenizer = load_tokenizer(str(folder / name))
            tokenizer.end_tokens(340)
            assert tokenizer.decode(tokenizer.encode("def x")) == "def x"
            tokenizer.encode_chat([{"role": "user", "content": "x"}])


# Against transformers

normalizers = st.sampled_from(
    [None, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}]
)
added = st.builds(
    lambda name, flags: {"content": name} | dict(zip(FLAGS, flags, strict=True)),
    st.sampled_from([*SPECIALS, "[PAD]", "return", "<|assistant|>"]),
    st.tuples(*[st.booleans()] * len(FLAGS)),
)
post_processors = st.sampled_from(
    [None, template("$A"), template("<s>", "$A"), template("<s>", "$A", "</s>"), template("<unk>", "<s>", "$A")]
)
texts = st.lists(
    st.sampled_from(
        [*SPECIALS, "[PAD]", "<|assistant|>", "return", " ", "  ", "\n", "def x", "é", "漢", "ﬁ", "X", SPACE]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@given(
    kind=st.sampled_from(["byte_level", "byte_fallback"]),
    text=texts,
    truncation=st.sampled_from([None, TRUNCATION]),
    padding=st.sampled_from([None, PADDING]),
    normalizer=normalizers,
    post_processor=post_processors,
    more=st.lists(added, max_size=3, unique_by=lambda token: token["content"]),
    config=st.fixed_dictionaries(
        {},
        optional={
            "bos_token": st.sampled_from(["<s>", None, "<unk>", "<new>"]),
            "pad_token": st.sampled_from(["[PAD]", "</s>", None]),
            "additional_special_tokens": st.lists(st.sampled_from(["<|user|>", "<a>", "<b>"]), unique=True),
            "split_special_tokens": st.booleans(),
        },
    ),
    in_config=st.booleans(),
    dropout=st.sampled_from([None, 0.0]),
)
@settings(max_examples=300)
def test_ids_equal_those_of_transformers(
    plain,
    tmp_path_factory,
    kind,
    text,
    truncation,
    padding,
    normalizer,
    post_processor,
    more,
    config,
    in_config,
    dropout,
):
    values = json.loads(json.dumps(plain[kind]))
    values |= {"truncation": truncation, "padding": padding, "post_processor": post_processor}
    values["model"]["dropout"] = dropout
    if normalizer:
        own = [values["normalizer"]] if values["normalizer"] else []
        values["normalizer"] = {"type": "Sequence", "normalizers": [normalizer, *own]}
    vocabulary = values["model"]["vocab"]
    fresh = [token for token in more if token["content"] not in SPECIALS[:3]]
    entries = [
        {"id": vocabulary.get(token["content"], len(vocabulary) + number)} | token for number, token in enumerate(fresh)
    ]
    if in_config:
        decoder = [*values["added_tokens"], *entries]
        config = config | {
            "added_tokens_decoder": {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in decoder}
        }
    else:
        values["added_tokens"] += sorted(entries, key=lambda entry: entry["id"])
    folder = tmp_path_factory.getbasetemp() / "random_tokenizer"
    ours = write(folder, values, NAMES | config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.encode_prompt(text) == theirs(text).input_ids
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))


# Text that is not Unicode, and the character that stands for a space


@given(text=st.text(st.characters() | st.characters(categories=["Cs"])))
def test_lone_surrogates_become_the_replacement_character(corpus, text):
    tokenizer = load_tokenizer(corpus.tokenizer)
    valid = valid_text(text)
    assert valid == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == valid
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert valid == text
    assert valid_text("a\ud800b\udfffc\ud83d\ude00") == "a\ufffdb\ufffdc\U0001f600"


def test_a_tokenizer_is_trained_on_text_with_lone_surrogates(tmp_path):
    documents = ["def x \ud800 return the value", "\udc00 for y in the index"] * 20
    tokenizer = train_tokenizer(documents, str(tmp_path / "t.model"), 300)
    assert tokenizer.decode(tokenizer.encode(documents[0])) == "def x \ufffd return the value"


@pytest.fixture(scope="module")
def dummy_prefix(tmp_path_factory):
    """A model like Llama 2's, with a dummy prefix, and one with other control tokens and without bytes."""
    folder, made = tmp_path_factory.mktemp("prefix"), {}
    text = ["def x: return the value of x", "for y in the index a b"] * 20
    settings = {"vocab_size": 320, "model_type": "bpe", "minloglevel": 2, "normalization_rule_name": "identity"}
    kinds = {
        "llama": {"byte_fallback": True, "remove_extra_whitespaces": False},
        "no_bos": {"vocab_size": 50, "bos_id": -1, "eos_id": 3, "pad_id": 1, "unk_id": 2, "control_symbols": ["<|u|>"]},
    }
    for name, more in kinds.items():
        path = folder / f"{name}.model"
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text), model_writer=file, **(settings | more)
            )
        made[name] = load_tokenizer(str(path))
    return made


@given(text=st.text(st.sampled_from(f"ab{SPACE} \n漢"), max_size=12))
def test_a_dummy_prefix_adds_a_space_in_front_and_nowhere_else(dummy_prefix, text):
    tokenizer = dummy_prefix["llama"]
    assert tokenizer.decode(tokenizer.encode(text)) == (" " + text if text else "")


@given(text=st.text(st.sampled_from(f"ab{SPACE} \n漢"), max_size=12))
def test_a_continuation_has_no_dummy_prefix(dummy_prefix, text):
    tokenizer = dummy_prefix["llama"]
    assert tokenizer.decode(tokenizer.encode_continuation(text)) == text


@pytest.mark.parametrize("prefix", ["Prepend", "Metaspace", None])
def test_a_continuation_in_a_tokenizer_json_has_no_prefix(dummy_prefix, prefix):
    files = tokenizer_files(dummy_prefix["llama"])
    file = json.loads(files["tokenizer.json"])
    replace_spaces = file["normalizer"]["normalizers"][1]
    if prefix == "Metaspace":
        file["normalizer"], file["pre_tokenizer"] = None, {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False
        }  # fmt: skip
    if prefix is None:
        file["normalizer"] = replace_spaces
    settings = TokenizerSettings({SETTINGS: files[SETTINGS]})
    tokenizer = JsonTokenizer(json.dumps(file).encode(), settings)
    assert tokenizer.decode(tokenizer.encode("a b")) == (" a b" if prefix else "a b")
    for text in ("a b", "  a", "", "\n b"):
        assert tokenizer.decode(tokenizer.encode_continuation(text)) == text


def test_an_export_adds_eos_like_the_tokenizer(dummy_prefix):
    settings = TokenizerSettings({SETTINGS: b'{"add_eos_token": true}'})
    tokenizer = dataclasses.replace(dummy_prefix["llama"], settings=settings)
    files = tokenizer_files(tokenizer)
    exported = JsonTokenizer(files["tokenizer.json"], TokenizerSettings({SETTINGS: files[SETTINGS]}))
    assert exported.encode_prompt("a b") == tokenizer.encode_prompt("a b")
    assert exported.encode_prompt("a b")[-1] == tokenizer.eos_id


def test_other_control_tokens_are_read(dummy_prefix):
    tokenizer = dummy_prefix["no_bos"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_tokens(50)) == (None, 3, (3,))
    assert tokenizer.special_tokens == {"<pad>": 1, "</s>": 3, "<|u|>": 0}
    assert tokenizer.encode_document("def x") == [*tokenizer.encode("def x"), 3]
    assert tokenizer.decode(tokenizer.encode(f"a{SPACE}b")) == " a\ufffdb"  # it has no bytes to spell the character
