"""Steps: a run that pushes its rounds as they end, then goes on from the Hub in another folder. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from huggingface_hub import HfApi
from models import federation

home, repo, api = Path(sys.argv[1]), os.environ["REPO"], HfApi()
WEIGHTS = "adapter_model.safetensors"


def run(folder, **changes):
    trainer = federation(home / folder, num_rounds=3, **changes)
    trainer.train()
    return trainer


pushed = run("first", push_to_hub=True, hub_model_id=repo, hub_always_push=True)
url = pushed.push_to_hub()
resumed = run("second", resume_from=f"hub:{repo}@round-1")
seen = {
    "url": url,
    "private": api.repo_info(repo).private,
    "tags": sorted(tag.name for tag in api.list_repo_refs(repo).tags),
    "files": sorted(api.list_repo_files(repo)),
    "rounds_trained_after_resuming": resumed.state.global_step // (3 * 2),
    "same": (home / "first" / WEIGHTS).read_bytes() == (home / "second" / WEIGHTS).read_bytes(),
}
print(json.dumps(seen))  # noqa: T201
