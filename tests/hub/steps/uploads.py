"""Steps: what a terminal is shown of a push of many files, and what a pipe is. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import io
import json
import sys
from pathlib import Path

from rich.console import Console
from sample_run import write_run
from tools import requests_seen

from fedlora_hf.hub import BackgroundPusher, push, push_folder
from fedlora_hf.util.progress import Progress

folder, seen = write_run(Path(sys.argv[1]) / "out"), {}


def shown(name, terminal):
    text = io.StringIO()
    progress = Progress(console=Console(file=text, force_terminal=terminal, width=100, color_system=None))
    push_folder(folder, f"alice/{name}", with_clients=True, with_client_facts=True, progress=progress)
    return text.getvalue()


requests_seen()
seen["plain"] = shown("plain", terminal=False).splitlines()
seen["one_batch"] = sum("/preupload/" in line for line in requests_seen())
push.BATCH_FILES = 4
seen["terminal"] = shown("terminal", terminal=True)
seen["batches"] = sum("/preupload/" in line for line in requests_seen())

text = io.StringIO()
pusher = BackgroundPusher("alice/background", progress=Progress(console=Console(file=text, width=200)))
pusher.submit(folder, commit_message="Round 1")
seen["url"], seen["background"] = pusher.finish(), text.getvalue()
print(json.dumps(seen))  # noqa: T201
