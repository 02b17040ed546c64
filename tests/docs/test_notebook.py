"""The notebook runs from a fresh kernel in an empty folder, and what its words promise comes out."""
# SPDX-License-Identifier: Apache-2.0

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]


def shown(notebook: Any) -> str:
    """All text that the code cells printed or gave."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the kernel's libraries
def test_the_notebook_runs_and_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = runpy.run_path(str(ROOT / "scripts" / "build_notebook.py"))["executed"](tmp_path)
    text = shown(notebook)
    assert "flagged:        office-02 office-05 office-06 office-11\n" in text
    before, common, personal = (float(line.split()[-1]) for line in text.splitlines() if "token accuracy" in line)
    assert before < common < personal
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert not list(tmp_path.glob("*.ipynb"))


def test_the_stored_notebook_is_small_and_clean() -> None:
    path = ROOT / "docs" / "notebook.ipynb"
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert str(ROOT) not in path.read_text()
