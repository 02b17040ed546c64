"""Do two trees of the package make the same bytes? Write them down before a change, compare after it.

    python scripts/checks/same_bytes.py write FILE          # on the tree before
    python scripts/checks/same_bytes.py compare FILE        # on the tree after: every difference; exit code 1 with any
    python scripts/checks/same_bytes.py compare FILE --only demo,methods/clair,flower

What is run, on a tiny Llama and generated records that are made here, each run with its own name:

    demo            `fedlora demo`
    methods         two rounds of each aggregation method; one of the five clients answers at random
    options         two rounds with evidence from other clients' losses; with differential privacy; with FedProx,
                    dropout, a sample of the clients, an epoch a round and further personal steps
    pipeline        dirmag with the pipeline fedlora_optimizer, its global stage on the clients and on the server
    classification  sequence classification: the head is trained and averaged too
    resume          two rounds in one go, and one round that is then resumed to two: both must leave the same bytes
    processes       one process, and two under torchrun (gloo, CPU): both must leave the same bytes
    flower          the package's ServerApp and ClientApp over a grid without a network

Only the command line and the two Flower apps are used, so that the script runs on any tree that has them
(small_runs.py).

Written down: the SHA-256 of every *.safetensors, adapter_config.json and run.json that a run leaves (global, clients/*,
rounds/*), and the run.json whole, so that a difference can be named. The bytes of a *.safetensors are hashed as they
are. From adapter_config.json the key peft_version is removed; from run.json "created", "versions", "command",
"scorings" and every "seconds", at any depth. In both the absolute path of the temporary folder of the runs, if it
occurs, is replaced by "." (the runs themselves are given relative paths), and what is left is hashed as JSON with
sorted keys. Nothing else is removed. README.md, reports and the files beside clients' updates are not looked at.

Floating point gives the same bits on the same kind of processor with the same libraries; FILE names both, and `compare`
says so when they are others. Everything runs on one thread.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import base64
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from small_runs import TWINS, make_inputs, runs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "Agg",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "flwr")
REMOVED = {
    "run.json": {"created", "versions", "command", "scorings", "seconds"},
    "adapter_config.json": {"peft_version"},
}


def collected(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """({file: SHA-256}, {file: content of a run.json}) of the run in the folder `name`, what is removed left out."""
    hashes, records = {}, {}
    for path in sorted(Path(name).rglob("*")):
        file = path.relative_to(name).as_posix()
        if path.suffix == ".safetensors":
            hashes[file] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in REMOVED:
            text = path.read_text(encoding="utf-8").replace(os.getcwd(), ".")
            content = without(json.loads(text), REMOVED[path.name])
            hashes[file] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            if path.name == "run.json":
                records[file] = content
    if not hashes:
        raise SystemExit(f"{name}: the run left no adapter and no record")
    return hashes, records


def without(value: Any, names: set[str]) -> Any:
    """JSON without the keys of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key path, value) of everything in some JSON that is no object or list, or an empty one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield path, value
    for key, item in inner:
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two contents of a FILE, in the runs that both have: a line each."""
    found = []
    for run in sorted(set(before["files"]) & set(after["files"])):
        old, new = before["files"][run], after["files"][run]
        for file in sorted(set(old) | set(new)):
            if old.get(file) == new.get(file):
                continue
            if file not in old or file not in new:
                found.append(f"{run}/{file}: {'new' if file in new else 'missing'}")
            elif file in before["records"].get(run, {}):
                pair = (dict(leaves(side["records"][run][file])) for side in (before, after))
                found += [f"{run}/{file}: {line}" for line in changed_leaves(*pair)]
            else:
                found.append(f"{run}/{file}: other bytes")
    return found


def changed_leaves(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key path: old -> new` of each leaf that differs."""
    shown = [{path: json.dumps(value)[:60] for path, value in side.items()} for side in (old, new)]
    missing = object()
    paths = [path for path in sorted(set(old) | set(new)) if old.get(path, missing) != new.get(path, missing)]
    return [f"{path}: {shown[0].get(path, 'absent')} -> {shown[1].get(path, 'absent')}" for path in paths]


def unlike_twins(files: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Adapters that differ between two runs that must leave the same."""
    found = []
    for one, other in TWINS:
        if one in files and other in files:
            mine, theirs = ({f: h for f, h in files[n].items() if f.endswith(".safetensors")} for n in (one, other))
            names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            found += [f"{name}: differs between {one} and {other}" for name in names]
    return found


def where() -> dict[str, str]:
    """What else moves bits: the processor's kind, and versions."""
    names = (
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    found = {"processor": next(names, platform.machine()), "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


def make(only: Sequence[str]) -> dict[str, Any]:
    """Run what `only` names (parts or single runs; all if empty) in a temporary folder: the content of a FILE."""
    every = runs()
    if unknown := sorted(set(only) - {part for name in every for part in (name, name.split("/")[0])}):
        raise SystemExit(
            f"--only {unknown[0]}: is no run and no part of the runs {', '.join(every)}; name one of these"
        )
    jobs = {name: job for name, job in every.items() if not only or {name, name.split("/")[0]} & set(only)}
    files, records, folder, back = {}, {}, tempfile.mkdtemp(), os.getcwd()
    os.chdir(folder)
    try:
        make_inputs()
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            files[name], records[name] = collected(name)
            print(f"{name}: {len(files[name])} files, {time.perf_counter() - began:.1f} s", flush=True)
    finally:
        os.chdir(back)
        shutil.rmtree(folder)
    return {"where": where(), "files": files, "records": records}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="parts or single runs, with commas between them; default all")
    args = parser.parse_args(arguments)
    only = [name for name in args.only.split(",") if name]
    before = load(args.file) if args.action == "compare" else None
    after = make(only)
    problems = unlike_twins(after["files"])
    if before is None:
        save(args.file, after)
    else:
        for line in changed_leaves(before["where"], after["where"]):
            print(f"note: {line}; bits may differ for that reason")
        problems += differences(before, after)
        alone = set(after["files"]) - set(before["files"])
        alone |= set() if only else set(before["files"]) - set(after["files"])
        problems += [f"{name}: this run is in one of the two only" for name in sorted(alone)]
    print(
        "\n".join(problems)
        or f"{sum(map(len, after['files'].values()))} files: {'written down' if before is None else 'no difference'}"
    )
    return int(bool(problems))


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Hashes as text, that a diff can show; the records packed, as there is much repetition among them."""
    packed = base64.b85encode(lzma.compress(json.dumps(content["records"], sort_keys=True).encode())).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [packed[start : start + 116] for start in range(0, len(packed), 116)]
    path.write_text(json.dumps({**content, "records": lines}, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """The content of a FILE."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    packed = base64.b85decode("".join(content["records"]))
    return content | {"records": json.loads(lzma.decompress(packed))}


def prepare() -> None:
    """One thread, no network, this tree; and everything imported that the forks need."""
    os.environ |= ENVIRONMENT
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.path.insert(0, str(ROOT))
    import matplotlib.figure  # noqa: F401

    import fedlora_hf

    fedlora_hf.FederatedTrainer  # noqa: B018  # loaded when it is asked for
    print(f"package: {Path(fedlora_hf.__file__).parent}", flush=True)


if __name__ == "__main__":
    prepare()
    raise SystemExit(main())
