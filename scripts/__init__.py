"""What is run beside the package, from the project's folder: python -m scripts.<room>.<name>, see --help of each.

benchmarks/ take time and memory, experiments/ what the methods do, checks/ disturb runs and deployments. At the top are
the two commands of a newcomer, the small base model, and what renews the documentation.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH for a process that must find this project first: with it, a script starts itself by its name."""
    return os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
