"""Chat templates render the text of transformers' `apply_chat_template`, and always terminate."""

import datetime
import json
import time

import pytest
from transformers import AutoTokenizer

from tests.hub import tiny_tokenizers as tiny
from vlm_jax.config import UserError
from vlm_jax.hub.text import jinja_sandbox
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.tokenizer import HubTokenizer

# In the manner of published templates.
LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now("%Y") %}\
{% else %}{% set date = "2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' \
+ date + '\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' \
+ message.content | trim + eos_token }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- for part in message.content %}
            {%- if part['type'] == 'image' %}{{- '<|image|>' }}\
{%- else %}{{- part['text'] | trim }}{%- endif %}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
LLAVA = """{% for message in messages %}
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}
{# images come first #}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}
{% endfor %}{% if message['role'] != 'assistant' %}
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ part['text'] + ' '}}{% endfor %}
{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}{{ part['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
LOOPS = """{% macro say(who, what='-') %}[{{ who }}|{{ what }}]{% endmacro %}\
{% set ns = namespace(n=0) %}
{% for message in messages if message.role != 'tool' recursive %}\
{% if loop.index > 3 %}{% break %}{% endif %}
  {% if not message.content %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 2 ** 3 * 1 %}{{ say(message.role, message.content) -}} {{ '-' * 3 ~ ns.n }}
{% else %}nothing{% endfor %}
{{ {'<b>': "é'\\"&", 'last': messages[-1]} | tojson }}
{{ dict(a=1) | tojson(indent=2, sort_keys=True) }}\
{{ messages | map(attribute='role') | join(',') }}"""

TEXTS = [
    {"role": "user", "content": "  What's <b>this</b>? 😀 {{ bos_token }}\n"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And?"},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it? "}, {"type": "image"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
]
SYSTEM = {"role": "system", "content": "Be brief. "}
PAIRS = {
    "llama3": (LLAMA3, [SYSTEM, *TEXTS]),
    "llama3 with images": (LLAMA3, PARTS),
    "chatml": (CHATML, [SYSTEM, *TEXTS]),
    "llava": (LLAVA, PARTS),
    "gemma": (GEMMA, TEXTS),
    "loops": (LOOPS, [*TEXTS, {"role": "user", "content": ""}, {"role": "tool", "content": "x"}]),
    "no messages match": (LOOPS, [{"role": "tool", "content": "x"}]),
}
in_llama3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def template(source: str, tmp_path, name: str = "chat_template.jinja") -> ChatTemplate:
    (tmp_path / name).write_text(source, encoding="utf-8")
    return ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "conversation"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_text_is_that_of_transformers(name, prompt, tmp_path):
    source, messages = PAIRS[name]
    tiny.llama3(tmp_path)
    ours = template(source, tmp_path).render(
        messages, HubTokenizer.load(tmp_path).special_tokens, prompt
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )


def test_now_is_now(tmp_path):
    written = template("{{ strftime_now('%d %b %Y') }}", tmp_path).render([], {})
    assert abs(datetime.datetime.strptime(written, "%d %b %Y") - datetime.datetime.now()).days <= 1


# ---- where templates are


def test_a_template_of_a_file_of_its_own_is_preferred(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    tiny.llama3(tmp_path)
    assert ChatTemplate.load(tmp_path) is None
    settings = tiny.read(tmp_path, "tokenizer_config")
    tiny.write(tmp_path, tokenizer_config=settings | {"chat_template": "settings"})
    assert ChatTemplate.load(tmp_path).render([], {}) == "settings"
    assert (
        template("{{ bos_token }} jinja", tmp_path).render([], in_llama3)
        == "<|begin_of_text|> jinja"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TEXTS, tokenize=False) == "<|begin_of_text|> jinja"
    tiny.write(
        tmp_path, chat_template={"chat_template": "json"}, processor_config={"patch_size": 14}
    )
    assert ChatTemplate.load(tmp_path).render([], {}) == "json"


@pytest.mark.parametrize("as_list", [True, False])
def test_of_several_templates_the_default_one(as_list, tmp_path):
    named = {"tool_use": "tools", "default": "{{ messages[0].role }}"}
    several = (
        [{"name": name, "template": text} for name, text in named.items()] if as_list else named
    )
    tiny.llama3(tmp_path)
    tiny.write(
        tmp_path,
        tokenizer_config=tiny.read(tmp_path, "tokenizer_config") | {"chat_template": several},
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TEXTS, tokenize=False)
    assert ChatTemplate.load(tmp_path).render(TEXTS, {}) == theirs == "user"
    tiny.write(tmp_path, tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(UserError, match=r"tokenizer_config.json .* rag, .*default"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("content", [5, [1], {"default": 7}])
def test_a_template_that_is_no_text(content, tmp_path):
    tiny.write(tmp_path, tokenizer_config={"chat_template": content})
    with pytest.raises(UserError, match="tokenizer_config.json"):
        ChatTemplate.load(tmp_path)


def test_which_form_of_messages_a_template_reads(tmp_path):
    reads = {
        name: template(source, tmp_path).accepts_lists(in_llama3)
        for name, (source, _) in PAIRS.items()
    }
    expected = dict.fromkeys(("llama3", "llama3 with images", "llava"), True) | {
        "chatml": False,
        "gemma": False,
    }
    assert {name: reads[name] for name in expected} == expected
    assert not template("{{ messages[0].content | trim }}", tmp_path).accepts_lists({})


# ---- templates that misbehave


def growing(step: str) -> str:
    return (
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = "
        + step
        + " %}{% endfor %}"
    )


MISBEHAVING = {
    "syntax": "{% if %}",
    "unknown tag": "\n{% frobnicate %}",
    "unclosed": "{% for m in messages %}",
    "refuses": "{{ raise_exception('no\nsystem role') }}",
    "private attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "changes messages": "{{ messages.append(1) }}",
    "undefined": "{{ a.b.c }}",
    "wrong type": "{{ 'a' + 1 }}",
    "includes": "{% include '/etc/passwd' %}",
    "division": "{{ 1 / 0 }}",
    "large range": "{% for i in range(10000000) %}{% endfor %}",
    "nested loops": "{% set r = range(100000) %}"
    "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "one long text": "{{ 'x' * 10 ** 11 }}",
    "one large number": "{{ 10 ** (10 ** 10) }}",
    "joined": growing("ns.x ~ ns.x"),
    "added": growing("ns.x + ns.x"),
    "lists": growing("[ns.x, ns.x]") + "{{ ns.x | string }}",
    "written lists": growing("[ns.x, ns.x]") + "{{ ns.x }}",
    "replaced": growing("ns.x.replace('a', 'aaaaaaaaaa')"),
    "replaced by a filter": growing("ns.x | replace('a', 'aaaaaaaaaa')"),
    "joined by a filter": growing("([ns.x] * 10) | join"),
    "joined from a generator": growing("(ns.x, ns.x) | map('upper') | join"),
    "formatted": "{{ '%99999999999d' % 1 }}",
    "formatted by a star": "{{ '%*d' % (10 ** 11, 1) }}",
    "formatted by a method": "{{ '{:>99999999999}'.format('a') }}",
    "formatted by a filter": "{{ '%99999999999s' | format('a') }}",
    "formatted by a value": "{{ '{:>{w}}'.format('a', w=10 ** 11) }}",
    **{
        method: f"{{{{ 'a'.{method}(10 ** 11) }}}}"
        for method in ("center", "ljust", "zfill", "expandtabs")
    },
    **{
        f"{name} as a filter": f"{{{{ 'a' | {name}(10 ** 11) }}}}"
        for name in ("center", "indent", "batch", "slice")
    },
    "indented JSON": "{{ [1] | tojson(indent=10 ** 11) }}",
    "filler": "{{ lipsum(10 ** 9) }}",
    "constant": "{{ -(9 ** 99999999) }}",
}


@pytest.mark.parametrize("name", MISBEHAVING)
def test_a_template_that_misbehaves_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 10_000)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        template(MISBEHAVING[name], tmp_path).render(TEXTS, {})
    assert time.process_time() - start < 5
    assert str(tmp_path / "chat_template.jinja") in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_limits_leave_room_for_long_conversations(tmp_path):
    messages = [TEXTS[i % 2] for i in range(2000)]
    assert len(template(GEMMA, tmp_path).render(messages, in_llama3)) > 60_000


def test_arithmetic_and_short_texts_are_left_alone(tmp_path):
    source = (
        "{{ 3 * 4 }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ 1 + 2 }} {{ 'ab' * 2 }}"
        "{{ 1 ~ none ~ 'x' }} {{ '%3d' % 5 }} {{ [1, 2] }}"
    )
    assert template(source, tmp_path).render(TEXTS, {}) == "12 1024 3 3 abab1Nonex   5 [1, 2]"
    assert (
        template("{{ 'ab' | center(6) | upper }}{{ ['a', 'b'] | join(', ') }}", tmp_path).render(
            TEXTS, {}
        )
        == "  AB  a, b"
    )


def test_a_template_counts_anew_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 4)
    ours = template(CHATML, tmp_path)
    assert ours.render(TEXTS, {}) == ours.render(TEXTS, {})


def test_a_damaged_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UserError, match="chat_template.jinja"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps("x"))
    with pytest.raises(UserError, match="chat_template.json"):
        ChatTemplate.load(tmp_path)
