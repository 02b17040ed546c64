"""A few answers before and after, for the report in the output folder alone: clients' own examples are never pushed."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora_hf.errors import RecordError, one_line
from fedlora_hf.util.disk import read_json, write_atomically

FILE_NAME = "answers.json"
_MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Answered:
    """One test question of a client. expected: the answers that its example has; before, shared, own: those of the
    adapter the run began with, of the global one and of the client's personal one ("" where it has none)."""

    client: str
    question: str
    expected: tuple[str, ...]
    before: str
    shared: str
    own: str = ""


def save_answers(folder: str | os.PathLike[str], answers: Iterable[Answered]) -> None:
    """Write OUT/answers.json; without answers, an earlier run's are removed."""
    path, content = Path(folder) / FILE_NAME, [asdict(answer) for answer in answers]
    if content:
        write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    else:
        path.unlink(missing_ok=True)


def load_answers(folder: str | os.PathLike[str]) -> list[Answered]:
    """What lies in OUT/answers.json, [] where there is none; RecordError for a file that is something else."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return []
    try:
        content = read_json(path, _MAX_BYTES)
        if not isinstance(content, list):
            raise TypeError("it is no list")
        found = [Answered(**{**item, "expected": tuple(item["expected"])}) for item in content]
        if not all(isinstance(text, str) for answer in found for text in _texts(answer)):
            raise TypeError("an answer is no text")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordError(
            f"{path}: is not what a run writes there ({one_line(error, 80)}); delete it, or restore it"
        ) from None
    return found


def _texts(answer: Answered) -> list[object]:
    return [answer.client, answer.question, *answer.expected, answer.before, answer.shared, answer.own]
