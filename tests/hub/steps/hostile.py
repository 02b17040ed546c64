"""Steps: fetch runs and adapters from repositories that mean harm. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import sys
from pathlib import Path

from tools import error_of, requests_seen

from fedlora_hf.hub import fetch_adapter, fetch_run

seen = {}
for name in ("escape", "crowd", "huge", "state", "code"):
    before = sorted(str(path) for path in Path(sys.argv[1]).rglob("*.json"))
    seen[name] = error_of(fetch_run, f"alice/{name}")
    fetched = [path for path in Path(sys.argv[1]).rglob("*.json") if str(path) not in before]
    seen[f"{name} files"] = len(fetched)
seen["downloads"] = [line for line in requests_seen() if "/resolve/" in line and "alice/state" not in line]
run = fetch_run("alice/state")
seen["state"] = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
seen["adapter"] = error_of(fetch_adapter, "alice/huge")
print(json.dumps(seen))  # noqa: T201
