"""Chat templates: the form of content they read, and their rendering."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from gateway.errors import RequestError
from gateway.tokens.bodies import Chat, Message
from gateway.tokens.template import reads_parts, render
from tests.support.vllm_engine import tiny_model

LOOP = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


def macro(signature: str, loops_over: str, call: str) -> str:
    return (
        f"{{% macro show({signature}) %}}{{% for c in {loops_over} %}}{{% endfor %}}{{% endmacro %}}"
        f"{{% for m in messages %}}{{{{ show({call}) }}}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        LOOP.replace("m.content", "m['content']"),
        LOOP.replace("m.content", "m.content[1:] | list"),
        LOOP.replace("in messages", "in messages[1:]"),
        "{% set rest = messages[1:] %}{% set chat = rest %}" + LOOP.replace("in messages", "in chat"),
        "{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% generation %}{% for c in m.content %}{% break %}{% endfor %}"
        "{% endgeneration %}{% endfor %}",
        macro("content", "content", "m.content"),
        macro("role, parts", "parts", "m.role, m['content']"),
        macro("role, parts", "parts", "parts=m.content, role=1"),
    ],
)
def test_templates_that_loop_over_content_get_parts(template):
    assert reads_parts(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        LOOP.replace("m.content", "m.tool_calls"),
        LOOP.replace("in messages", "in others"),
        "{% for m in messages %}{% set parts = m.content %}{% for c in parts %}{% endfor %}{% endfor %}",
        macro("content", "content", "m.name"),
        # Not followed by the engine either, which then gives up.
        "{% set ns.chat = messages %}" + LOOP,
        "{% for m, n in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{{ broken",
    ],
)
def test_other_templates_get_text(template):
    assert not reads_parts(template)


def test_the_tokenizers_own_template_is_the_default(tokenizer):
    chat = Chat([Message("user", "hello")], template_kwargs={"add_generation_prompt": True})
    text, num_known_chars = render(tokenizer, chat, None)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert num_known_chars is None


def test_the_last_message_can_be_continued(tokenizer):
    chat = Chat([Message("user", "hello")], template_kwargs={"continue_final_message": True})
    assert render(tokenizer, chat, None)[0] == "<|im_start|>user\nhello"


def test_options_that_are_not_the_templates_do_nothing(tokenizer):
    kwargs = {"tokenize": True, "chat_template": "x", "return_assistant_tokens_mask": True, "name": "ann"}
    chat = Chat([Message("user", "hello")], template_kwargs=kwargs)
    assert render(tokenizer, chat, "{{ name }}")[0] == "ann"


def test_the_developer_role_is_kept_where_it_is_known(tokenizer):
    chat = Chat([Message("developer", "a")])
    roles = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert render(tokenizer, chat, roles)[0] == "system"
    assert render(tokenizer, chat, roles + "{# 'developer' #}")[0] == "developer"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('alternate') }}",
        "{{ 1 / 0 }}",
        "{{ broken",
        "{{ messages[9].role }}",
        "{{ none() }}",
    ],
)
def test_a_template_that_fails_is_a_bad_request(tokenizer, template):
    with pytest.raises(RequestError) as refused:
        render(tokenizer, Chat([Message("user", "a")]), template)
    assert refused.value.status == 400
    assert "chat template" in refused.value.message


def test_a_missing_template_says_what_to_do(tokenizer):
    bare = AutoTokenizer.from_pretrained(tiny_model())
    bare.chat_template = None
    with pytest.raises(RequestError, match=r"no chat template: .*--chat-template FILE"):
        render(bare, Chat([Message("user", "a")]), None)


@pytest.mark.parametrize(
    ("template", "known"),
    [
        # Where the template places it, ...
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text or '<img>' }}{% endfor %}{% endfor %}",
            "look: ",
        ),
        # ... or before the message's text, where engines put it for templates that take text.
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "[user]"),
    ],
)
def test_the_text_before_an_image_is_known(tokenizer, template, known):
    parts = [{"type": "text", "text": "look: "}, {"type": "image_url", "image_url": {"url": "u"}}, "0 or 1?"]
    text, num_known_chars = render(tokenizer, Chat([Message("user", parts)]), template)
    assert text[:num_known_chars] == known
