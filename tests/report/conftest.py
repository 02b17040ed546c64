"""One report of 12 clients, drawn once for all tests of it."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from sample_record import sample_record

from fedlora_hf.report import write_report


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> list[Path]:
    """What `write_report` returned for `sample_record(12, 3, 4, 0)`: the figures, then the page."""
    return write_report(sample_record(12, 3, 4, 0), tmp_path_factory.mktemp("report"))
