"""What a reader of the pages would type: every command, option and script that they hold."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
OURS = ("projected-grpo ", "just ", "python -m projected_grpo")
SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Command:
    """One command: the words of it, and the page that it stands on."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of docs/. The journal and the changelog name what is gone."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    """A page's name from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every block of code, fenced or indented."""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block"):
            yield (token.info.split() or [""])[0], token.content


def inline_code(text: str) -> list[str]:
    """The contents of `code` inside of sentences and tables."""
    inline = [token for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text) if token.children]
    return [child.content for token in inline for child in token.children if child.type == "code_inline"]


def commands_in(page: str, text: str) -> list[Command]:
    """The commands of a page: all of its shell blocks, and in other blocks the lines that begin with ours."""
    found = []
    for language, content in blocks(text):
        for line in content.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if language in SHELLS or line.startswith(OURS):
                found += [Command(page, words) for words in simple_commands(line)]
    return found


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The words of each command of a line, split at && and ;, without comments and settings of variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&;"):
            if words:
                yield tuple(words)
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)


def scripts(text: str) -> dict[str, str]:
    """Python blocks that name their file in a first line `# NAME.py`, by that name."""
    found = {}
    for language, content in blocks(text):
        first = content.partition("\n")[0]
        if language == "python" and re.fullmatch(r"# [\w/]+\.py", first):
            found[first[2:]] = content
    return found
