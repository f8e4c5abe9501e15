"""Load a tokenizer from its file, whatever its kind."""

from etils import epath

from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER, SentencePiece
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.data.tokenizer_json import JsonTokenizer
from layerskip_jax.data.tokenizer_settings import TokenizerSettings
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside, file_size, is_regular, locate

TOKENIZER_BYTES = 1 << 29


def load_tokenizer(path: str) -> Tokenizer:
    """Load a SentencePiece ``.model`` or a ``.json``, local or gs://; raises `UserError` if it cannot be used."""
    file = locate(path)  # a link keeps its own name and suffix, which tell its kind
    if not is_regular(file):
        if other := find_tokenizer(file.parent):
            raise UserError(f"no tokenizer at {path}: set --data.tokenizer {other}")
        if (file.parent / "config.json").is_file():
            raise UserError(
                f"the Hugging Face folder {file.parent} has no tokenizer: put its tokenizer.json or "
                f"{TOKENIZER} next to its config.json"
            )
        raise UserError(
            f"no tokenizer at {path} (data.tokenizer): copy the model's there or, for a new model, train one with "
            "layerskip data tokenizer --config configs/NAME.py"
        )
    if file_size(file) > TOKENIZER_BYTES:
        raise UserError(f"{path} (data.tokenizer) is too large for a tokenizer: more than {TOKENIZER_BYTES:,} bytes")
    if file.suffix == ".json":
        return JsonTokenizer.read(file)
    # Read settings only next to a tokenizer.model. Next to a file of another name, JSON files may be unrelated.
    settings = TokenizerSettings.read(file.parent) if file.name == TOKENIZER else TokenizerSettings()
    tokenizer = SentencePiece(file.read_bytes(), settings)
    try:
        pieces = len(tokenizer._spelling)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} (data.tokenizer) is not a SentencePiece model, or it is damaged") from error
    try:
        _ = settings.flag("add_bos_token"), settings.flag("add_eos_token"), settings.added_tokens, tokenizer.companions
        usable = pieces and tokenizer.eos_id >= 0
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not usable:
        raise UserError(f"{path} (data.tokenizer) must have pieces, one of them for the end of a text: EOS")
    return tokenizer


def find_tokenizer(folder: epath.Path) -> epath.Path | None:
    """Return the tokenizer file in a folder: ``tokenizer.json`` (as in transformers), else ``tokenizer.model``.

    Raises `UserError` if it is a link out of the folder.
    """
    files = [file_inside(folder, name) for name in ("tokenizer.json", TOKENIZER)]
    return next((file for file in files if is_regular(file)), None)
