"""The command line: 2 and one line on standard error for whatever a user can mend, never a traceback."""
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
from transformers import TrainingArguments

import fedlora_hf
from fedlora_hf import FederatedConfig, cli, options
from fedlora_hf.commands import manual, train
from fedlora_hf.methods import METHODS

pytestmark = pytest.mark.usefixtures("bare_output")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused command leaves on standard error."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fedlora: error: ")
    return lines[0].removeprefix("fedlora: error: ")


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    return sample_data.write_dolly(tmp_path / "dolly.jsonl", 40)


def train_flags(base: Path, dataset: Path | str, folder: Path, **changes: Any) -> list[str]:
    flags = {
        "model_name_or_path": base,
        "dataset": dataset,
        "output_dir": folder / "run",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return ["train", *(f"--{name}={value}" for name, value in flags.items())]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_file(capsys: Any, tmp_path: Path, base_model: Path) -> None:
    for name in ("nowhere.jsonl", "no/such/folder/at/all"):
        line = refused(capsys, *train_flags(base_model, tmp_path / name, tmp_path))
        assert name in line
        assert "check" in line


def test_wrong_columns(capsys: Any, tmp_path: Path, base_model: Path) -> None:
    data = write_rows(tmp_path / "odd.jsonl", [{"title": "a", "body": "b"}] * 3)
    line = refused(capsys, *train_flags(base_model, data, tmp_path))
    assert line.startswith("columns body, title: not a recognised set")
    assert "rename the columns" in line


def test_a_damaged_file_names_the_line(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    dolly.write_text(dolly.read_text() + "{not json\n")
    assert "line 41" in refused(capsys, *train_flags(base_model, dolly, tmp_path))


def test_an_empty_client(capsys: Any, tmp_path: Path, base_model: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c", "hospital": "small" if n == 0 else "large"} for n in range(9)]
    data = write_rows(tmp_path / "few.jsonl", rows)
    flags = train_flags(base_model, data, tmp_path, partition_by="client", client_column="hospital")
    line = refused(capsys, *flags)
    assert line.startswith("client 'small': has 1 different examples")
    assert "give it more, merge it with another" in line
    line = refused(capsys, *train_flags(base_model, data, tmp_path, partition_by="iid", num_clients=50))
    assert line.startswith("num_clients 50: must be 1 to 3")


def test_nothing_to_partition_by(capsys: Any, tmp_path: Path, base_model: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": f"p{n}", "completion": "c"} for n in range(9)])
    assert "partition by iid" in refused(capsys, *train_flags(base_model, data, tmp_path, partition_by="category"))


def test_an_unknown_method(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, aggregation="fedadam"))
    assert line.startswith("aggregation method 'fedadam': must be one of clair, ")
    line = refused(capsys, "aggregate", tmp_path, "--output_dir", tmp_path / "o", "--method", "fedadam")
    assert line.startswith("aggregation method 'fedadam': must be one of clair, ")


def test_target_modules_that_match_nothing(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, target_modules="query,value"))
    assert line.startswith("target_modules=query,value: no adapter could be added")
    assert "q_proj" in line
    assert "pass --target_modules with some of them" in line


def test_one_class(capsys: Any, tmp_path: Path, base_model: Path) -> None:
    data = write_rows(tmp_path / "one.jsonl", [{"text": f"t{n}", "label": "good"} for n in range(9)])
    flags = train_flags(base_model, data, tmp_path, task="sequence_classification", partition_by="iid", num_clients=2)
    line = refused(capsys, *flags)
    assert line.startswith("label column 'label': holds the one class 'good'")


def test_options_that_are_no_json_or_unknown(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, aggregation_options="{rank"))
    assert line.startswith("aggregation_options='{rank': must be NAME=VALUE ..., or one JSON object")
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, aggregation_options='{"speed": 1}'))
    assert line.startswith("option 'speed' of method 'clair'")


def test_a_missing_model(capsys: Any, tmp_path: Path, dolly: Path) -> None:
    line = refused(capsys, *train_flags(tmp_path / "no_model", dolly, tmp_path))
    assert line.startswith(f"model_name_or_path='{tmp_path}/no_model': ")
    assert "give a folder or a Hub id" in line
    (tmp_path / "empty").mkdir()
    assert "model_name_or_path=" in refused(capsys, *train_flags(tmp_path / "empty", dolly, tmp_path))
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "model_name_or_path=" in refused(capsys, *train_flags(tmp_path / "empty", dolly, tmp_path))


def test_flags(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    flags = train_flags(base_model, dolly, tmp_path)
    assert "--speed" in refused(capsys, *flags, "--speed", "3")
    assert "num_rounds" in refused(capsys, *flags, "--num_rounds", "many")
    assert "num_rounds=-2" in refused(capsys, *flags, "--num_rounds=-2")
    assert "partition_by" in refused(capsys, *flags, "--partition_by", "colour")
    assert refused(capsys, "train", "--dataset", dolly) == (
        "--model_name_or_path is missing: a run needs it; see fedlora train --help"
    )
    assert "--dataset is missing" in refused(capsys, "train", "--model_name_or_path", base_model)
    assert "COMMAND" in refused(capsys)
    assert "'tarin'" in refused(capsys, "tarin")
    assert "--output_dir" in refused(capsys, "aggregate", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("num_rounds: [", "give a YAML file of flags"),
        ("- num_rounds", "'not a mapping' is no flag"),
        ("num_round: 3", "'num_round' is no flag of fedlora train"),
        ("num_rounds: many", "num_rounds"),
        ("learning_rate: {a: 1}", "learning_rate"),
        ("partition_by: colour", "partition_by"),
    ],
)
def test_a_config_file_that_cannot_be_used(
    capsys: Any, tmp_path: Path, base_model: Path, dolly: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    assert message in refused(capsys, *train_flags(base_model, dolly, tmp_path), "--config", path)


def test_a_run_that_cannot_be_gone_on_from(capsys: Any, tmp_path: Path, base_model: Path, dolly: Path) -> None:
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, resume_from="7"))
    assert line.startswith("resume_from='7': must be 'last' or a committed round (none)")


def test_folders_that_hold_no_run(capsys: Any, tmp_path: Path) -> None:
    assert "run.json: no such file" in refused(capsys, "report", tmp_path)
    assert "run.json: no such file" in refused(capsys, "report", tmp_path / "nowhere")
    assert "run.json: no such file" in refused(capsys, "push", tmp_path, "--repo_id", "user/name")
    (tmp_path / "run.json").write_text("{}")
    assert "schema_version" in refused(capsys, "report", tmp_path)


def test_aggregates_options(capsys: Any, tmp_path: Path) -> None:
    flags = ["aggregate", tmp_path, "--output_dir", tmp_path / "out"]
    grammar = [*flags, "--aggregation_options"]
    assert refused(capsys, *grammar, "trim").startswith("aggregation_options 'trim': must be NAME=VALUE")
    assert "did you mean 'refine'?" in refused(capsys, *grammar, "refin=soft")
    assert "max_iter is given twice" in refused(capsys, *grammar, "max_iter=3", "max_iter=4")
    assert refused(capsys, *grammar, "rank=two").startswith("rank='two': must be of type int or 'auto'")
    assert "--rank 2: is in --aggregation_options too" in refused(capsys, *grammar, "rank=3", "--rank", "2")
    assert refused(capsys, *flags, "--method", "median", "--rank", "2").startswith("option 'rank' of method 'median'")
    assert "target_rank" in refused(capsys, *flags, "--target_rank", "two")
    assert "partial_modules" in refused(capsys, *flags, "--partial_modules", "all")
    assert "no/such/folder" in refused(capsys, "aggregate", "no/such/folder", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_and_version(capsys: Any) -> None:
    for arguments, text in (
        (["--help"], "aggregate"),
        (["--version"], fedlora_hf.__version__),
        (["train", "--help_all"], "--adam_beta1"),
        (["aggregate", "--help"], "--partial_modules"),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["-h"], ["--dataset", "d", "--help"]])
def test_the_help_of_train_is_our_options_by_group(capsys: Any, arguments: list[str]) -> None:
    assert cli.main(["train", *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for group in options.GROUPS:
        assert f"{group.__doc__}:" in shown
        for item in fields(group):
            assert f"--{item.name} " in shown
            assert " ".join(item.metadata["help"].split()) in shown
    assert "Peak learning rate of a client's local optimizer. [0.0002]" in shown
    assert "--weight_by examples|uniform" in shown
    assert "--functional_judges auto|N" in shown
    assert "--aggregation_options NAME=VALUE ..." in shown
    assert "--help_all" in shown


def test_the_manual_tells_the_truth() -> None:
    """What it repeats from elsewhere, so as to be quick, is what stands there."""
    assert all(method.title in manual.manual() for method in METHODS.values())
    assert set(manual.BORROWED) <= {item.name for item in fields(TrainingArguments)}
    ours = {item.name for group in options.GROUPS for item in fields(group)}
    assert ours <= {item.name for item in fields(FederatedConfig)}
    assert not ours & set(manual.BORROWED)
    assert [base for base in FederatedConfig.__mro__ if base in options.GROUPS] == list(options.GROUPS)


def test_a_bare_flag_is_true_and_both_spellings_are_read() -> None:
    args = train.parse(["--use_rslora", "--activation_checkpointing", "--disable_tqdm", "--use-cpu", "true"])
    assert (args.use_rslora, args.activation_checkpointing, args.disable_tqdm, args.use_cpu) == (True,) * 4


def test_several_trackers_may_be_named() -> None:
    assert train.parse(["--use_cpu", "--report_to", "tensorboard", "none"]).report_to == ["tensorboard", "none"]


def test_an_interruption_says_how_to_go_on(
    capsys: Any, tmp_path: Path, base_model: Path, dolly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora_hf.training.local.LocalTraining.run", interrupt)
    assert cli.main(train_flags(base_model, dolly, tmp_path, lora_r=2, generation_examples=0)) == 130
    assert "--resume_from last" in capsys.readouterr().err.splitlines()[-1]


def test_a_process_of_its_own(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "fedlora_hf", "train", "--model_name_or_path", str(tmp_path / "base")]
    done = subprocess.run([*command, "--dataset", str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()  # a library may have spoken before; we speak last, and once
    assert lines[-1].startswith("fedlora: error: ")
    assert "none.jsonl" in lines[-1]
    assert sum("fedlora" in line for line in lines) == 1
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_is_no_place_for_one_is_one_line(
    base_model: Path, dolly: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, and the folder of the base itself, which would be an adapter afterwards."""
    before = {path.name: path.read_bytes() for path in base_model.iterdir() if path.is_file()}
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, output_dir=tmp_path / "file"))
    assert "File exists; pass another --output_dir" in line
    line = refused(capsys, *train_flags(base_model, dolly, tmp_path, output_dir=base_model))
    assert "what the run reads is there" in line
    assert {path.name: path.read_bytes() for path in base_model.iterdir() if path.is_file()} == before
