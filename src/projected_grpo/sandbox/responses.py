"""What a response says: its text, also where chat messages hold it, and the code in that text.

Training pays for the fence that the prompt asks for (`extract_code`); other people's completions are read as
they come (`readings`). docs/grader.md lists the shapes, and which block counts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FENCE = re.compile(
    r"(?<!`)(`{3,})(?!`)([^`]*)$|^[ \t]*(~{3,})(.*)$"
)  # of one line; tried once per run: linear
PYTHON = re.compile(r"[{.\s]*(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)  # not pycon, python-repl
SOLUTION = re.compile(r"^class Solution\b", re.MULTILINE)
LIST_ITEM = re.compile(
    r"[ \t]*(?:[-*+]|\d{1,9}[.)])?[ \t]*"
)  # what may stand before a fence that is indented
END_OF_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")
END_OF_TURN = re.compile(r"(?:(?:<[|｜][^<>|｜]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)\s*)+\Z")
LAST = 4096  # characters at the end of a text in which tokens that end a turn are looked for


def extract_code(text: str) -> str | None:
    """The Python code of a response, or None without a ```python (```py) block.

    With several blocks the last that defines class Solution counts (a later block is often only a usage
    example, an earlier one a draft), else the first. A block cut off by the length limit runs to the end.
    """
    blocks: list[str] = []
    lines: list[str] | None = None
    for line in text.split("\n"):
        fence = re.match(r" {0,3}```[ \t]*(.*?)\s*$", line)
        if lines is None:
            if fence and fence.group(1).lower() in ("python", "py", "python3"):
                lines = []
        elif fence and not fence.group(1):
            blocks.append("\n".join(lines))
            lines = None
        else:
            lines.append(line)
    if lines is not None:
        blocks.append("\n".join(lines))
    solutions = [block for block in blocks if SOLUTION.search(block)]
    return solutions[-1] if solutions else blocks[0] if blocks else None


@dataclass(frozen=True)
class Fence:
    """The line that opens a block: its run of backticks or tildes, its columns of indent, its first word."""

    run: str
    indent: int
    language: str  # "python" for each of Python's names; empty where there is none

    def ends(self, line: str) -> bool:
        """Whether a line closes the block by Markdown's rule: a run as long or longer, alone on its line."""
        bare = line.strip()
        alone = len(bare) >= len(self.run) and not bare.strip(self.run[0])
        return alone and len(line) - len(line.lstrip()) <= self.indent + 3


@dataclass(frozen=True)
class Block:
    """The language of a fenced block, and its lines without the fence's own indent."""

    language: str
    code: str


def opening(line: str) -> Fence | None:
    """The fence that a line opens; behind other text only one of Python or of no language."""
    found = FENCE.search(line) if "```" in line or "~~~" in line else None
    if found is None:
        return None
    run, info = found[1] or found[3], (found[2] if found[1] else found[4]).strip()
    language = "python" if PYTHON.match(info) else info.split()[0] if info else ""
    before = line[: found.start()]
    if "```" in before or (before.strip() and language not in ("python", "")):
        return None
    return Fence(run, len(before) if LIST_ITEM.fullmatch(before) else 0, language)


def blocks(text: str, *, anywhere: bool) -> list[Block]:
    """The fenced blocks of a text, in order; the last may lack its closing fence.

    A fence alone on its line closes a block; `anywhere`, the first one does wherever it stands. Python's
    opening fence begins a block in those of other languages, and `anywhere` in its own.
    """
    found: list[Block] = []
    fence: Fence | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        opened = opening(line)
        if fence is None:
            fence, lines = opened, []
            continue
        python = opened is not None and opened.language == "python"
        begins = python and (anywhere or fence.language != "python")
        cut = line.find(fence.run) if anywhere else -1
        if cut < 0 and not begins and not fence.ends(line):
            lines.append(line)
            continue
        if line[: max(cut, 0)].strip():
            lines.append(line[:cut])
        found.append(Block(fence.language, unindented(lines, fence)))
        fence, lines = opened if begins else None, []
    return found if fence is None else [*found, Block(fence.language, unindented(lines, fence))]


def unindented(lines: Sequence[str], fence: Fence) -> str:
    """The lines joined; behind a fence that is indented, less the indent of the first that holds code."""
    first = next((line for line in lines if line.strip()[:1] not in ("", "#")), "")
    width = len(first) - len(first.lstrip(" \t")) if fence.indent else 0
    code = "\n".join(lines)
    return re.sub(rf"^[ \t]{{1,{width}}}", "", code, flags=re.MULTILINE) if width else code


def chosen(found: Sequence[Block]) -> str | None:
    """The last block that defines class Solution, of Python or of no language; else the first of Python's."""
    solutions = [b.code for b in found if b.language in ("python", "") and SOLUTION.search(b.code)]
    python = [b.code for b in found if b.language == "python"]
    return solutions[-1] if solutions else python[0] if python else None


def readings(text: str) -> tuple[str, ...]:
    """The code of a response by Markdown's rule; and what the first closing fence anywhere makes of it.

    The second is there if it differs and defines class Solution, and counts if the first does not compile.
    Of a text that thinks first, what follows its thoughts is read if there is code in it. Empty without code.
    """
    text = text[:-LAST] + END_OF_TURN.sub("", text[-LAST:])
    *_, answer = END_OF_THOUGHT.split(text)
    for part in dict.fromkeys((answer, text)):
        code, other = (chosen(blocks(part, anywhere=anywhere)) for anywhere in (False, True))
        if code is not None:
            also = other is not None and other != code and SOLUTION.search(other)
            return (code, str(other)) if also else (code,)
    return ()


def unread(text: str) -> str:
    """What a response without code holds in its place."""
    languages = {block.language for block in blocks(text, anywhere=True)}
    if "" in languages:
        return "a fence without a language, and no class Solution in it"
    if languages:
        return f"a fence of {', '.join(sorted(languages))[:80]}"
    return "class Solution without a fence" if SOLUTION.search(text) else "no fence"


def completion_text(value: object) -> str | None:
    """The text of a completion: a string, or chat messages, of which the last by the assistant counts.

    A message's content is a string, or parts of which those of text count. None if it is neither.
    """
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    own = [m.get("content") for m in messages if m.get("role") in ("assistant", "model", None)]
    content = own[-1] if own else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts if spoken(part)]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if strings and len(strings) == len(texts) else None


def spoken(part: object) -> bool:
    """Whether a part of a message is what it says, and not a thought, a picture or the call of a tool."""
    return not isinstance(part, dict) or part.get("type") in ("text", "output_text", None)
