"""Chat templates of transformers, rendered by Jinja2 in its sandbox (extra ``huggingface``)."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerskip_jax.errors import UserError


def render_chat(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """Return the text of a conversation, up to where the assistant's answer starts.

    ``messages`` have a ``role`` and a ``content``. The template gets what transformers' ``apply_chat_template`` gives
    it. It is code of the model's authors, so it runs in a sandbox. Raises `UserError` if it fails.
    """
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError("a chat template needs Jinja2: pip install 'layerskip-jax[huggingface]'") from None

    class Generation(jinja2.ext.Extension):
        """The block ``generation`` marks an assistant's answer for training; its content is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012  (as in Jinja2)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _as_json  # Jinja's own escapes HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except UserError as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template can raise anything, such as a TypeError of its own code
        raise UserError(f"the chat template does not render: {type(error).__name__}: {error}") from error


def _as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise UserError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
