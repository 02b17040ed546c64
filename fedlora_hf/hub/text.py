"""Untrusted text made safe to show: one line, no Markdown or HTML of its own, no access token."""
# SPDX-License-Identifier: Apache-2.0

import re
import unicodedata

# Signs that mean something in the middle of a line; an underscore inside a word does not.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


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
