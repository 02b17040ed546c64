"""The examples of docs/after_training.md do what the page says: its commands and its Python, on a tiny run."""
# SPDX-License-Identifier: Apache-2.0

import re
import shlex
from pathlib import Path

import models
import pytest
import sample_data
from peft import LoraConfig, get_peft_model

from fedlora_hf import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "after_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("fedlora ")]
# llama.cpp is no part of the environment: that block was run by hand, as the page says.
PYTHON = [text for kind, text in BLOCKS if kind == "python" and "xllamacpp" not in text]

pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]


def test_every_example_of_the_page(tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that has what the page names: a run in out, new data, adapters of three hospitals."""
    monkeypatch.chdir(tmp_path)
    data = sample_data.write_dolly(tmp_path / "dolly.jsonl", 40)
    for seed, name in enumerate(("new", "ward_1", "ward_2"), 5):
        sample_data.write_dolly(tmp_path / f"{name}.jsonl", 8, seed=seed)
    flags = {"model_name_or_path": base_model, "dataset": data, "output_dir": "out", "aggregation": "fedavg"}
    flags |= {"num_rounds": 1, "local_steps": 1, "lora_r": 2, "max_length": 64, "generation_examples": 0}
    train = ["train", *(f"--{name}={value}" for name, value in flags.items()), "--use_cpu", "--disable_tqdm"]
    assert cli.main(train) == 0
    for site in "abc":
        model = models.tiny_llama(vocab_size=len(models.tiny_tokenizer()))
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.peft_config["default"].base_model_name_or_path = str(base_model)
        adapted.save_pretrained(tmp_path / f"hospital_{site}" / "checkpoint-100")
    assert len(COMMANDS) >= 8
    assert len(PYTHON) == 2
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "fedlora"
        assert cli.main(arguments) == 0, command
    for text in PYTHON:
        exec(compile(text, "after_training.md", "exec"), {})
    assert sorted(path.name for path in (tmp_path / "combined" / "clients").iterdir()) == [
        f"hospital_{site}" for site in "abc"
    ]
