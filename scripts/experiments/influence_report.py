"""Tables and the figure of `influence.py`, from its csv files alone."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path


def write_report(folder: Path) -> None:
    raise NotImplementedError
