"""`fedlora preview` shows what is trained on and what of it is learnt; the run that follows keeps names and wording."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import models
import pytest
from transformers import AutoTokenizer

from fedlora_hf import cli
from fedlora_hf.record.record import RunRecord

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """Three chat files, two of whose names are no folder's."""
    for name in ("東京", "Hôpital d'Été", "north"):
        path = tmp_path / "wards" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        turns = [
            [{"role": "user", "content": f"Who {n}?"}, {"role": "assistant", "content": f"{name[0]} {n}."}]
            for n in range(10)
        ]
        path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return tmp_path / "wards"


def flags(base: Path, data: Path, folder: Path, *more: str) -> list[str]:
    return [f"--model_name_or_path={base}", f"--dataset={data}", f"--output_dir={folder}", "--use_cpu", *more]


def test_it_shows_the_first_examples_of_each_client(
    base: Path, wards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    assert cli.main(["preview", *flags(base, wards, tmp_path, "--examples=1", "--test_fraction=0.2")]) == 0
    shown = capsys.readouterr().out
    assert "== 東京 (7 train, 1 validation, 2 test examples)" in shown
    assert "== Hôpital d'Été" in shown
    assert shown.count("-- 1: ") == 3
    assert "-- 2: " not in shown
    assert "Assistant:\n[[n " in shown
    more = ("--examples=1", f"--chat_template={template}")
    assert cli.main(["preview", *flags(base, wards, tmp_path, *more)]) == 0
    shown = capsys.readouterr().out
    assert "worded by the chat template (chat.jinja)" in shown
    assert "<|assistant|>\n[[n " in shown
    assert ".<eos>\n]]" in shown


def test_it_shows_classes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(20)))
    more = ("--task=sequence_classification", "--partition_by=iid", "--num_clients=2")
    assert cli.main(["preview", *flags(base, data, tmp_path, *more)]) == 0
    shown = capsys.readouterr().out
    assert "classes: a 10, b 10" in shown
    assert "class 'a'" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--examples=0"], "examples=0: must be a whole number of 1 or more"),
        (["--dataset=x"], "--model_name_or_path is missing"),
        (["--model_name_or_path=/nowhere", "--dataset=x"], "model_name_or_path='/nowhere'"),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", "--use_cpu", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert part in lines[-1]
    assert lines[-1].startswith("fedlora: error: ")


def test_a_run_keeps_names_wording_and_tokenizer(base: Path, wards: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    out = tmp_path / "out"
    more = [f"--chat_template={template}", "--num_rounds=1", "--local_steps=1", "--lora_r=2", "--disable_tqdm"]
    more += ["--aggregation=fedavg", "--max_length=64", "--generation_examples=1", "--max_new_tokens=2"]
    assert cli.main(["train", *flags(base, wards, out, *more)]) == 0
    record = RunRecord.load(out)
    assert sorted(record.data["names"].values()) == ["Hôpital d'Été", "東京"]
    assert {*record.data["names"], "north"} == set(record.clients)
    assert record.data["partition_by"] == "client"
    assert record.data["wording"]["chat_template"] == "chat.jinja"
    card, page = (out / "README.md").read_text(), (out / "report" / "index.html").read_text()
    assert "東京" in card
    assert "東京" in page
    assert "apply_chat_template" in card
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
