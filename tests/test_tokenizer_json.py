"""tokenizer.json: exported files encode as SentencePiece does, and foreign files decode without loss."""

import json
import pickle

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.data.load_tokenizer import find_tokenizer, load_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import SPACE
from layerskip_jax.errors import UserError

EOS = {"eos_token": "<|end_of_text|>"}
TEXTS = st.text(
    st.one_of(st.sampled_from(" \n\tabdefx=("), st.characters(codec="utf-8", exclude_characters=SPACE + "<"))
)


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    """A SentencePiece model, and the tokenizer.json exported from it."""
    folder = tmp_path_factory.mktemp("exported")
    ours = load_tokenizer(corpus.tokenizer)
    for name, content in tokenizer_files(ours).items():
        (folder / name).write_bytes(content)
    return ours, load_tokenizer(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_level(corpus, tmp_path_factory):
    """A byte-level BPE like that of Llama 3, trained by the tokenizers library."""
    folder = tmp_path_factory.mktemp("byte_level")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = open_documents(corpus, "train")
    library.train_from_iterator((str(documents[i]) for i in range(len(documents))), trainer)
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@given(text=TEXTS)
def test_the_exported_json_encodes_as_sentencepiece_does(exported, text):
    ours, written = exported
    assert written.encode(text) == ours.encode(text)
    assert written.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    assert (written.bos_id, written.eos_id, written.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)


@given(text=TEXTS)
def test_byte_level_decoding_restores_the_text(byte_level, text):
    tokenizer, before = load_tokenizer(str(byte_level / "tokenizer.json")), ""
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    for n in range(len(ids) + 1):
        now = tokenizer.decode_partial(ids[:n])
        assert now.startswith(before)
        assert text.startswith(now)
        before = now
    assert before == text


def test_a_tokenizer_json_pickles_with_the_content_of_its_files(byte_level):
    tokenizer = load_tokenizer(str(find_tokenizer(byte_level)))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert again.encode("def x") == tokenizer.encode("def x")
    assert tokenizer.files == {path.name: path.read_bytes() for path in byte_level.iterdir()}


def test_tokens_beyond_the_vocabulary_have_no_text(exported):
    """A padded model can generate them."""
    for tokenizer in exported:
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 3]) == "ab"
        tokenizer.check_vocabulary(tokenizer.vocab_size + 8, padded=True)
        with pytest.raises(UserError, match="pieces and the model's vocabulary"):
            tokenizer.check_vocabulary(tokenizer.vocab_size - 1, padded=True)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, None, "needs its tokenizer_config.json in the same folder"),
        (None, {"bos_token": "<|begin_of_text|>"}, "must name an eos_token, and generation_config.json has no eos"),
        (None, {"eos_token": 5}, "a special token must be text, not 5"),
        (None, {"eos_token": "<|end_of_text|>", "add_bos_token": "no"}, "add_bos_token must be true or false"),
        ("{}", {}, "is not a tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}}, EOS, "4000000000 is too large"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, {}, "only byte-level BPE and BPE with"),
    ],
)
def test_unusable_files_are_errors(byte_level, tmp_path, content, settings, message):
    whole = json.loads((byte_level / "tokenizer.json").read_text())
    text = content if isinstance(content, str) else json.dumps(whole | (content or {}))
    (tmp_path / "tokenizer.json").write_text(text)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
