"""Takes every measured result of docs/ again: each experiment and benchmark with its real command, one after the other.

    python scripts/results.py --list --data DATA                # what would run, how long it takes, what is done
    python scripts/results.py --data DATA --cache CACHE         # all of it; run again, it goes on where it was
    python scripts/results.py --data DATA --cache CACHE --only attacks flags
    python scripts/results.py --data DATA --compare noise       # one step again, elsewhere: what would differ?

DATA holds dolly/databricks-dolly-15k.jsonl and natural_instructions/, and base-7m/ where you have it. CACHE keeps the
base model, trained updates and a note of every finished step; a step that changed its command, or whose note is
deleted, runs again. Steps that need what is not there (a GPU, an encoder, two cores) are left out and said to be.
Minutes are of one idle 2 GHz core, or of the GPU, and rough. Tables and figures are written in place, by the scripts;
the words around them are a person's. --compare runs a step in a temporary copy, leaves docs/ alone, and says which
numbers differ by more than --tolerance.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: what is beside it is found through the project's folder
    sys.path.insert(0, str(PROJECT))
from scripts.comparing import compared  # noqa: E402
from scripts.steps import STEPS, Step  # noqa: E402


def filled(step: Step, args: argparse.Namespace) -> str:
    """The command with this machine's folders in it."""
    places = {"data": args.data or "DATA", "cache": args.cache, "encoder": args.encoder or "ENCODER"}
    return step.command.format(**places, base=_base(args), base_7m=_base_7m(args), smollm2=_smollm2(args))


def _base(args: argparse.Namespace) -> Path:
    return Path(args.base or args.cache / "base")


def _base_7m(args: argparse.Namespace) -> Path:
    return Path(args.base_7m or (args.data or Path("DATA")) / "base-7m")


def _smollm2(args: argparse.Namespace) -> Path:
    return Path(args.smollm2 or args.cache / "smollm2")


def missing(step: Step, args: argparse.Namespace) -> str | None:
    """What a step needs and cannot have, in words; None when it can run."""
    here: dict[str, Callable[[], bool]] = {
        "data": lambda: args.data is not None and (args.data / "dolly").is_dir(),
        "base": lambda: _base(args).is_dir() or args.data is not None,  # the step `base` makes it
        "base_7m": lambda: _base_7m(args).is_dir(),
        "smollm2": lambda: _smollm2(args).is_dir() or find_spec("gguf") is not None,  # the step `smollm2` makes it
        "gguf": lambda: find_spec("gguf") is not None,
        "encoder": lambda: args.encoder is not None and args.encoder.is_dir(),
        "gpu": _has_gpu,
    }
    lacking = [name for name in step.needs if not here[name]()]
    return f"needs {', '.join(lacking)}" if lacking else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def state(step: Step, args: argparse.Namespace) -> str:
    """ "done", "needs ...", or "to do"."""
    note = args.cache / "done" / step.name
    if note.is_file() and note.read_text() == filled(step, args):
        return "done"
    return missing(step, args) or "to do"


def executed(command: str, folder: Path) -> int:
    """Run a command in `folder`, whose packages it imports; its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    return subprocess.run(words, cwd=folder, env=environment, check=False).returncode


def run(step: Step, args: argparse.Namespace) -> int:
    """Run one step in the project's folder; noted when it ends well. Its exit code."""
    command = filled(step, args)
    code = executed(command, PROJECT)
    if code == 0:
        note = args.cache / "done" / step.name
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(command)
    return code


def compare(step: Step, args: argparse.Namespace) -> int:
    """Run one step in a temporary copy, with a cache of its own, and print what differs; 1 when something does."""
    if lack := missing(step, args):
        print(f"{step.name}: {lack}")
        return 1
    args.base, args.smollm2 = _base(args), _smollm2(args)  # bases are not made again
    with tempfile.TemporaryDirectory() as place:
        args.cache = Path(place) / "cache"
        command = filled(step, args)
        print(f"== {step.name}: {command}", flush=True)
        found = compared(PROJECT, Path(place) / "project", lambda copy: executed(command, copy), args.tolerance)
    print("\n".join(found) if found else f"{step.name}: the same within {args.tolerance:g}")
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """List or run; 1 when a step failed (the others run all the same)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps], help="these steps")
    parser.add_argument("--data", type=Path, help="folder of the published datasets")
    parser.add_argument("--encoder", type=Path, help="folder with all-MiniLM-L6-v2")
    parser.add_argument("--base", type=Path, help="a base model made before (default: made in the cache)")
    parser.add_argument("--base_7m", type=Path, help="folder of base-7m (default: DATA/base-7m)")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct (default: made in the cache)")
    parser.add_argument("--cache", type=Path, default=Path("results_cache"), help="default: %(default)s")
    parser.add_argument("--compare", choices=[step.name for step in steps], help="run this step elsewhere and compare")
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative, of --compare; default: %(default)s")
    args = parser.parse_args(arguments)
    for name in ("data", "encoder", "base", "base_7m", "smollm2", "cache"):
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    if args.compare:
        return compare(next(step for step in steps if step.name == args.compare), args)
    chosen = [step for step in steps if not args.only or step.name in args.only]
    states = {step.name: state(step, args) for step in chosen}
    for step in chosen:
        print(f"{step.name:20} {step.minutes:4g} min  {states[step.name]:16} {filled(step, args)}")
    to_do = [step for step in chosen if states[step.name] == "to do"]
    print(f"{len(to_do)} of {len(chosen)} steps to do, about {sum(step.minutes for step in to_do):g} minutes")
    if args.list:
        return 0
    failed = []
    for step in to_do:
        print(f"\n== {step.name}: {filled(step, args)}", flush=True)
        began, code = time.monotonic(), run(step, args)
        print(
            f"== {step.name}: {'done' if code == 0 else f'failed ({code})'}, {(time.monotonic() - began) / 60:.1f} min"
        )
        failed += [step.name] if code else []
    print(
        f"failed: {', '.join(failed)}"
        if failed
        else "all done; python scripts/update_readme.py renews docs/choosing.md"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
