"""Steps: push one run and fetch it again, with the client's settings as the test gave them. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys
from pathlib import Path

from huggingface_hub.utils._runtime import is_xet_available
from tools import requests_seen

from fedlora_hf.hub import fetch_adapter, push_folder

run, repo = Path(os.environ["LOCAL_RUN"]), os.environ["REPO"]
requests_seen()
push_folder(run, repo, with_clients=True, tag="round-3")
fetched = fetch_adapter(f"{repo}@round-3:clients/ann", cache=Path(sys.argv[1]) / "cache")
weights = "adapter_model.safetensors"
seen = {
    "xet": is_xet_available(),
    "lfs": any("objects/batch" in line for line in requests_seen()),
    "same": (fetched / weights).read_bytes() == (run / "clients" / "ann" / weights).read_bytes(),
}
print(json.dumps(seen))  # noqa: T201
