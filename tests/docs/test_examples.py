"""The examples of the pages for people run: their files, YAML and Python as they stand there, on a tiny model."""
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import tiny_llama, tiny_tokenizer
from sample_data import dolly_records

from fedlora_hf.cli import main
from fedlora_hf.data.several import parts_of
from fedlora_hf.flags import parse
from fedlora_hf.record.record import RunRecord

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^<!-- runs: (\w+) -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    """{name: text} of the blocks of a page that are marked to be run."""
    return {name: text for name, _, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))}


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "example", "exec"), names)
    return names


def test_every_marked_block_is_found_and_every_python_block_parses() -> None:
    found = {page: sorted(blocks(page)) for page in ("tutorial.md", "from_trl.md")}
    assert found == {"tutorial.md": ["files", "record", "yaml"], "from_trl.md": ["trainer"]}
    for page in sorted(DOCS.glob("*.md")):
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            compile(code, page.name, "exec")


def test_the_tutorial_runs_from_its_files_to_the_record(
    tmp_path: Path, base_model: Path, bare_output: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    text = blocks("tutorial.md")
    run(text["files"])
    options = yaml.safe_load(text["yaml"])
    options |= {"model_name_or_path": str(base_model), "local_steps": 1, "num_rounds": 1, "use_cpu": True}
    Path("run.yaml").write_text(yaml.safe_dump(options))
    main(["preview", "--config", "run.yaml", "--examples", "1"])
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("== ")] == ["north", "south", "west"]
    assert "[[" in shown
    main(["train", "--config", "run.yaml"])
    record: RunRecord = run(text["record"])["record"]
    assert sorted(record.clients) == ["north", "south", "west"]
    assert Path("out/clients/south/adapter_model.safetensors").is_file()


def test_the_yaml_of_the_tutorial_is_a_run_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(blocks("tutorial.md")["files"])
    Path("run.yaml").write_text(blocks("tutorial.md")["yaml"])
    args = parse(["--config", "run.yaml"])
    assert [part.name for part in parts_of(args.dataset)] == ["north", "south", "west"]
    assert (args.num_rounds, args.local_steps, args.learning_rate) == (3, 20, 1e-3)


@pytest.mark.usefixtures("bare_output")
def test_the_script_of_the_page_for_trl_users_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    rows = [{"prompt": r["instruction"], "completion": r["response"]} for r in dolly_records(36)]
    parts = {f"dataset_of_{n}": datasets.Dataset.from_list(rows[i::3]) for i, n in enumerate(("ada", "bob", "cleo"))}
    names = run(blocks("from_trl.md")["trainer"], model=model, tokenizer=tokenizer, **parts)
    assert len(names["trainer"].run.record.rounds) == 2
    assert Path("out/adapter_model.safetensors").is_file()


COMMAND = re.compile(r"^(?:fedlora train|.*-m fedlora_hf train) ((?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)


@pytest.mark.parametrize("page", ["recipes.md", "tutorial.md"])
def test_every_flag_of_the_recipes_is_one(page: str, capsys: Any) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    flags = {flag for command in COMMAND.findall(text) for flag in re.findall(r"--(\w+)", command)}
    assert flags
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help_all"])
    assert stopped.value.code in (0, None)
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert sorted(flags - known) == []
