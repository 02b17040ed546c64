"""Steps: the Hub answers 500, hangs up, is slow, loses answers; others commit in between. Prints what was seen."""
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import sys
import threading
import time
from pathlib import Path

from huggingface_hub import HfApi
from sample_run import write_adapter, write_run
from tools import error_of, fault, requests_seen

from fedlora_hf.hub import BackgroundPusher, fetch_adapter, push_folder

wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.02))  # neither we nor the client shall wait for long
warnings = []
handler = logging.Handler()
handler.emit = lambda message: warnings.append(message.getMessage())
logging.getLogger("fedlora_hf").addHandler(handler)
home = Path(sys.argv[1])
api, repo, seen = HfApi(), "alice/faults", {}
out = write_run(home / "out")
push_folder(out, repo)


def titles(name=repo):
    return [commit.title for commit in api.list_repo_commits(name)]


def weights():
    path = api.hf_hub_download(repo, "adapter_model.safetensors", force_download=True)
    return Path(path).read_bytes() == (out / "adapter_model.safetensors").read_bytes()


def changed_push(title, **options):
    """Push new weights; (commits made, whether the Hub now has them)."""
    before = len(titles())
    write_adapter(out, seed=hash(title) % 1000)
    push_folder(out, repo, commit_message=title, **options)
    return [len(titles()) - before, weights()]


COMMIT = r"POST .*/commit/"
for name, match, do, details in [
    ("500 on commit", COMMIT, "error", {"status": 503, "times": 2}),
    ("conflict", COMMIT, "error", {"status": 412}),
    ("hang up on commit", COMMIT, "drop", {}),
    ("answer lost", COMMIT, "lost", {}),
    ("slow commit", COMMIT, "slow", {"seconds": 0.5}),
    ("hang up on upload", "PUT /_lfs/", "drop", {}),
    ("500 on create", "POST /api/repos/create", "error", {"status": 500}),
    ("500 on validation", "POST /api/validate-yaml", "error", {"status": 502}),
    ("429 on listing", "GET .*/tree/", "error", {"status": 429}),
]:
    fault(match, do, **details)
    seen[name] = changed_push(name)

# A real conflict: somebody commits after the head was read.
pusher = BackgroundPusher(repo, always=True)
fault("POST .*/preupload/", "slow", seconds=1.0)
write_adapter(out, seed=77)
expected = (out / "adapter_model.safetensors").read_bytes()
seen["submitted"] = pusher.submit(out, tag="round-7", commit_message="ours")
write_adapter(out, seed=78)  # the run goes on while the copy is under way
wait(0.4)
fault("never", "drop")
api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=repo, commit_message="theirs")
pusher.finish()
pushed = Path(api.hf_hub_download(repo, "adapter_model.safetensors", revision="round-7")).read_bytes()
seen["both"] = [titles()[:2], pushed == expected, api.file_exists(repo, "theirs.txt")]

# Skipped while another push is under way; a failed push is told, not raised.
pusher = BackgroundPusher(repo)
fault("POST .*/preupload/", "slow", seconds=0.6)
seen["skipped"] = [pusher.submit(out), pusher.submit(out)]
seen["finished"] = str(pusher.finish()).rsplit("/", 1)[0].endswith(f"{repo}/commit")
api.create_repo("alice/visible", private=False)
pusher = BackgroundPusher("alice/visible")
pusher.submit(out)
seen["background_failure"] = [pusher.finish(), warnings[-1]]
seen["threads"] = [thread.name for thread in threading.enumerate() if "hub-push" in thread.name]

# An upload that dies half-way shows nothing, and going on sends only what is missing.
other = write_run(home / "other", seed=500)
push_folder(write_run(home / "start", seed=400), "alice/resumed", with_clients=True)
requests_seen()
fault("PUT /_lfs/", "error", status=400)
before = titles("alice/resumed")
seen["died"] = error_of(push_folder, other, "alice/resumed", with_clients=True)
seen["untouched"] = titles("alice/resumed") == before
first = sum(line.startswith("PUT /_lfs/") for line in requests_seen())
push_folder(other, "alice/resumed", with_clients=True)
second = sum(line.startswith("PUT /_lfs/") for line in requests_seen())
seen["uploads"] = [first, second, len(titles("alice/resumed")) - len(before)]

# Downloads.
write_adapter(home / "large", 5, padding=3 << 20)
(home / "large" / "run.json").write_text((out / "run.json").read_text())
push_folder(home / "large", "alice/big")
requests_seen()
fault("GET .*/resolve/.*safetensors", "half")
fault("HEAD .*/resolve/", "error", status=500)
fault("GET /api/models/alice/big", "drop")
fault("POST .*/paths-info/", "error", status=503)
fetched = fetch_adapter("alice/big")
seen["resumed"] = (fetched / "adapter_model.safetensors").read_bytes() == (
    home / "large" / "adapter_model.safetensors"
).read_bytes()
fault(".", "drop", times=10_000)
seen["unreachable"] = [
    error_of(fetch_adapter, "alice/big@main", cache=home / "new"),
    error_of(push_folder, out, repo, attempts=2),
]
print(json.dumps(seen))  # noqa: T201
