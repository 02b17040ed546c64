"""Access tokens kept out of whatever is written or shown."""
# SPDX-License-Identifier: Apache-2.0

import re
from collections.abc import Iterable

# Hub tokens, and the value of any command-line option whose name says that it is secret.
TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{20,}")
_SECRET_OPTION = re.compile(r"--?[\w.-]*(?:token(?!iz)|secret|password|api[_-]?key)[\w-]*", re.IGNORECASE)
# max_new_tokens and its like are numbers of tokens, not secrets.
_NOT_SECRET = re.compile(r"\d+|true|false|none", re.IGNORECASE)
HIDDEN = "***"


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
