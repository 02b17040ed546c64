"""Untrusted text made safe to show: one line, no Markdown or HTML of its own, no access token."""
# SPDX-License-Identifier: Apache-2.0

import re
import unicodedata
from collections.abc import Iterable

# Hub tokens, and the value of any command-line option whose name says that it is secret.
TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_SECRET_OPTION = re.compile(r"--?[\w.-]*(?:token(?!iz)|secret|password|api[_-]?key)[\w-]*", re.IGNORECASE)
# max_new_tokens and its like are numbers of tokens, not secrets.
_NOT_SECRET = re.compile(r"\d+|true|false|none", re.IGNORECASE)
# Signs that mean something in the middle of a line; an underscore inside a word does not.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
HIDDEN = "***"


def one_line(value: object, limit: int = 300) -> str:
    """`value` as one line of printable text, at most `limit` characters (an ellipsis says that it was cut)."""
    # Control, format (bidirectional overrides among them) and line-separator characters become spaces.
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(value))
    text = " ".join(kept.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def markdown(value: object, limit: int = 300) -> str:
    """`value` as inert text inside a Markdown paragraph or table cell: no link, image, HTML or column.

    To be placed after other text, never at the start of a line, where more signs have a meaning.
    """
    text = _MARKDOWN.sub(r"\\\1", one_line(value, limit).translate(_HTML))
    # A bare address would be made a link by the renderer.
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", text)


def fenced(text: str, language: str = "") -> str:
    """`text` as a fenced code block, the fence longer than any run of backticks inside."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}{language}\n{text}\n{fence}"


def without_tokens(text: str) -> str:
    """`text` with everything that looks like a Hub access token replaced."""
    return TOKEN.sub(HIDDEN, text)


def redacted(command: Iterable[object]) -> list[str]:
    """A command line with tokens, and the values of options such as --hub_token, replaced by ***."""
    shown: list[str] = []
    hide_next = False
    for argument in map(str, command):
        name, equals, value = argument.partition("=")
        secret = _SECRET_OPTION.fullmatch(name) is not None
        if hide_next and not argument.startswith("-") and not _NOT_SECRET.fullmatch(argument):
            argument = HIDDEN
        elif secret and equals and not _NOT_SECRET.fullmatch(value):
            argument = f"{name}={HIDDEN}"
        hide_next = secret and not equals
        shown.append(without_tokens(argument))
    return shown
