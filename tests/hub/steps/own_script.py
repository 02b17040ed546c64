"""The script of trainers/python, run twice as a user would: to its end with a push, and again, which goes on."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import models
from huggingface_hub import HfApi

HOME = Path(sys.argv[1])
SCRIPT = Path(__file__).resolve().parents[3] / "trainers" / "python" / "own_script.py"


def run(*flags: str) -> int:
    sys.argv = ["own_script.py", str(HOME / "base"), str(HOME / "out"), *flags]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


models.save_base(HOME / "base")
codes = [run("--num_rounds", "2"), run("--num_rounds", "3", "--push", os.environ["REPO"])]

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

events = sorted((HOME / "out").glob("runs/*/events*"))
curves = {tag for file in events for tag in EventAccumulator(str(file)).Reload().Tags()["scalars"]}
points = sum(len(EventAccumulator(str(file)).Reload().Scalars("train/loss")) for file in events)
record = json.loads((HOME / "out" / "run.json").read_text())
sys.stdout.write(
    json.dumps(
        {
            "codes": codes,
            "curves": sorted(curves),
            "points": points,
            "rounds": len(record["rounds"]),
            "metrics": record["metrics"],
            "model": record["model"],
            "tokens": [entry["input_tokens"] for entry in record["rounds"]],
            "files": sorted(HfApi().list_repo_files(os.environ["REPO"])),
        }
    )
)
