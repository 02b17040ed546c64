"""Answers before and after, for the report: whose, of whom, where they lie, and that no push takes them along."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import pytest
import sample_data
import torch

from fedlora_hf import cli
from fedlora_hf.errors import RecordError
from fedlora_hf.hub.plan import make_plan
from fedlora_hf.record.answers import FILE_NAME, Answered, load_answers, save_answers
from fedlora_hf.record.record import RunRecord
from fedlora_hf.report import write_report
from fedlora_hf.rounds.answers import chosen
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.loaded import load

pytestmark = pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")


def train(folder: Path, base: Path, data: Path, **changes: Any) -> int:
    flags = {"model_name_or_path": base, "dataset": data, "partition_by": "category", "aggregation": "fedavg"}
    flags |= {"num_rounds": 1, "local_steps": 2, "lora_r": 2, "learning_rate": 0.1, "max_length": 250}
    flags |= {"max_new_tokens": 8, "output_dir": folder, **changes}
    return cli.main(["train", *(f"--{name}={value}" for name, value in flags.items()), "--use_cpu", "--disable_tqdm"])


def test_everybodys_first_question_comes_before_anybodys_second() -> None:
    assert chosen({"bob": 2, "ada": 3, "eve": 0}, 4) == [("ada", 0), ("bob", 0), ("ada", 1), ("bob", 1)]
    assert chosen({"ada": 1}, 4) == [("ada", 0)]
    assert chosen({}, 4) == []


@pytest.mark.usefixtures("bare_output")
def test_the_answers_are_those_of_the_adapters(tmp_path: Path, base_model: Path) -> None:
    data, out = sample_data.write_dolly(tmp_path / "dolly.jsonl", 60), tmp_path / "out"
    assert train(out, base_model, data, report_answers=3) == 0
    found = load_answers(out)
    assert len(found) == 3
    assert len({answer.client for answer in found}) == 3
    run = Finished.read(out)
    loaded = load(run, use_cpu=True)
    for answer in found:
        assert answer.question.startswith("Instruction:")
        assert all(answer.expected)
        ids = torch.tensor([loaded.tokenizer(answer.question + "\n")["input_ids"]])
        for adapter, said in zip(
            run.adapters([answer.client], everything=True), (answer.before, answer.shared, answer.own), strict=True
        ):
            with loaded.using(adapter) as model:
                new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            assert loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == said
    assert train(out, base_model, data) == 0
    assert not (out / FILE_NAME).exists()


def test_the_page_shows_them_and_a_push_leaves_them_out(tmp_path: Path, base_model: Path) -> None:
    data, out = sample_data.write_dolly(tmp_path / "dolly.jsonl", 60), tmp_path / "out"
    assert train(out, base_model, data, report_answers=2) == 0
    page = (out / "report" / "index.html").read_text()
    secret = load_answers(out)[0].question.splitlines()[1]
    assert secret in page
    plan = make_plan(out, RunRecord.load(out), "user/name", with_clients=True, with_client_facts=True)
    sent = {name: what if isinstance(what, bytes) else what.read_bytes() for name, what in plan.items()}
    assert "report/index.html" in sent
    assert FILE_NAME not in sent
    texts = b"".join(content for name, content in sent.items() if not name.endswith(".png"))
    assert secret.encode() not in texts
    assert b'<section id="origin">' in sent["report/index.html"]


def test_what_is_said_is_text_and_cannot_end_its_part_of_the_page(tmp_path: Path, small_record: RunRecord) -> None:
    mark = "<!-- answers: end --><script>"
    save_answers(tmp_path, [Answered("ada", mark, (mark,), mark, mark)])
    write_report(small_record, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<!-- answers: end -->") == 1
    assert "<script>" not in page


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"client": "a"}]', "no JSON"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(RecordError, match="is not what a run writes there"):
        load_answers(tmp_path)


@pytest.fixture
def small_record() -> RunRecord:
    from sample_record import sample_record

    return sample_record(3, 1, 0, 0)
