"""The script behind docs/results: it knows every experiment and benchmark, takes none twice, goes on after a fault."""
# SPDX-License-Identifier: Apache-2.0

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedlora_hf.config import FederatedConfig
from scripts import comparing, results

ROOT = Path(__file__).resolve().parents[2]


def runnable() -> set[str]:
    """Every script that measures something: the experiments, the benchmarks, and what is measured beside them."""
    found = [path for pattern in ("*.py", "*/*.py") for path in (ROOT / "scripts").glob(pattern)]
    chores = {"build_docs.py", "build_notebook.py", "update_readme.py", "results.py", "same_bytes.py", "small_runs.py"}
    return {path for path in found if "__main__" in path.read_text() and path.name not in chores}


def script(step: Any) -> Path | None:
    """The file that a step runs, None for a command of the package."""
    words = shlex.split(step.command)
    name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    return ROOT / name if name.startswith("scripts/") else None


def test_every_experiment_and_benchmark_has_its_step() -> None:
    assert {path for step in results.STEPS if (path := script(step))} == runnable()
    assert len({step.name for step in results.STEPS}) == len(results.STEPS)


@pytest.mark.parametrize("step", results.STEPS, ids=lambda step: step.name)
def test_a_step_uses_flags_that_its_script_has(step: Any) -> None:
    main = script(step)
    if main is None:
        assert shlex.split(step.command)[1:4] == ["-m", "fedlora_hf", "demo"]
        return
    modules = re.findall(r"^from (scripts\.\w+\.\w+) import", main.read_text(), re.MULTILINE)
    files = [main, *(ROOT / f"{module.replace('.', '/')}.py" for module in modules)]
    text = "".join(path.read_text() for path in files)
    for flag in re.findall(r"--(\w+)", step.command):
        # Numbers are often declared in a loop over (name, default).
        own = f'"--{flag}"' in text or f'"{flag}"' in text
        # Those that pass what they do not know on to `fedlora train`.
        passed = "fedlora_hf.flags import parse" in text and flag in FederatedConfig.__dataclass_fields__
        assert own or passed, f"{main.name} has no --{flag}"


def steps(folder: Path) -> tuple[Any, ...]:
    add = "python -c \"import pathlib; pathlib.Path(r'{}').open('a').write('x')\""
    return (
        results.Step("one", add.format(folder / "one"), 1, "results.md"),
        results.Step("bad", 'python -c "raise SystemExit(3)"', 2, "results.md"),
        results.Step("two", add.format(folder / "two"), 1, "results.md"),
        results.Step("needy", "python -c 1", 1, "results.md", ("data",)),
    )


def test_a_listing_runs_nothing(tmp_path: Path, capsys: Any) -> None:
    assert results.main(["--list", "--cache", str(tmp_path / "cache")], steps(tmp_path)) == 0
    assert "3 of 4 steps to do, about 4 minutes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_finished_steps_are_not_taken_again_and_a_failed_one_stops_nobody(tmp_path: Path, capfd: Any) -> None:
    flags = ["--cache", str(tmp_path / "cache")]
    assert results.main(flags, steps(tmp_path)) == 1
    assert "failed: bad" in capfd.readouterr().out
    assert results.main(flags, steps(tmp_path)) == 1
    shown = capfd.readouterr().out
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["x", "x"]
    assert re.search(r"needy .* needs data", shown)
    assert "1 of 4 steps to do" in shown
    (tmp_path / "cache" / "done" / "one").write_text("another command")
    assert results.main([*flags, "--only", "one", "two"], steps(tmp_path)) == 0
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["xx", "x"]


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_comparison_tells_numbers_beyond_the_tolerance_and_no_times(tmp_path: Path) -> None:
    head = "rule,seed,loss,seconds"
    old = table(tmp_path / "old.csv", head, "mean,0,1.00,5.0", "mean,1,2.00,5.0", "median,0,3.00,5.0")
    new = table(tmp_path / "new.csv", head, "mean,0,1.005,9.0", "mean,1,2.50,9.0", "krum,0,4.00,9.0")
    assert list(comparing.differences(old, new, 0.01)) == [
        "rule mean, seed 1: loss is 2.50, was 2.00",
        "rule krum, seed 0: is new",
        "1 of 3 rows were not made again",
    ]
    assert list(comparing.differences(old, old, 0.0)) == []
    other = table(tmp_path / "other.csv", "rule,loss", "mean,1.0")
    assert list(comparing.differences(old, other, 0.01)) == ["columns rule, loss, were rule, seed, loss, seconds"]


def test_a_step_taken_again_elsewhere_leaves_docs_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    kept = table(project / "docs" / "a" / "cells.csv", "rule,loss", "mean,1.0")
    table(project / "scripts" / "one.py", "x = 1")

    def step(copy: Path) -> int:
        assert (copy / "scripts" / "one.py").exists()
        assert list((copy / "docs").rglob("*.csv")) == []
        table(copy / "docs" / "a" / "cells.csv", "rule,loss", "mean,1.1")
        return 0

    assert comparing.compared(project, tmp_path / "copy", step, 0.01) == [
        "docs/a/cells.csv: rule mean: loss is 1.1, was 1.0"
    ]
    assert kept.read_text().endswith("mean,1.0\n")
    assert comparing.compared(project, tmp_path / "again", lambda copy: 3, 0.01) == ["the step failed (3)"]
