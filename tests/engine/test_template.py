"""Chat templates of every kind: the prompt that comes of each, what ends an answer, the refusals."""

import copy
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from projected_grpo.engine import template
from projected_grpo.engine.template import PROBE, check_template, render_chat, template_date, turn_end
from projected_grpo.errors import UserError

LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
HEAD = "<|im_start|>assistant\n"
END = "{% if add_generation_prompt %}" + HEAD + "{% endif %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
CHATML = "<|im_start|>system\nWrite Python.<|im_end|>\n<|im_start|>user\nAdd two numbers.<|im_end|>\n"
BARE = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}\n{% endfor %}"  # nano's
FOLDED = "<|im_start|>user\nWrite Python.\n\nAdd two numbers.<|im_end|>\n"


@pytest.fixture
def speaking(tiny):
    def with_template(text):
        tokenizer = copy.copy(tiny[1])
        tokenizer.chat_template = text
        return tokenizer

    return with_template


@pytest.mark.parametrize(
    ("text", "prompt", "said"),
    [
        (LOOP + END, CHATML + HEAD, None),
        (NO_SYSTEM + LOOP + END, FOLDED + HEAD, "no system message"),
        (
            LOOP.replace("in messages", "in messages if m['role'] != 'system'") + END,
            FOLDED + HEAD,
            "no system",
        ),
        (ALTERNATE, "[INST] Write Python.\n\nAdd two numbers. [/INST]", "no system message"),
        (LOOP, CHATML + HEAD, "ignores add_generation_prompt"),
        (NO_SYSTEM + LOOP, FOLDED + HEAD, "ignores add_generation_prompt"),
        (LOOP + HEAD, CHATML + HEAD.strip(), None),  # asks always; Jinja drops the last line's end
        (
            LOOP + END.replace(HEAD, HEAD + "<think>\n"),
            CHATML + HEAD + "<think>\n\n</think>\n\n",
            "a thought",
        ),
        (
            LOOP + END.replace(HEAD, HEAD + "<thought>"),
            CHATML + HEAD + "<thought>\n</thought>\n\n",
            "a thought",
        ),
        (LOOP + END.replace(HEAD, HEAD + "<think></think>"), CHATML + HEAD + "<think></think>", None),
        (BARE, "Add two numbers.\n", None),
        ({"default": LOOP + END, "rag": "{{ nothing.at.all }}"}, CHATML + HEAD, None),
    ],
)
def test_a_prompt_holds_both_texts_and_ends_where_the_answer_begins(speaking, text, prompt, said):
    tokenizer = speaking(text)
    assert render_chat(tokenizer, PROBE) == prompt
    changes = check_template(tokenizer)
    assert said is None and not changes or any(said in change for change in changes)


def test_a_user_who_writes_of_thoughts_opens_none(speaking):
    user = {"role": "user", "content": "Print <think>."}
    assert render_chat(speaking(LOOP + END), [PROBE[0], user]).endswith("Print <think>.<|im_end|>\n" + HEAD)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['role'] ", "unexpected end of template"),
        (LOOP + "{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "can only concatenate"),
        ({"rag": LOOP, "tools": LOOP}, "multiple chat templates"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "leaves the user's text out"),
        ("Hello." + END, "leaves the user's text out"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_in_one_line(speaking, text, says):
    with pytest.raises(UserError, match=says) as caught:
        check_template(speaking(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n",
        "{% if strftime_now is defined %}{% set f = '%B %-d, %y' %}{% set day = 'On ' + strftime_now(f) %}"
        "{% endif %}\n  {{ day }}",
        "{% macro day() %}{{ strftime_now(format='%A %j') }}{% endmacro %}{{ day() }}",
        "\n{{ strftime_now('now') }}",
    ],
)
def test_the_clock_of_a_template_stands_still(speaking, monkeypatch, text):
    """As transformers itself writes the prompt on that day."""
    tokenizer = speaking(text + LOOP + END)
    found = render_chat(tokenizer, PROBE)
    assert template_date(tokenizer) == "2024-07-26" and any(
        "2024-07-26" in c for c in check_template(tokenizer)
    )

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return template.DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    chat = [dict(message) for message in PROBE]
    assert found == tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def test_a_date_that_a_template_writes_without_a_clock_is_left_as_it_is(speaking):
    tokenizer = speaking("{{ date_string | default('1 May 2020') }}" + LOOP + END)
    assert render_chat(tokenizer, PROBE).startswith("1 May 2020") and template_date(tokenizer) is None


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (LOOP + END, "<|im_end|>"),
        (NO_SYSTEM + LOOP.replace("<|im_end|>", " <|endoftext|>") + END, "<|endoftext|>"),
        (LOOP.replace("<|im_end|>", "</turn>"), None),
        ("{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + LOOP, None),
        (None, None),
    ],
)
def test_the_end_of_an_answer_is_the_templates_own(speaking, tiny, text, end):
    tokenizer = speaking(text)
    assert turn_end(tokenizer) == (None if end is None else tiny[1].convert_tokens_to_ids(end))
