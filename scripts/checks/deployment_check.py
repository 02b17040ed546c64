"""A federation of separate processes over real sockets on this machine: what is refused, and what a run survives.

A SuperLink and four SuperNodes of Flower's deployment engine, TLS and SuperNode authentication on, each node with data
of its own. First what must not get in: a node with an unregistered key, one without a key, one that trusts another
authority, one without TLS. Then a run of CLAIR in which one node contaminates its updates and another is killed in the
middle of round 2. Prints what was found as Markdown; exit code 1 when something is not as it must be.

    python -m scripts.checks.deployment_check --model_name_or_path BASE --markdown docs/deployment_check.md

Without --model_name_or_path a tiny model is made on the spot.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts import PROJECT, common
from scripts.checks import flower_daemons
from scripts.checks.flower_daemons import CONNECTION, Daemons

# CLAIR needs three updates, so that one of four may be lost.
CLIENTS = ("ada", "bob", "cleo", "eve")
CONTAMINATED, KILLED, KILLED_IN = "eve", "bob", 2
# The run's configuration, but for the places.
CONFIG = {
    "num_rounds": 3,
    "local_steps": 4,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "learning_rate": 5e-3,
    "lora_r": 4,
    "lora_alpha": 8,
    "min_nodes": len(CLIENTS),
    "flags": "--use_cpu --generation_examples 0",
}
# In what a SuperNode logs, the line that says why it did not get in: the first of these that is there.
REFUSALS = ("[code:", "[SSL:", "disconnected", "Exit Code")
# What nodes of the check do besides, as one of Flower's mods: the contaminated one spoils what it sends, the other
# stops in its round and says so.
CLIENT_APP = '''"""The package's ClientApp, and what single nodes of the check do besides."""
import os
import pathlib
import time

from fedlora_hf.flower.client_app import client_app

FOLDER, CONTAMINATED, KILLED, KILLED_IN = {facts}


def besides(message, context, call_next):
    name, began = context.node_config["client_id"], time.time()
    train = "start.arrays" in message.content
    if train and name == KILLED and message.content["config"]["round"] == KILLED_IN:
        pathlib.Path(FOLDER, "stalled").write_text(str(os.getpid()))
        time.sleep(3600)
    reply = call_next(message, context)
    if train and name == CONTAMINATED:
        from fedlora_hf.flower.wire import put, take
        from fedlora_hf.update import AdapterState

        update = take(reply.content, "update")
        put(reply.content, "update", AdapterState({{m: f * -30.0 for m, f in update.items()}}))
    with open(os.path.join(FOLDER, name + ".times"), "a") as file:
        file.write(f"{{message.metadata.message_type}} {{time.time() - began:.3f}}\\n")
    return reply


app = client_app([besides])
'''


class Finding(NamedTuple):
    """One thing that was looked at: what, what was found, and whether it is as it must be."""

    what: str
    found: str
    sound: bool


def check(folder: Path, base: Path, data: Mapping[str, Path]) -> Iterator[Finding]:
    """Every finding, in the order in which it is made. data: {client: its own file}."""
    key, certificate, ca = flower_daemons.authority(folder)
    _, _, other_ca = flower_daemons.authority(folder, "other")
    server, server_key = flower_daemons.server_files(folder, key, certificate)
    keys = {name: flower_daemons.node_keys(folder, name) for name in (*CLIENTS, "mallory")}
    tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", server, "--ssl-keyfile", server_key]
    with Daemons(folder / "flower") as daemons:
        daemons.superlink(*tls, "--enable-supernode-auth", certificate=ca)
        for name in CLIENTS:
            daemons.flwr("supernode", "register", keys[name][1], CONNECTION, "--name", name)
        yield Finding(
            "registering a node's key and submitting a run, with the CA file and the port but no credential",
            "accepted: guard the port (docs/deployment.md)",
            True,
        )
        attempts: dict[str, list[str | Path]] = {
            "a key that is not registered": [
                "--root-certificates",
                ca,
                "--auth-supernode-private-key",
                keys["mallory"][0],
            ],
            "no key": ["--root-certificates", ca],
            "another authority": ["--root-certificates", other_ca, "--auth-supernode-private-key", keys["ada"][0]],
            "no TLS": ["--insecure"],
        }
        for what, options in attempts.items():
            yield refused(daemons, what, options)
        for name in CLIENTS:
            node = {"client_id": name, "dataset": str(data[name])}
            options = ["--root-certificates", ca, "--auth-supernode-private-key", keys[name][0]]
            daemons.supernode(name, node, *options)
        yield from run_and_kill(daemons, folder, base)


def refused(daemons: Daemons, what: str, options: list[str | Path]) -> Finding:
    """Start a node that must not get in, and see that it does not."""
    name = f"attempt-{what.replace(' ', '-')}"
    daemons.supernode(name, {"client_id": "mallory"}, "--max-retries", "1", "--max-wait-time", "5", *options)
    daemon, end = daemons.running[name], time.monotonic() + 40
    while daemon.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    code = daemon.poll()
    nodes = daemons.flwr("supernode", "list", CONNECTION)["nodes"]
    inside = [node for node in nodes if node["status"] == "online"]
    lines = re.sub("\x1b\\[[0-9;]*m", "", daemons.log(name)).splitlines()
    said = [line for word in REFUSALS for line in lines if word in line]
    daemons.stop(name)
    ended = "still trying" if code is None else f"exit code {code}"
    reason = " ".join(said[0].split())[:120].replace("|", "/") if said else "nothing said"
    return Finding(f"a node with {what}", f"not connected; {ended}: {reason}", not inside and code != 0)


def run_and_kill(daemons: Daemons, folder: Path, base: Path) -> Iterator[Finding]:
    """The run: one node contaminates, one is killed in the middle of a round."""
    app, out = folder / "app", folder / "out"
    shutil.copytree(PROJECT / "trainers" / "flower", app, ignore=shutil.ignore_patterns("__pycache__"))
    facts = (str(folder), CONTAMINATED, KILLED, KILLED_IN)
    (app / "fedlora_flower" / "client_app.py").write_text(CLIENT_APP.format(facts=facts), encoding="utf-8")
    began = time.monotonic()
    run = daemons.submit(app, {**CONFIG, "model_name_or_path": str(base), "output_dir": str(out)})
    stalled = folder / "stalled"
    while not stalled.exists():
        if time.monotonic() - began > 300 or daemons.status(run).startswith("finished"):
            yield Finding("the run", f"round {KILLED_IN} did not come: {daemons.log('superlink')[-300:]}", False)
            return
        time.sleep(1.0)
    killed = time.monotonic()
    os.kill(int(stalled.read_text(encoding="ascii")), signal.SIGKILL)
    daemons.stop(KILLED, signal.SIGKILL)
    status = daemons.wait(run, 500)
    seconds = time.monotonic() - began
    yield Finding(
        "the run",
        f"{status} in {seconds:.0f} s; {seconds - killed + began:.0f} s of it after the kill",
        status == "finished:completed",
    )
    if status == "finished:completed":
        yield from left_behind(folder, out)


def left_behind(folder: Path, out: Path) -> Iterator[Finding]:
    """What the run's record and its output folder say afterwards."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    rounds, node = record["rounds"], record["clients"][CONTAMINATED]["node"]
    flagged = [entry["flagged"] for entry in rounds]
    yield Finding(
        f"contaminated node ({CONTAMINATED})",
        f"flagged per round {flagged}; in the record as node {node}",
        flagged[0] == [CONTAMINATED]
        and record["flagged"] == [CONTAMINATED]
        and rounds[0]["nodes"][CONTAMINATED] == node,
    )
    reason = rounds[KILLED_IN - 1]["quarantined"].get(KILLED, "not quarantined")
    yield Finding(f"node killed in round {KILLED_IN} ({KILLED})", reason, "gone" in reason or "no answer" in reason)
    cohorts = [entry["cohort"] for entry in rounds]
    yield Finding("cohorts", str(cohorts), cohorts == [[*CLIENTS], [*CLIENTS], [c for c in CLIENTS if c != KILLED]])
    down = [entry["bytes_down"]["ada"] for entry in rounds]
    yield Finding("bytes to a node that stayed, per round", ", ".join(map(str, down)), max(down[1:]) <= down[0])
    left = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    whole = ["README.md", "adapter_config.json", "adapter_model.safetensors", "clients", "report", "rounds", "run.json"]
    yield Finding("output folder", ", ".join(left), left == whole)
    yield Finding("seconds of a round", ", ".join(f"{entry['seconds']['train']:.1f}" for entry in rounds), True)
    times = [line.split() for line in (folder / "ada.times").read_text(encoding="utf-8").splitlines()]
    yield Finding(
        "seconds inside a ClientApp (ada), imports included", ", ".join(f"{kind} {t}" for kind, t in times), True
    )


def tiny_inputs(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A tiny base model, and a file of records for each client."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import models
    import sample_data

    rows = sample_data.dolly_records(160)
    data = {name: folder / f"{name}.jsonl" for name in CLIENTS}
    for place, path in enumerate(data.values()):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[place :: len(data)]), encoding="utf-8")
    return models.save_base(folder / "base"), data


def report(findings: list[Finding]) -> str:
    """What was found, as Markdown."""
    rows = [{"what": f.what, "found": f.found, "as it must be": "yes" if f.sound else "**no**"} for f in findings]
    environment = f"{common.environment()}, flwr {importlib.metadata.version('flwr')}"
    return f"# What scripts/checks/deployment_check.py found\n\n{environment}\n\n{common.markdown(rows)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, help="base model (default: a tiny one, made on the spot)")
    parser.add_argument("--markdown", type=Path, help="write the findings there as well")
    parser.add_argument("--keep", type=Path, help="folder in which logs and outputs are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        base, data = tiny_inputs(folder)
        findings = []
        for finding in check(folder, args.model_name_or_path or base, data):
            print(f"{'ok ' if finding.sound else 'NOT'} {finding.what}: {finding.found}", flush=True)
            findings.append(finding)
    if args.markdown:
        args.markdown.write_text(report(findings), encoding="utf-8")
    return 0 if all(finding.sound for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
