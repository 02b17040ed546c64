"""Methods from elsewhere: the documented example, module:NAME, entry points, and what is refused."""
# SPDX-License-Identifier: Apache-2.0

import importlib.metadata
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from sample_updates import cohort, dense, relative

from fedlora_hf import aggregate, register_method
from fedlora_hf.errors import ConfigError
from fedlora_hf.methods import METHODS, method_named, own
from fedlora_hf.methods.method import Method

PAGE = Path(__file__).parents[1] / "docs" / "own_method.md"
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_registered", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's example as a module that Python finds; its name."""
    (tmp_path / "half_of_it.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "half_of_it"
    sys.modules.pop("half_of_it", None)


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    assert len(EXAMPLE.strip().splitlines()) <= 15


def test_a_module_s_method_is_used_by_its_name(module: str) -> None:
    clients = cohort(4)
    found = aggregate(clients, f"{module}:METHOD")
    assert relative(2 * dense(found.state), dense(aggregate(clients, "product_mean").state)) < 1e-6


def test_a_registered_method_is_used_by_its_name(module: str) -> None:
    method = method_named(f"{module}:METHOD")
    assert register_method(method) is method
    clients = cohort(4)
    found = aggregate(clients, "half").state
    assert relative(2 * dense(found), dense(aggregate(clients, "product_mean").state)) < 1e-6
    with pytest.raises(ConfigError, match="the name is taken"):
        register_method(replace(method, title="Another"))
    with pytest.raises(ConfigError, match="'fedavg': is one of ours"):
        register_method(replace(method, name="fedavg"))


def test_an_entry_point_is_found_by_its_name(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("halved", f"{module}:METHOD", own.GROUP)
    all_of_them = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(own, "entry_points", lambda **chosen: all_of_them.select(**chosen))
    assert method_named("halved").title == "Half of the mean"
    with pytest.raises(ConfigError, match=r"must be one of .*dare, halved; did you mean 'halved'"):
        method_named("halve")


@pytest.mark.usefixtures("bare_output")
def test_a_run_with_a_method_of_one_s_own(module: str, tmp_path: Path) -> None:
    name = f"{module}:METHOD"
    trainer = models.federation(tmp_path / "run", aggregation=name, num_rounds=2)
    trainer.train()
    assert trainer.run.record.method == "half"
    assert trainer.run.record.options["aggregation"] == name
    assert trainer.run.record.method_info["paper"] == "our own"
    resumed = models.federation(tmp_path / "run", aggregation=name, num_rounds=3, resume_from="last")
    resumed.train()
    assert resumed.run.round == 3


def test_the_command_line_describes_it(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedlora_hf", "methods", f"{module}:METHOD"],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("half: Half of the mean")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:METHOD", "cannot be imported (ModuleNotFoundError"),
        ("half_of_it:NOTHING", "'half_of_it' has no 'NOTHING'"),
        ("half_of_it:half", "is function, must be a fedlora_hf.methods.method.Method"),
        (":METHOD", "'' has no 'METHOD'"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(module: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_named(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (METHODS["fedavg"], "'fedavg': is one of ours"),
        (Method("mine", "", "", "product"), "'mine': has no rule"),
        (Method("mine", "", "", "product", rule=print, options=dict), "options must be a dataclass"),
        (Method("my method", "", "", "product", rule=print), "must be letters, digits"),
        (print, "is builtin_function_or_method"),
    ],
)
def test_what_cannot_be_registered(method: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        register_method(method)
