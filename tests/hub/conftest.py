"""A Hub of the tests' own, and real clients run against it in processes of their own (they read HF_ENDPOINT once)."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub, token_of

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def hub():
    """A Hub of the test module: faults that it still has in store hurt no other."""
    server = LocalHub()
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_steps(tmp_path_factory):
    """run_steps(server, "push"): what tests/hub/steps/push.py printed, as JSON; it ran with a home of its own."""

    def run(server, name, **variables):
        home = tmp_path_factory.mktemp(f"home-{name}")
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token_of("alice"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), str(HERE / "steps")]),
            **variables,
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "steps" / f"{name}.py"), str(home)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert token_of("alice") not in done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
