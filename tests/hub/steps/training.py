"""Steps: a run that pushes its rounds as they end, and another that goes on from one. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from huggingface_hub import HfApi
from models import federation

from fedlora_hf import DirMagLoraConfig, load_run
from fedlora_hf.cli import main
from fedlora_hf.rounds import output

output.write_report = lambda *_: []  # figures are another test's
home, repo, api = Path(sys.argv[1]), os.environ["REPO"], HfApi()
WEIGHTS = "adapter_model.safetensors"


def run(folder, **changes):
    trainer, trained = federation(home / folder, num_rounds=3, **changes), []
    train_client = trainer.train_client
    trainer.train_client = lambda client, number: (trained.append(number), train_client(client, number))[1]
    trainer.train()
    trainer.rounds_trained = len(set(trained))
    return trainer


pushed = run("first", push_to_hub=True, hub_model_id=repo, hub_always_push=True, hub_with_client_facts=True)
url = pushed.push_to_hub()
whole = f"{repo}-whole"
run(
    "whole", push_to_hub=True, hub_model_id=whole, hub_strategy="end", hub_with_clients=True, adapter="dirmag"
).push_to_hub()
sources = [f"{whole}:clients/{name}" for name in ("ada", "bob", "eve")]
code = main(["aggregate", *sources, "--output_dir", str(home / "joined"), "--method", "product_mean"])
resumed = run("second", resume_from=f"hub:{repo}@round-1")
seen = {
    "url": url,
    "private": api.repo_info(repo).private,
    "tags": sorted(tag.name for tag in api.list_repo_refs(repo).tags),
    "files": sorted(api.list_repo_files(repo)),
    "rounds_trained_after_resuming": resumed.rounds_trained,
    "joined": [code, sorted(load_run(home / "joined").clients)],
    "direction_magnitude": list(DirMagLoraConfig.from_pretrained(whole, subfolder="clients/ada").trainable_parts),
    "same": (home / "first" / WEIGHTS).read_bytes() == (home / "second" / WEIGHTS).read_bytes(),
}
print(json.dumps(seen))  # noqa: T201
