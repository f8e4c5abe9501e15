"""The files of transformers next to a tokenizer: its special tokens, the tokens that end a text, the chat template."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from etils import epath

from layerskip_jax.checks import require
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside, is_regular, read_limited

SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
MODEL_CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The contents of these files, by name. A file that is not there sets nothing."""

    contents: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    @classmethod
    def read(cls, folder: epath.Path) -> Self:
        """Read the files that are in ``folder``; raises `UserError` for a link out of it."""
        names = (SETTINGS, SPECIAL_TOKENS, GENERATION, MODEL_CONFIG, CHAT_TEMPLATE)
        files = {name: file_inside(folder, name) for name in names}
        try:
            return cls({name: read_limited(file) for name, file in files.items() if is_regular(file)})
        except OSError as error:
            raise UserError(f"cannot read the settings of the tokenizer in {folder}: {error}") from error

    def _object(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.contents.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON: {error}") from error
        require(isinstance(value, dict), f"{name} must be a JSON object, not {value!r:.40}")
        return value

    @cached_property
    def values(self) -> dict[str, Any]:
        """The content of `SETTINGS`. If it has no ``added_tokens_decoder``, `SPECIAL_TOKENS` is merged into it and
        wins, as in transformers."""
        values = self._object(SETTINGS)
        return values if "added_tokens_decoder" in values else values | self._object(SPECIAL_TOKENS)

    def flag(self, name: str) -> bool | None:
        """Return a setting that is true, false or not given."""
        value = self.values.get(name)
        require(
            value is None or isinstance(value, bool), f"{SETTINGS}: {name} must be true or false, not {value!r:.40}"
        )
        return value

    @property
    def roles(self) -> dict[str, str]:
        """The special tokens by their role, such as ``bos_token``."""
        named = {role: value for role, value in self.values.items() if role.endswith("_token")}
        return {
            role: token_text(value)
            for role, value in named.items()
            if value is not None and not isinstance(value, bool)
        }

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokens that were added to the vocabulary, with their flags, in the order of their ids."""
        added = self.values.get("added_tokens_decoder") or {}
        known = isinstance(added, dict) and all(key.isdecimal() and len(key) < 20 for key in added)
        require(known, f"{SETTINGS}: added_tokens_decoder must be an object of token ids, not {added!r:.60}")
        tokens = [added[key] for key in sorted(added, key=int)]
        return [(token if isinstance(token, dict) else {}) | {"content": token_text(token)} for token in tokens]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the model's files list them: one, several or none."""
        for name in (GENERATION, MODEL_CONFIG):
            value = self._object(name).get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            wrong = [token for token in ids if type(token) is not int]
            require(not wrong, f"{name}: eos_token_id must be a token id or a list of token ids, not {value!r:.60}")
            if ids := [token for token in ids if token >= 0]:
                return tuple(dict.fromkeys(ids))
        return ()

    @property
    def chat_template(self) -> str:
        """The chat template; of several with names, ``default``. Raises `UserError` if there is none."""
        if CHAT_TEMPLATE in self.contents:
            return self.contents[CHAT_TEMPLATE].decode("utf-8-sig", "replace")
        named = self.values.get("chat_template")
        if isinstance(named, list):
            named = {str(part.get("name")): part.get("template") for part in named if isinstance(part, dict)}
        template = named.get("default") if isinstance(named, dict) else named
        if not isinstance(template, str):
            names = f", only {', '.join(named)}" if isinstance(named, dict) else ""
            raise UserError(
                f"the model's folder has no chat template: neither {CHAT_TEMPLATE} nor a chat_template in {SETTINGS}"
                f"{names}; leave out --chat"
            )
        return template

    def kept(self, eos_id: int) -> dict[str, bytes]:
        """Return the files to store with a run's tokenizer. Their end tokens then include ``eos_id``."""
        kept = {n: self.contents[n] for n in (SETTINGS, SPECIAL_TOKENS, CHAT_TEMPLATE) if n in self.contents}
        generation = self._object(GENERATION)
        if self.end_ids:
            generation |= {"eos_token_id": list(dict.fromkeys([*self.end_ids, eos_id]))}
        if generation:
            kept[GENERATION] = json.dumps(generation, indent=1).encode()
        return kept


def token_text(value: Any) -> str:
    """Return the text of a special token, which is stored as text or as an object with its ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"{SETTINGS}: a special token must be text, not {value!r:.60}")
    return text
