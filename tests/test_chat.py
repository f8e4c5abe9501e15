"""Chat templates: rendered and encoded as transformers does, from every place that a folder can store them."""

import json
import re
import sys

import pytest
import transformers
from etils import epath

from layerskip_jax.commands import decode
from layerskip_jax.data.chat import render_chat
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = """{%- for message in messages %}
    {{- '<s>' + message.role + '\n' + message.content + '</s>' }}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
<s>assistant
{% endif %}
{% if tools is not none %}tools{% endif %}"""
ODD = (
    "{% set ns = namespace(n=0) %}{% generation %}{{ messages | tojson }}{% set ns.n = 1 %}{% endgeneration %}"
    "{{ ns.n }}{{ unknown }}{{ pad_token }}{{ dict(a=1)['a'] }}{{ strftime_now('%Y')[:2] }}{{ '<b>' }}"
    "{{ messages[0]['none'] }}"
)
TEMPLATES = [LLAMA2, CHATML, ODD]
PROMPTS = ["def x", " naïve 漢字\n", "<s>nested</s>", '"quoted" & <tag>', ""]


def store(target, source, template, kind):
    """Copy a tokenizer and store a template in one of the ways of transformers."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    named = {
        "string": template,
        "list": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}],
    }
    config = json.loads((target / "tokenizer_config.json").read_text())
    if kind == "file":  # it has priority
        (target / "chat_template.jinja").write_text(template)
        config["chat_template"] = "no"
    elif kind in named:
        config["chat_template"] = named[kind]
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(target / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["string", "list", "file"])
@pytest.mark.parametrize("template", TEMPLATES, ids=["llama2", "chatml", "odd"])
def test_ids_equal_those_of_transformers(llama, tmp_path, template, kind):
    ours = store(tmp_path, llama, template, kind)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == expected


def test_the_rendered_text(llama, tmp_path):
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    render = lambda template, *messages: render_chat(template, messages, roles)  # noqa: E731
    user, assistant = {"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}
    assert render(LLAMA2, user, assistant, user) == "<s>[INST] hi [/INST] yes </s><s>[INST] hi [/INST]"
    assert render(CHATML, user) == "<s>user\n hi </s><s>assistant\n"
    with pytest.raises(UserError, match="the chat template refuses these messages: roles must alternate"):
        render(LLAMA2, assistant)
    tokenizer = store(tmp_path, llama, LLAMA2, "string")
    ids = tokenizer.encode_chat([user])
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode("[INST] hi [/INST]")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages[9].content.x.y }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'a' + 1 }}",
        "{% include 'x' %}",
        "{% for n in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(UserError, match="the chat template does not render: "):
        render_chat(template, [{"role": "user", "content": "x"}], {})


def test_jinja2_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    with pytest.raises(UserError, match=r"needs Jinja2: pip install 'layerskip-jax\[huggingface\]'"):
        render_chat("x", [], {})


def test_a_folder_without_a_template_is_one_line(llama, tmp_path):
    tokenizer = store(tmp_path, llama, "", "none")
    with pytest.raises(UserError, match=r"no chat template: neither chat_template\.jinja nor.*leave out --chat"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only rag"):
        load_tokenizer(str(tmp_path / "tokenizer.json")).encode_chat([{"role": "user", "content": "x"}])


def test_special_tokens_are_read_without_a_tokenizer_json(llama, tmp_path):
    whole = load_tokenizer(str(llama / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    config = {"chat_template": LLAMA2, "added_tokens_decoder": {"1": {"content": "<s>"}, "340": {"content": "[/INST]"}}}
    for more, message in [(config, r"lacks the token \[/INST\]"), ({"chat_template": LLAMA2}, None)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
        ours = load_tokenizer(str(tmp_path / "tokenizer.model"))
        chat = [{"role": "user", "content": "def x </s> y"}]
        if message:
            with pytest.raises(UserError, match=message):
                ours.encode_chat(chat)
        else:
            assert ours.encode_chat(chat) == whole.encode(f"<s>[INST] {chat[0]['content']} [/INST]")


def test_decode_renders_the_template(llama, model, tmp_path, capsys, monkeypatch):
    for file in epath.Path(llama).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    store(tmp_path, llama, CHATML, "file")
    seen = []
    from layerskip_jax.decoding import text

    plain = text.generate
    monkeypatch.setattr(
        text, "generate", lambda model, ids, *args, **more: seen.extend(ids) or plain(model, ids, *args, **more)
    )
    decode.main([str(tmp_path), "--prompt", "def x", "--chat", "--max_new_tokens", "3", "--json"])
    answer = json.loads(capsys.readouterr().out.splitlines()[0])
    assert answer["prompt"] == "def x"
    tokenizer = load_tokenizer(str(llama / "tokenizer.json"))
    assert seen == [tokenizer.encode("<s>user\ndef x</s><s>assistant\n")]
    assert not re.search("user|assistant", answer["prompt"])
