"""Steps: push, push again, read back; private, public, refused. Prints what was seen as one line of JSON."""
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi
from local_hub import token_of
from sample_run import write_adapter, write_run
from tools import error_of, requests_seen

from fedlora_hf.hub import fetch_adapter, fetch_run, load_run, push_folder
from fedlora_hf.record.record import RunRecord

home = Path(sys.argv[1])
api, repo, seen = HfApi(), "alice/run", {}
warnings = []
handler = logging.Handler()
handler.emit = lambda message: warnings.append(message.getMessage())
logging.getLogger("fedlora_hf").addHandler(handler)


def files(revision="main", name=repo):
    return sorted(path for path in api.list_repo_files(name, revision=revision) if path != ".gitattributes")


def same(one, other):
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def history(revision="main"):
    return [commit.commit_id for commit in api.list_repo_commits(repo, revision=revision)]


out = write_run(home / "out")
seen["first_url"] = push_folder(out, repo, tag="round-1")
seen["first_files"], seen["first_commits"] = files(), len(history())
seen["private"] = api.repo_info(repo).private
seen["warnings_first"] = len(warnings)

push_folder(out, repo, with_clients=True, with_client_facts=True)
seen["with_clients"], seen["warnings"] = files(), warnings[:]

requests_seen()
again = push_folder(out, repo, with_clients=True, with_client_facts=True)
seen["again"] = [again.rsplit("/", 1)[1] == history()[0], sum("/commit/" in line for line in requests_seen())]

write_run(out, seed=100, flagged=["eve"])
(out / "clients" / "mal" / "adapter_config.json").unlink()
seen["second_head"] = push_folder(out, repo, with_clients=True, with_client_facts=True, tag="round-2").rsplit("/", 1)[1]
seen["flagged"], seen["before_flagged"] = files("round-2"), files("round-1")
push_folder(out, repo, tag="round-1")
seen["moved"] = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags} | {"head": history()[0]}
seen["clients_withdrawn"] = files()
push_folder(out, repo, revision="try/one")
seen["branch"] = [files("try/one") == files("main"), [ref.name for ref in api.list_repo_refs(repo).branches]]

card = Path(api.hf_hub_download(repo, "README.md", revision="round-2")).read_text()
record = Path(api.hf_hub_download(repo, "run.json", revision="round-2")).read_text()
seen["card"], seen["secrets"] = card, ["s" * 30 in text or token_of("alice") in text for text in (card, record)]

# Back again: by tag, by commit, by sub-folder.
fetched = fetch_adapter(f"{repo}@round-2:clients/ann")
seen["fetched"] = [sorted(path.name for path in fetched.iterdir()), same(fetched, out / "clients" / "ann")]
seen["by_commit"] = same(fetch_adapter(f"{repo}@{seen['second_head']}"), out)
requests_seen()
fetch_adapter(f"{repo}@round-2:clients/ann")
seen["cached"] = sum("/resolve/" in line for line in requests_seen())
run = fetch_run(repo, "round-2")
run_files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
seen["run"] = [run_files, RunRecord.load(run).flagged]
seen["load_run"] = load_run(repo, revision="round-2").flagged

# Large files go through LFS.
write_adapter(home / "large", 5, padding=12 << 20)
shutil.copy(out / "run.json", home / "large")
requests_seen()
push_folder(home / "large", "alice/large")
seen["lfs_puts"] = sum(line.startswith("PUT /_lfs/") for line in requests_seen())
seen["large"] = same(fetch_adapter("alice/large"), home / "large")
seen["too_large"] = error_of(fetch_adapter, "alice/large", max_bytes=1 << 20, cache=home / "other")
seen["downloads"] = sum("/resolve/" in line for line in requests_seen() if "HEAD" in line) - 3

# What is refused.
api.create_repo("alice/pickled", private=True)
for name in ("adapter_model.bin", "adapter_config.json"):
    api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="alice/pickled")
api.create_repo("alice/open", private=False)
api.create_repo("alice/damaged", private=True)
for name in ("adapter_model.safetensors", "adapter_config.json"):
    api.upload_file(path_or_fileobj=b"{} but not weights", path_in_repo=name, repo_id="alice/damaged")
seen["errors"] = {
    "pickled": error_of(fetch_adapter, "alice/pickled"),
    "damaged": error_of(fetch_adapter, "alice/damaged"),
    "anonymous": error_of(fetch_adapter, repo, token=False, cache=home / "anonymous"),
    "missing": error_of(fetch_adapter, "alice/nothing"),
    "revision": error_of(fetch_adapter, f"{repo}@round-9"),
    "subfolder": error_of(fetch_adapter, f"{repo}:clients/eve"),
    "no_record": error_of(fetch_run, "alice/pickled"),
    "public": error_of(push_folder, out, "alice/open"),
    "other_owner": error_of(push_folder, out, repo, token=token_of("bob")),
    "not_allowed": error_of(push_folder, out, "alice/open", private=False, token=token_of("bob")),
    "not_signed_in": error_of(push_folder, out, repo, token=False),
}
seen["open"] = files(name="alice/open")
push_folder(out, "alice/open", private=False)
seen["opened"] = files(name="alice/open")
api.delete_repo("alice/open")
seen["errors"]["deleted"] = error_of(fetch_adapter, "alice/open")
leaks = [path for path in home.rglob("*") if path.is_file() and token_of("alice").encode() in path.read_bytes()]
seen["leaks"] = [str(path) for path in leaks]
seen["torch"] = "torch" in sys.modules
print(json.dumps(seen))  # noqa: T201
