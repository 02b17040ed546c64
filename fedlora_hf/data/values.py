"""One place turns a value of a record into text: what is missing, what is text, and what is neither."""
# SPDX-License-Identifier: Apache-2.0

import datetime
import decimal
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora_hf.errors import DataError, one_line

Record = Mapping[str, Any]
_PLAIN = (bool, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


def is_missing(value: object) -> bool:
    """None and NaN, which is how tables of numbers write nothing, stand for no value."""
    return value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value))


def as_text(value: object) -> str | None:
    """A text as it is, a number or a date as Python writes it, None for a missing value.

    Raises TypeError for anything else (a list, a dict, bytes): only the caller can say where it was found.
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        return None
    if isinstance(value, _PLAIN) or (type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0):
        return str(value)
    raise TypeError(type(value).__name__)


@dataclass(frozen=True)
class Row:
    """One record and its number (from 1): every complaint about a value names record, column and remedy."""

    record: Record
    number: int
    needs: str = "every record needs one"

    def get(self, column: str) -> str | None:
        """The text of a column; None where it is missing. DataError where it is neither text nor number."""
        return self._text(self.record.get(column), column)

    def text(self, column: str) -> str:
        """The text of a column that must have one."""
        found = self.get(column)
        if found is None:
            raise DataError(f"record {self.number} has no {column!r}: {self.needs}; complete or remove it")
        return found

    def answers(self, column: str, optional: bool = False) -> list[str]:
        """The accepted answers: those of a list, in order, or the one text; an empty list accepts the empty answer.

        optional: a missing column gives no answers at all.
        """
        value = self.record.get(column)
        if optional and is_missing(value):
            return []
        if not isinstance(value, list | tuple):
            return [self.text(column)]
        texts = [text for item in value if (text := self._text(item, column)) is not None]
        if value and not texts:
            raise DataError(f"record {self.number} has no {column!r}: {self.needs}; complete or remove it")
        return texts or ([] if optional else [""])

    def first(self, column: str) -> str | None:
        """As `get`; of a list, its only item or its first (tasks and categories are written so)."""
        value = self.record.get(column)
        return self._text((value[0] if value else None) if isinstance(value, list | tuple) else value, column)

    def _text(self, value: object, column: str) -> str | None:
        try:
            return as_text(value)
        except TypeError as error:
            raise DataError(
                f"record {self.number}, column {column!r}: holds a {error} ({one_line(value, 40)}), where a text or a "
                "number must stand; flatten it into columns of their own, or remove it"
            ) from None
