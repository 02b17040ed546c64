"""An output folder as a small run leaves it, made without torch: adapters of a tiny Llama, a record, a report."""
# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
from safetensors.numpy import save_file

from fedlora_hf.record.record import RunRecord

WIDTH, RANK = 16, 2
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
CLIENTS = ("ann", "ben", "eve", "mal")  # eve will be flagged, mal is quarantined
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": None,
    "inference_mode": True,
}


def write_adapter(folder, seed, padding=0):
    """A LoRA folder of its own seed; `padding` more bytes of weights make it large."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": generator.normal(size=shape).astype(np.float32)
        for module in MODULES
        for factor, shape in shapes.items()
    }
    if padding:
        tensors["base_model.model.extra"] = generator.integers(0, 255, padding).astype(np.uint8)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))


def sample_record(**changes):
    """The record of the folder; `changes` replace its fields."""
    clients = {
        name: {"collaborative": name != "mal", "weight": 0.25, "num_examples": 8, "evidence": {}, "metrics": {}}
        for name in CLIENTS
    }
    fields = {
        "options": {"num_rounds": 1},
        "command": ["fedlora", "train", "--hub_token", "hf_" + "s" * 30, "--seed", "0"],
        "model": {"name_or_path": "lab/tiny", "task": "causal_lm"},
        "data": {"dataset": "lab/texts", "partition_by": "iid"},
        "rounds": [{"round": 1, "cohort": list(CLIENTS)}],
        "quarantined": {"mal": "NaN in lora_B"},
        "clients": clients,
        "metrics": {"after": {"global": {"loss": 1.5}}},
    }
    return RunRecord(kind="train", method="fedavg", seed=0, **(fields | changes))


def write_run(folder, seed=0, **changes):
    """The whole output folder, with what must never be pushed beside what must."""
    write_adapter(folder, seed)
    for index, name in enumerate(CLIENTS):
        write_adapter(folder / "clients" / name, seed + 1 + index)
        (folder / "clients" / name / "README.md").write_text("[More Information Needed]")
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "evidence.png").write_bytes(b"\x89PNG not really")
    (folder / "report" / "index.html").write_text("<p>report</p>")
    (folder / "report" / "notes.txt").write_text("mine")
    (folder / "rounds" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "rounds" / "1" / "update.safetensors").write_bytes(b"private")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    sample_record(**changes).save(folder)
    return folder
