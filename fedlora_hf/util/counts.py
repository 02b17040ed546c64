"""A number of clients that a user gives as a number or as a share."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.errors import ConfigError, one_line


def suspects_allowed(limit: str | int | float | None, cohort: int) -> int | None:
    """How many clients of a round of `cohort` may be flagged or quarantined; None: any number.

    limit: a whole number of clients, or a share below 1 of the round's, written with a point ("0.25"; rounded down).
    """
    if limit is None:
        return None
    text = str(limit).strip()
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if text.isdecimal():
        return int(text)
    if not 0 <= value < 1:
        raise ConfigError(
            f"max_suspects={one_line(text, 40)}: must be a whole number of clients, 0 or more, or a share of the "
            "round's clients below 1; write 2 or 0.25 for instance"
        )
    return int(value * cohort + 1e-9)
