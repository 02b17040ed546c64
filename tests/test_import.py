"""Importing the package is instant: it loads neither torch nor transformers, and its public names resolve."""
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys

import pytest

import fedlora_hf

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "numpy", "huggingface_hub")


@pytest.mark.parametrize("code", ["import fedlora_hf", "import fedlora_hf.cli; fedlora_hf.cli.build_parser()"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["", "demo", "train", "aggregate", "methods", "report", "push", "ask", "evaluate", "merge"]
)
def test_help_loads_nothing_heavy(command: str) -> None:
    """Which is why it comes in about 0.2 s; a test of the time itself would fail on a busy machine."""
    code = f"""
import sys
from fedlora_hf import cli
try:
    cli.main({[*command.split(), "--help"]!r})
except SystemExit as done:
    assert done.code == 0
print([name for name in {(*HEAVY, "rich", "yaml", "jinja2")!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"usage: fedlora {command}".rstrip())
    assert lines[-1] == "[]"


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "clair"]])
def test_methods_are_listed_without_torch(arguments: list[str]) -> None:
    loaded = f"[name for name in {HEAVY!r} if name in sys.modules]"
    code = f"import sys\nfrom fedlora_hf import cli\ncli.main({arguments!r})\nprint({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("clair: ")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", fedlora_hf.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(fedlora_hf, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(fedlora_hf)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        fedlora_hf.Trainer  # noqa: B018
