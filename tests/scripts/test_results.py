"""The script behind docs/results: it knows every experiment and benchmark, takes none twice, goes on after a fault."""
# SPDX-License-Identifier: Apache-2.0

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from scripts import results

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
        assert f'"--{flag}"' in text or f'"{flag}"' in text, f"{main.name} has no --{flag}"


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
