"""The script behind docs/results: it knows every experiment and benchmark, takes none twice, goes on after a fault."""
# SPDX-License-Identifier: Apache-2.0

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import results  # noqa: E402


def runnable() -> set[str]:
    """Every script that measures something: the experiments, the benchmarks, and what is measured beside them."""
    found = [*ROOT.glob("scripts/experiments/*.py"), *ROOT.glob("scripts/*.py")]
    chores = {"build_docs.py", "build_notebook.py", "update_readme.py", "results.py"}
    return {str(path.relative_to(ROOT)) for path in found if "__main__" in path.read_text() and path.name not in chores}


def test_every_experiment_and_benchmark_has_its_step() -> None:
    named = {word for step in results.STEPS for word in shlex.split(step.command) if word.startswith("scripts/")}
    assert named == runnable()
    assert len({step.name for step in results.STEPS}) == len(results.STEPS)


@pytest.mark.parametrize("step", results.STEPS, ids=lambda step: step.name)
def test_a_step_uses_flags_that_its_script_has(step: Any) -> None:
    words = shlex.split(step.command)
    if words[1] == "-m":
        assert words[1:4] == ["-m", "fedlora_hf", "demo"]
        return
    script = ROOT / words[1]
    helpers = re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.MULTILINE)
    files = [script, *(path for name in helpers if (path := script.with_name(f"{name}.py")).is_file())]
    text = "".join(path.read_text() for path in files)
    for flag in re.findall(r"--(\w+)", step.command):
        # Numbers are often declared in a loop over (name, default).
        assert f'"--{flag}"' in text or f'"{flag}"' in text, f"{words[1]} has no --{flag}"


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
