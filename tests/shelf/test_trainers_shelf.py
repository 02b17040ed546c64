"""The shelf of trainers: every file runs from start to end, says what it is for, and answers --help at once."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_base
from sample_data import write_dolly

from fedlora_hf.launch.processes import missing_processes
from fedlora_hf.rounds import output

SHELF = Path(__file__).resolve().parents[2] / "trainers"
FILES = sorted(path.stem for path in SHELF.glob("*.py"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small run: a saved base model and a file of generated records."""
    folder = tmp_path_factory.mktemp("shelf")
    flags = {
        "model_name_or_path": save_base(folder / "base"),
        "dataset": write_dolly(folder / "dolly.jsonl", 64),
        "num_rounds": 1,
        "local_steps": 1,
        "per_device_train_batch_size": 2,
        "max_length": 48,
        "lora_r": 2,
        "generation_examples": 0,
        "max_examples_per_client": 8,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def run(monkeypatch: pytest.MonkeyPatch, name: str, flags: list[str]) -> int:
    """The exit code of a file run as a program, here; without the figures, which take longer than all the rest."""
    monkeypatch.setattr(output, "write_report", lambda record, folder: [])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SHELF / f"{name}.py"), run_name="__main__")
    return int(end.value.code or 0)


SAID = {
    "fedavg": r"misses the mean of the clients' updates by \d+\.\d+%",
    "product_mean": r"q_proj: rank 2 discards \d+\.\d+% of the energy",
    "ffa": r"clients sent .* in 8 updates",
    "fedsa": r"\d of 8 clients gain",
    "clair": r"round 1: flagged",
    "fedlora_optimizer": r"global \(2\): a client sent 512 bytes, got 512, .*moved A.direction \S+, .*B.magnitude 0\n",
    "robust": r"spoiled, weight 0\.\d+",
}
MORE = {
    "product_mean": ["--num_rounds", "2", "--patience", "1"],
    "clair": ["--num_rounds", "3", "--settled", "1"],
    "robust": ["--spoil", "2"],
}


@pytest.mark.parametrize("name", FILES)
def test_each_runs_and_says_what_its_method_is_about(
    name: str, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, [*inputs, "--output_dir", str(tmp_path), *MORE.get(name, [])]) == 0
    said = capsys.readouterr().out
    assert re.search(SAID[name], said), said
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["method"] == {"robust": "geometric_median", "fedlora_optimizer": "dirmag_mean"}.get(name, name)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    if name == "ffa":
        assert record["options"]["learning_rate"] == 4e-4
        whole = 4 * record["adapter"]["parameters"]
        assert all(sent < whole for sent in record["rounds"][0]["bytes_up"].values())
    if name == "clair":
        assert len(record["rounds"]) == 1  # of 3: the verdict stood still
    if name == "product_mean":
        assert 0 <= min(module["discarded_energy"] for module in record["modules"].values()) < 1


def test_spoiled_clients_are_in_the_record_and_too_many_are_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs, "--output_dir", str(tmp_path), "--aggregation", "multikrum"]
    assert run(monkeypatch, "robust", [*flags, "--spoil", "3"]) == 0
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert len(record["data"]["contaminated"]) == 3
    assert record["method"] == "multikrum"
    capsys.readouterr()
    assert run(monkeypatch, "robust", [*flags, "--spoil", "9"]) == 2
    assert "--spoil 9: must be between 0 and the 8 clients" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_help_is_the_docstring_and_loads_nothing_heavy(name: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SHELF / f'{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"trainers/{name}.py" in done.stdout  # one complete command
    assert len(max(done.stdout.splitlines(), key=len)) <= 120


def test_bad_input_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--output_dir", str(tmp_path), "--model_name_or_path", "x", "--dataset", str(tmp_path / "no.jsonl")]
    assert run(monkeypatch, "fedavg", flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("fedlora: error:")] == lines[-1:]
    assert "no.jsonl" in lines[-1]


def test_a_launch_with_fewer_processes_than_asked_is_told() -> None:
    asked_for_two = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert "torchrun" in str(missing_processes(asked_for_two, 1))
    assert missing_processes(asked_for_two, 2) is None
    assert missing_processes({"ACCELERATE_USE_CPU": "True"}, 1) is None  # one was asked for
    assert missing_processes({"MASTER_ADDR": "127.0.0.1"}, 1) is None  # torchrun with one process


def launched(command: list[str], inputs: list[str], folder: Path) -> str:
    """Standard error of a trainer under a launcher, in a process of its own."""
    root = str(SHELF.parent)
    environ = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    flags = [*inputs, "--output_dir", str(folder), "--num_rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *flags], capture_output=True, text=True, timeout=300, env=environ, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "run.json").is_file()
    return done.stderr


@pytest.mark.slow
def test_under_accelerate_launch_and_torchrun_the_adapter_is_the_same_to_the_bit(
    inputs: list[str], tmp_path: Path
) -> None:
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "trainers/product_mean.py"]
    assert "accelerate launch --cpu started 1 process" in launched(accelerate, inputs, tmp_path / "one")
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "trainers/product_mean.py"]
    assert "started 1 process" not in launched(two, inputs, tmp_path / "two")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("path", sorted((SHELF / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_is_a_config_of_fedlora_train(path: Path, tmp_path: Path) -> None:
    from fedlora_hf.flags import parse

    args = parse(["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path)])
    assert args.target_modules == ["q_proj", "v_proj"]
    assert args.output_dir == str(tmp_path)  # flags override the file
    assert args.gradient_checkpointing == args.bf16 == ("7b" in path.stem)
