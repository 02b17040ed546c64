"""Records what each command prints, for docs/recordings: python scripts/record_terminal.py [--only NAME ...]

The story is the tutorial's: three firms' files, one YAML file, a run, and what is done with it. It is told in a new
temporary folder, on a base that is made on the spot, so that nothing is downloaded. Times, dates and this machine's
paths are replaced; all else stands as it was printed, standard output and errors together.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
RECORDINGS = PROJECT / "docs" / "recordings"
BLOCK = re.compile(r"^<!-- runs: (\w+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASE = (
    "make_base_model.py --data data/north.jsonl --data data/south.jsonl --data data/west.jsonl --steps 200 --hidden 64 "
    "--layers 2 --heads 4 --vocab_size 400 --max_length 128 --context_length 256 --output_dir base"
)
# What differs from the tutorial's YAML: the base, and that there is no GPU.
CHANGES = {"model_name_or_path": "base", "use_cpu": "true", "learning_rate": "5.0e-3", "report_answers": "1"}
QUESTION = "Ticket 99: the customer asks about a parcel."


@dataclass(frozen=True)
class Scene:
    """One recording. command: as typed in the story's folder; code: the exit code it has to have."""

    name: str
    command: str
    about: str
    code: int = 0


STORY = (
    Scene("help", "fedlora --help", "the commands, by what you want"),
    Scene("methods", "fedlora methods clair", "one aggregation method, its options and its source"),
    Scene("preview", "fedlora preview --config run.yaml --examples 1", "examples as the model will see them"),
    Scene("train", "fedlora train --config run.yaml", "three rounds, and what each client gained"),
    Scene("typo", "fedlora train --config run.yaml --lerning_rate 1e-3", "a mistake is one line and exit code 2", 2),
    Scene("report", "fedlora report out", "the report again, from run.json"),
    Scene("ask", f'fedlora ask out --all --max_new_tokens 24 "{QUESTION}"', "base, global and personal answers"),
    Scene("evaluate", "fedlora evaluate out --dataset data/south.jsonl --all --use_cpu", "metrics on other data"),
    Scene("merge", "fedlora merge out --output_dir merged", "base and adapter as one model folder"),
    Scene(
        "aggregate",
        "fedlora aggregate out/clients/north out/clients/south out/clients/west --output_dir combined "
        "--dataset data/north.jsonl data/south.jsonl data/west.jsonl --use_cpu",
        "adapters from anywhere, combined and measured",
    ),
    Scene("push", "fedlora push out --repo_id you/firms", "without a network: what it says", 2),
)
# Remarks and bars of libraries, which depend on what else is installed.
NOISE = re.compile(
    r"^.*(?:real_accelerator\.py|Warning|warnings\.warn|kernels-community|Writing model shards|Loading weights).*\n",
    re.MULTILINE,
)


def prepare(folder: Path) -> None:
    """Files, YAML and base of the story, the first two out of docs/tutorial.md."""
    blocks = dict(BLOCK.findall((PROJECT / "docs" / "tutorial.md").read_text(encoding="utf-8")))
    (folder / "files.py").write_text(blocks["files"], encoding="utf-8")
    run([sys.executable, "files.py"], folder)
    lines = [line for line in blocks["yaml"].splitlines() if line.split(":")[0] not in CHANGES]
    lines += [f"{name}: {value}" for name, value in CHANGES.items()]
    (folder / "run.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    script, *flags = shlex.split(BASE)
    run([sys.executable, str(PROJECT / "scripts" / script), *flags], folder)


def run(words: Sequence[str], folder: Path, code: int = 0) -> str:
    """What a command prints; RuntimeError when it ends otherwise than expected."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "110",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != code:
        raise RuntimeError(f"{shlex.join(words)}: exit code {done.returncode}, not {code}\n{done.stdout[-2000:]}")
    return done.stdout


def normalised(text: str, folder: Path) -> str:
    """Without what differs from run to run, or from machine to machine."""
    for place in sorted({str(folder), str(folder.resolve())}, key=len, reverse=True):
        text = text.replace(place, "/home/you")
    text = NOISE.sub("", text)
    text = re.sub(r"\b\d+\.\d s\b", "#.# s", text)
    text = re.sub(r"\b\d+(?:\.\d)? % of its time\b", "# % of its time", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*", "(date)", text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def record(scene: Scene, folder: Path) -> str:
    """The text of a recording."""
    words = shlex.split(scene.command)
    printed = run([sys.executable, "-m", "fedlora_hf", *words[1:]], folder, scene.code)
    ending = f"(exit code {scene.code})\n" if scene.code else ""
    return f"$ {scene.command}\n{normalised(printed, folder)}{ending}"


def index(story: Iterable[Scene] = STORY) -> str:
    """docs/recordings/README.md."""
    rows = "\n".join(f"| [{s.name}]({s.name}.txt) | `{s.command}` | {s.about} |" for s in story)
    return (
        "# What each command prints\n\n"
        "Recorded by `python scripts/record_terminal.py`, in one folder and in this order, with the files of "
        "[the tutorial](../tutorial.md) and a base that the script makes (so the answers are poor: it has two layers). "
        "CPU, one thread, seed 0. Times, dates and paths of the machine are replaced. "
        "What `fedlora demo` prints stands in the [README](../../README.md#two-commands).\n\n"
        f"| recording | command | what it shows |\n|---|---|---|\n{rows}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Record; 0 when every command ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[scene.name for scene in STORY], help="write only these")
    args = parser.parse_args(arguments)
    RECORDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for scene in STORY:
            needed = not args.only or scene.name in args.only or scene.name == "train"
            if needed:
                text = record(scene, folder)
            if needed and (not args.only or scene.name in args.only):
                (RECORDINGS / f"{scene.name}.txt").write_text(text, encoding="utf-8")
                print(f"{scene.name}: {len(text.splitlines())} lines", flush=True)
    (RECORDINGS / "README.md").write_text(index(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
