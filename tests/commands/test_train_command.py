"""`fedlora train` from a file of records to an output folder that stock PEFT, and nothing else, can use."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora_hf import FederatedConfig, FederatedTrainer, cli
from fedlora_hf.errors import ConfigError
from fedlora_hf.flags import parse
from fedlora_hf.loading import prepare

TINY = {
    "num_rounds": 2,
    "local_steps": 2,
    "per_device_train_batch_size": 4,
    "lora_r": 2,
    "lora_alpha": 4,
    "learning_rate": 0.01,
    "generation_examples": 1,
    "max_new_tokens": 4,
    "max_length": 64,
    "use_cpu": True,
    "disable_tqdm": True,
}
NO_ANSWERS: dict[str, Any] = {"generation_examples": 0, "max_new_tokens": None}
# A few steps of a tiny model are too few for clair's weights to settle, which it says.
pytestmark = pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")


def run(base: Path, dataset: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train, and give run.json. A change to None leaves a flag out."""
    flags = {"model_name_or_path": base, "dataset": dataset, "output_dir": folder, **TINY, **changes}
    assert cli.main(["train", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]) == 0
    return dict(json.loads((folder / "run.json").read_text()))


def loaded(base: Path, folder: Path, kind: Any = AutoModelForCausalLM, **more: Any) -> torch.Tensor:
    return models.logits(PeftModel.from_pretrained(kind.from_pretrained(base, **more), str(folder)))


def test_dolly_by_category(tmp_path: Path, base_model: Path, capsys: Any) -> None:
    """The whole output folder of the main job, with everything as the interface has it, figures included."""
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 80, duplicates=3)
    out = tmp_path / "out"
    record = run(base_model, data, out)
    assert sorted(record["clients"]) == sorted(sample_data.CATEGORIES)
    assert record["method"] == "clair"
    assert record["data"]["num_examples"] == 83
    assert record["data"]["duplicates_removed"] == 3
    assert record["model"]["name_or_path"] == str(base_model)
    assert len(record["rounds"]) == 2
    for when, kind in (("before", "global"), ("after", "global"), ("after", "personalised")):
        assert {"loss", "perplexity", "token_accuracy", "rouge_l"} <= set(record["metrics"][when][kind])
    assert record["metrics"]["after"]["global"]["loss"] < record["metrics"]["before"]["global"]["loss"]
    good = [client for client, facts in record["clients"].items() if facts["collaborative"]]
    assert sorted(path.name for path in (out / "clients").iterdir()) == sorted(good)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json", "report", "rounds"} <= {
        path.name for path in out.iterdir()
    }
    assert (out / "report" / "index.html").is_file()
    base = models.logits(AutoModelForCausalLM.from_pretrained(base_model))
    for folder in (out, *(out / "clients" / client for client in good[:2])):
        assert (loaded(base_model, folder) - base).abs().max() > 1e-4
    assert str(out) in capsys.readouterr().out


def test_natural_instructions_by_task(tmp_path: Path, base_model: Path, bare_output: None) -> None:
    tasks = sample_data.write_natural_instructions(tmp_path / "tasks", tasks=4, instances=12)
    record = run(base_model, tasks, tmp_path / "out", partition_by="task", aggregation="product_mean")
    assert sorted(record["clients"]) == sorted(path.stem for path in tasks.glob("*.json"))
    assert all(facts["metrics"]["global"]["rouge_l"] is not None for facts in record["clients"].values())


@pytest.mark.parametrize("partition_by", ["iid", "dirichlet"])
def test_made_up_clients(tmp_path: Path, base_model: Path, bare_output: None, partition_by: str) -> None:
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 60)
    record = run(
        base_model,
        data,
        tmp_path / "out",
        partition_by=partition_by,
        num_clients=3,
        aggregation="fedavg",
        dirichlet_alpha=5.0 if partition_by == "dirichlet" else None,
        clients_per_round=2,
        **NO_ANSWERS,
    )
    assert list(record["clients"]) == ["client-00", "client-01", "client-02"]
    assert all(len(entry["cohort"]) == 2 for entry in record["rounds"])


def test_classification_of_categories(tmp_path: Path, base_model: Path, bare_output: None) -> None:
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 60)
    record = run(
        base_model,
        data,
        tmp_path / "out",
        task="sequence_classification",
        partition_by="iid",
        num_clients=3,
        aggregation="product_mean",
        **NO_ANSWERS,
    )
    assert set(record["metrics"]["after"]["global"]) == {"loss", "accuracy"}
    adapted = loaded(base_model, tmp_path / "out", AutoModelForSequenceClassification, num_labels=8)
    assert adapted.shape == (4, 8)


def test_a_run_of_the_command_line_is_resumed(tmp_path: Path, base_model: Path, bare_output: None) -> None:
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 40)
    settings = {"aggregation": "fedavg", **NO_ANSWERS}
    run(base_model, data, tmp_path / "whole", **settings)
    run(base_model, data, tmp_path / "parts", **settings, num_rounds=1)
    record = run(base_model, data, tmp_path / "parts", **settings, resume_from="last")
    assert len(record["rounds"]) == 2
    assert models.weight_files(tmp_path / "parts") == models.weight_files(tmp_path / "whole")


def test_options_of_a_method_are_words_or_json() -> None:
    for words in (['{"trim": 0.3}'], ["trim=0.3"]):
        args = parse(["--aggregation", "trimmed_mean", "--aggregation_options", *words, "--use_cpu"])
        assert args.aggregation_options == {"trim": 0.3}
    given = ["rank=2", "side=input", "center=true"]
    args = parse(["--aggregation_options", *given, "--use_cpu"])
    assert args.aggregation_options == {"rank": 2, "side": "input", "center": True}


def test_a_command_line_without_flags_is_a_config_without_arguments() -> None:
    """What is recorded as set is what was set, though argparse passes every option's default."""
    assert parse(["--use_cpu"]).changed() == FederatedConfig(use_cpu=True).changed()


def test_loading_changes_no_option(base_model: Path, tmp_path: Path) -> None:
    dataset = str(sample_data.write_dolly(tmp_path / "dolly.jsonl", 40))
    args = FederatedConfig(model_name_or_path=str(base_model), dataset=dataset, max_length=4096, use_cpu=True)
    before = args.to_dict()
    job = prepare(args)
    assert args.to_dict() == before
    assert job.args.max_length == job.model.config.max_position_embeddings < args.max_length
    assert FederatedTrainer.of(job).args.max_length == job.args.max_length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_revision": "main"}, "model_revision=main: has no effect on a folder"),
        ({"dataset_split": "test"}, "dataset_split=test: has no effect on a file"),
    ],
)
def test_what_a_folder_or_a_file_does_not_have_is_refused(
    base_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    dataset = str(sample_data.write_dolly(tmp_path / "dolly.jsonl", 40))
    with pytest.raises(ConfigError, match=message):
        prepare(FederatedConfig(model_name_or_path=str(base_model), dataset=dataset, use_cpu=True, **changes))


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "num_rounds: 7\nlearning_rate: 1e-3\ntarget_modules: [q_proj, k_proj]\noutput_dir: elsewhere\n"
        "use_rslora: true\nlocal_steps:\naggregation: trimmed_mean\naggregation_options: {trim: 0.3}\n"
    )
    args = parse(["--config", str(path), "--num_rounds", "2", "--use_cpu"])
    assert (args.num_rounds, args.learning_rate, args.output_dir) == (2, 1e-3, "elsewhere")
    assert args.target_modules == ["q_proj", "k_proj"]
    assert (args.use_rslora, args.local_steps, args.aggregation_options) == (True, None, {"trim": 0.3})
    with pytest.raises(ConfigError, match="see fedlora train --help"):
        parse(["--num_roundz", "2"])


@pytest.mark.real_data
def test_published_dolly_and_natural_instructions(
    tmp_path: Path, base_model: Path, bare_output: None, real_data: Path
) -> None:
    """A few examples of each client; the whole run is for the benchmarks."""
    few = {"max_examples_per_client": 10, "num_rounds": 1, "local_steps": 1, **NO_ANSWERS}
    dolly = real_data / "dolly" / "databricks-dolly-15k.jsonl"
    record = run(base_model, dolly, tmp_path / "dolly", **few)
    assert len(record["clients"]) == 8
    assert record["data"]["duplicates_removed"] > 0
    tasks = run(base_model, real_data / "natural_instructions", tmp_path / "tasks", partition_by="task", **few)
    assert len(tasks["clients"]) == 40


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_rounds: 1\nlora_r: 4\nnum_rounds: 2\n", "num_rounds stands twice, the second time in line 3"),
        ("dataset: {a: x.jsonl, b: y.jsonl, a: z.jsonl}\n", "a stands twice, the second time in line 1"),
        ("learning_rate:\n", "learning_rate has no value; give it one, or leave the line out"),
        ("seed: null\n", "seed has no value; give it one, or leave the line out"),
    ],
)
def test_a_config_that_would_be_read_otherwise_than_it_was_meant_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^--config .*run.yaml: {said}"):
        parse(["--config", str(path)])


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "too large"])
def test_a_config_that_is_no_plain_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    if kind == "too large":
        path.write_text("# " + "x" * (1 << 20))
    else:
        {"a pipe": os.mkfifo, "a device": lambda p: p.symlink_to("/dev/zero"), "a folder": os.mkdir}[kind](path)
    with pytest.raises(ConfigError, match="larger than 1 MiB" if kind == "too large" else "not a plain file") as caught:
        parse(["--config", str(path)])
    assert "\n" not in str(caught.value)
