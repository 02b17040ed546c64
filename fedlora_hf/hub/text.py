"""Untrusted text made safe to show: one line, no Markdown or HTML of its own, no access token."""
# SPDX-License-Identifier: Apache-2.0

import re
from collections.abc import Mapping
from typing import Any

from fedlora_hf.errors import one_line

__all__ = ["fenced", "hub_id", "markdown", "one_line"]
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LOCAL_FILE = (".json", ".jsonl", ".csv", ".parquet", ".txt")
# Signs that mean something in the middle of a line; an underscore inside a word does not.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


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


def hub_id(entry: Mapping[str, Any], key: str) -> str | None:
    """entry[key] when it reads as a Hub id; None when it is a path, a file, nothing, or `entry` says "local": true."""
    text = "" if entry.get("local") else str(entry.get(key) or "")
    return text if _HUB_ID.fullmatch(text) and not text.lower().endswith(_LOCAL_FILE) and len(text) < 193 else None
