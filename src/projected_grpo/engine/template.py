"""A model's chat template: the prompt that it writes, and the token that it ends an answer with.

Training needs a prompt that holds the system's and the user's text, is the same on every day, and ends where
the answer begins. So a system message that a template does not take goes before the user's text; the head of
an answer is added where a template leaves it out; a thought that it opens is closed; its clock stands still.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from string import ascii_letters
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from projected_grpo.errors import UserError

Messages = Sequence[Mapping[str, str]]
PROBE: Messages = (
    {"role": "system", "content": "Write Python."},
    {"role": "user", "content": "Add two numbers."},
)
ANSWER = "The sum of both."
OPEN_THOUGHT = re.compile(r"<([\w:]*(?:think|thought|reason)\w*)>(?!.*</\1>)", re.DOTALL | re.IGNORECASE)
DATE = datetime(2024, 7, 26)  # of every prompt: what Llama's templates write where there is no clock
CODES = {f"%{pad}{code}": DATE.strftime(f"%{pad}{code}") for pad in ("-", "") for code in ascii_letters}
# transformers gives templates its own `strftime_now`, and takes no other from outside.
CLOCK = """{%- macro strftime_now(format) -%}
{%- set written = namespace(text=format) -%}
{%- for code, value in codes_of_strftime.items() -%}
{%- set written.text = written.text | replace(code, value) -%}
{%- endfor -%}
{{- written.text -}}
{%- endmacro %}
"""


class Prompt(NamedTuple):
    """What a template writes of a chat, and what is added up to where the answer begins."""

    written: str
    head: str  # of an answer, where the template ignores that one is asked for
    closing: str  # of a thought that it opens
    folded: bool  # whether the system's text went before the user's

    @property
    def text(self) -> str:
        return self.written + self.head + self.closing


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The prompt as text, special tokens included, up to where the answer begins; thinking is off.

    Raises UserError for a template that fails.
    """
    return prompt(tokenizer, messages).text


def prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Prompt:
    """A chat as the template writes it, and what is added to it."""
    chat = accepted(tokenizer, messages)
    written = _write(tokenizer, chat, asks=True)
    head = ""
    if written == _write(tokenizer, chat, asks=False):
        before = _around_answer(tokenizer, chat)[0]
        head = before.removeprefix(written) if before.startswith(written) else ""
        head = head if head.strip() else ""
    opened = OPEN_THOUGHT.search((written + head).rpartition(chat[-1]["content"].strip())[2])
    closing = f"\n</{opened[1]}>\n\n" if opened else ""
    return Prompt(written, head, closing, chat is not messages)


def accepted(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """The messages, or with the system's text before the user's where the template refuses or drops it.

    A template that writes the user's text alone, as nano's does, is no chat's and means to.
    """
    system, *rest = messages
    if system["role"] != "system" or not rest:
        return messages
    try:
        written = _write(tokenizer, messages, asks=True)
        if system["content"].strip() in written or written.strip() == rest[-1]["content"].strip():
            return messages
    except UserError:
        pass  # if it fails without a system message, too, the caller learns why
    user, *others = rest
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template writes behind an answer; None if there is none."""
    if tokenizer.chat_template is None:
        return None
    try:
        after = _around_answer(tokenizer, accepted(tokenizer, PROBE))[1]
    except UserError:  # a template for prompts alone
        return None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special), None)


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that prompts have, if the template asks for one."""
    return DATE.date().isoformat() if "strftime_now" in tokenizer.get_chat_template() else None


def check_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is done otherwise than the template has it, a line each.

    Raises UserError for one that is missing, fails, or does not write what it is given.
    """
    if tokenizer.chat_template is None:
        raise UserError("its tokenizer has no chat template; use a chat model")
    found, date = prompt(tokenizer, PROBE), template_date(tokenizer)
    if PROBE[-1]["content"] not in found.written:
        raise UserError(
            "its chat template leaves the user's text out of the prompt; use a model that takes text"
        )
    changes = {
        "takes no system message: that text goes before the user's": found.folded,
        f"ignores add_generation_prompt: {found.head!r} is added, as it stands before an answer": found.head,
        f"opens a thought: {found.closing!r} is added, which closes it": found.closing,
        f"writes the date: it is {date} in every prompt": date,
    }
    return [f"its chat template {change}" for change, made in changes.items() if made]


def _around_answer(tokenizer: PreTrainedTokenizerBase, chat: Messages) -> tuple[str, str]:
    """What the template writes before an answer to this chat, and behind it."""
    whole = _write(tokenizer, [*chat, {"role": "assistant", "content": ANSWER}], asks=False)
    before, found, after = whole.rpartition(ANSWER)
    return (before, after) if found else ("", "")


def _write(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, asks: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        clock: dict[str, Any] = {}
        if "strftime_now" in template:
            template, clock = CLOCK + template, {"codes_of_strftime": CODES}
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=asks,
                tokenize=False,
                enable_thinking=False,
                **clock,
            )
        )
    except Exception as error:  # a template is a program, which may raise anything
        why = first_line(error)
        raise UserError(f"its chat template fails ({why}); mend it, or use another model") from error


def first_line(error: Exception) -> str:
    """An error's first line, cut."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
