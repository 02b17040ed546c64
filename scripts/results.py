"""Takes every measured result of docs/ again: each experiment and benchmark with its real command, one after the other.

    python scripts/results.py --list --data DATA                # what would run, how long it takes, what is done
    python scripts/results.py --data DATA --cache CACHE         # all of it; run again, it goes on where it was
    python scripts/results.py --data DATA --cache CACHE --only attacks flags

DATA holds dolly/databricks-dolly-15k.jsonl and natural_instructions/. CACHE keeps the base model, trained updates and a
note of every finished step; a step that changed its command, or whose note is deleted, runs again. Steps that need what
is not there (a GPU, an encoder, two cores) are left out and said to be. Minutes are of one idle 2 GHz core, or of the
GPU, and rough. Tables and figures are written in place, by the scripts; the words around them are a person's.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
PROJECT = SCRIPTS.parent


@dataclass(frozen=True)
class Step:
    """command: as typed in the project's folder, with {data}, {cache}, {base} and {encoder} to be filled in.
    minutes: about how long. needs: of "data", "base", "encoder", "gpu". page: where the results stand in docs/."""

    name: str
    command: str
    minutes: float
    page: str
    needs: tuple[str, ...] = ()


_SYNTHETIC = "python -m scripts.experiments.{} --seed 0 --seeds 3"
_ATTACKS = "python -m scripts.experiments.attacks --cache {cache}/attacks"
_CLAIR = "python -m scripts.benchmarks.clair"
_DIRMAG = "python -m scripts.benchmarks.dirmag --repeats 21"
_REAL = (
    "--model {base} --dolly {data}/dolly/databricks-dolly-15k.jsonl --natural_instructions {data}/natural_instructions"
)
STEPS = (
    Step("recovery", _SYNTHETIC.format("recovery"), 1, "results/recovery/README.md"),
    Step("noise", _SYNTHETIC.format("noise"), 1, "results/noise/README.md"),
    Step("phase", _SYNTHETIC.format("phase"), 5, "results/phase/README.md"),
    Step("oracle_gain", _SYNTHETIC.format("oracle_gain"), 1, "results/oracle_gain/README.md"),
    Step(
        "flags",
        "python -m scripts.experiments.calibrate_flags --set held-out --honest 240",
        4,
        "results/flags/README.md",
    ),
    Step(
        "flags_tuning",
        "python -m scripts.experiments.calibrate_flags --set tuning --honest 100",
        3,
        "results/flags/README.md",
    ),
    Step(
        "flags_heavy_tails",
        'python -m scripts.experiments.calibrate_flags --set held-out --families "heavy-tailed norms" --honest 800 '
        "--seed 20000 --name heavy_tails",
        1,
        "results/flags/README.md",
    ),
    Step(
        "flags_dirichlet",
        'python -m scripts.experiments.calibrate_flags --set tuning --families "Dirichlet 0.1" --clients 8 12 20 '
        "--honest 800 --seed 20000 --name dirichlet",
        1,
        "results/flags/README.md",
    ),
    Step("attacks_tuning", f"{_ATTACKS} --tune", 2, "results/attacks/README.md"),
    Step("attacks", _ATTACKS, 15, "results/attacks/README.md"),
    Step(
        "attack_evidence",
        "python -m scripts.experiments.attack_evidence --cache {cache}/attacks",
        2,
        "results/attacks/README.md",
    ),
    Step("groups", "python -m scripts.experiments.groups --seed 0 --seeds 10", 3, "results/groups/README.md"),
    Step(
        "groups_trained",
        "python -m scripts.experiments.groups_trained --base {base} --data {data} --seeds 3 "
        '--settings natural_instructions dolly "natural_instructions, dirichlet"',
        8,
        "results/groups/README.md",
        ("data", "base"),
    ),
    Step("influence_cost", _SYNTHETIC.format("influence_cost"), 1, "results/influence/README.md"),
    Step(
        "influence",
        "python -m scripts.experiments.influence --cache {cache}/attacks",
        30,
        "results/influence/README.md",
    ),
    Step(
        "influence_report",
        "python -m scripts.experiments.influence --cache {cache}/attacks --report",
        1,
        "results/influence/README.md",
    ),
    Step("judges", "python -m scripts.experiments.judges --cache {cache}/attacks", 20, "results/judges/README.md"),
    Step(
        "judges_report",
        "python -m scripts.experiments.judges --cache {cache}/attacks --report",
        1,
        "results/judges/README.md",
    ),
    Step(
        "judges_rounds",
        "python -m scripts.experiments.rounds --seed 10 --seeds 3 --regimes scarce --methods clair 'clair, functional' "
        "--cache {cache}/attacks --output_dir docs/results/judges/rounds",
        15,
        "results/judges/README.md",
    ),
    Step(
        "rounds",
        "python -m scripts.experiments.rounds --seeds 4 --cache {cache}/attacks",
        60,
        "results/rounds/README.md",
    ),
    *(
        Step(
            f"demo_{seed}",
            f"python -m fedlora_hf demo --seed {seed} --output_dir {{cache}}/demo_{seed}",
            1,
            "results.md",
        )
        for seed in range(3)
    ),
    Step(
        "privacy_cost",
        "python -m scripts.experiments.privacy_cost --output_dir docs/results/privacy --seeds 0 1 2",
        15,
        "results/privacy/README.md",
    ),
    Step(
        "base",
        "python scripts/make_base_model.py --data {data}/dolly/databricks-dolly-15k.jsonl "
        "--data {data}/natural_instructions --hidden 128 --heads 4 --minutes 13 --holdout_fraction 0.5 "
        "--output_dir {base}",
        13,
        "results/validity_map/README.md",
        ("data",),
    ),
    Step(
        "validity_map",
        "python -m scripts.experiments.validity_map --base {base} --data {data} --cache {cache}/map "
        "--encoder {encoder} --seeds 5 --judges 5 15",
        120,
        "results/validity_map/README.md",
        ("data", "base", "encoder"),
    ),
    Step(
        "sensitivity",
        f"python -m scripts.experiments.sensitivity {_REAL} --held_out_half --cache {{cache}}/sensitivity "
        "--output_dir docs/results/sensitivity",
        60,
        "results/sensitivity/README.md",
        ("data", "base"),
    ),
    Step(
        "pipeline_comparison",
        f"python -m scripts.experiments.pipeline_comparison {_REAL} --held_out_half --cache {{cache}}/pipeline "
        "--output_dir docs/results/pipeline",
        180,
        "results/pipeline/README.md",
        ("data", "base"),
    ),
    Step(
        "methods_table",
        "python -m scripts.experiments.methods_table --base {base} --data {data}/natural_instructions/tasks --seeds 3",
        30,
        "results/methods/README.md",
        ("data", "base"),
    ),
    Step(
        "methods_rounds",
        "python -m scripts.experiments.methods_rounds --base {base} --data {data}/natural_instructions/tasks --seeds 3",
        30,
        "results/methods/README.md",
        ("data", "base"),
    ),
    Step(
        "round",
        "python -m scripts.benchmarks.round --hidden 256 --clients 5 --repeats 4 --rounds 1 "
        "--csv docs/benchmarks/round_1_thread.csv",
        3,
        "benchmarks.md",
    ),
    Step(
        "round_8x128",
        "python -m scripts.benchmarks.round --hidden 256 --batch 8 --tokens 128 --clients 4 --repeats 4 --rounds 1 "
        "--csv docs/benchmarks/round_8x128.csv",
        5,
        "benchmarks.md",
    ),
    Step(
        "memory",
        "python -m scripts.benchmarks.round --memory --hidden 256 --layers 8 --rank 16 --rounds 1 "
        "--csv docs/benchmarks/memory.csv",
        5,
        "benchmarks.md",
    ),
    Step("clair", f"{_CLAIR} --modules 4 --repeats 3 --csv docs/bench_clair.csv", 1, "bench_clair.md"),
    Step("clair_64", f"{_CLAIR} --modules 64 --csv docs/bench_clair_64.csv", 5, "bench_clair.md"),
    Step("clair_many", f"{_CLAIR} --out_of_core 1000 --modules 64 --size 1024 --rank 8", 5, "bench_clair.md"),
    Step(
        "clair_disk",
        f"{_CLAIR} --out_of_core 100 300 1000 3000 10000 --modules 1 --size 1024 --rank 8 "
        "--csv docs/bench_clair_disk.csv",
        10,
        "bench_clair.md",
    ),
    Step(
        "clair_figure",
        f"{_CLAIR} --tables docs/bench_clair_disk.csv --figure docs/figures/bench_clair_disk.png",
        1,
        "bench_clair.md",
    ),
    Step("dirmag_512", f"{_DIRMAG} --hidden 512 --seq 128 --batch 4", 3, "direction_magnitude.md"),
    Step("dirmag_1024", f"{_DIRMAG} --hidden 1024 --seq 128 --batch 4 --layers 1", 4, "direction_magnitude.md"),
    Step("dirmag_one", f"{_DIRMAG} --hidden 512 --seq 128 --batch 1", 1, "direction_magnitude.md"),
    Step("dirmag_short", f"{_DIRMAG} --hidden 512 --seq 32 --batch 1 --steps 8", 2, "direction_magnitude.md"),
    Step(
        "gpu",
        "python -m scripts.benchmarks.gpu --cache {cache}/gpu --csv docs/benchmarks/gpu.csv",
        8,
        "benchmarks.md",
        ("gpu",),
    ),
    Step(
        "processes", "python -m scripts.benchmarks.processes --csv docs/benchmarks/processes.csv", 10, "benchmarks.md"
    ),
    Step("scaling", "python -m scripts.benchmarks.scaling --csv docs/benchmarks/scaling.csv", 15, "benchmarks.md"),
    Step("data_records", "python -m scripts.benchmarks.data records", 3, "benchmarks.md"),
    Step(
        "data_packing",
        "python -m scripts.benchmarks.data packing --model {base} --data {data}/dolly/databricks-dolly-15k.jsonl",
        3,
        "benchmarks.md",
        ("data", "base"),
    ),
    Step("start", "python -m scripts.benchmarks.start --csv docs/benchmarks/start.csv", 2, "benchmarks.md"),
    Step("scoring", "python -m scripts.benchmarks.scoring --csv docs/benchmarks/scoring.csv", 2, "benchmarks.md"),
    Step("lockstep", "python -m scripts.benchmarks.lockstep --csv docs/benchmarks/lockstep.csv", 2, "benchmarks.md"),
    Step("engines", "python -m scripts.benchmarks.engines --csv docs/benchmarks/engines.csv", 10, "benchmarks.md"),
    Step(
        "deployment",
        "python -m scripts.checks.deployment_check --model_name_or_path {base} --markdown docs/deployment_check.md",
        10,
        "deployment_check.md",
        ("base",),
    ),
    Step("chaos", "python -m scripts.checks.chaos --kills 30 --seed 0 --output_dir {cache}/chaos", 20, "results.md"),
    Step(
        "long_run",
        "python -m scripts.checks.long_run --rounds 200 --clients 8 --csv docs/long_run.csv "
        "--output_dir {cache}/long_run",
        20,
        "results.md",
    ),
    Step(
        "many_clients",
        "python -m scripts.checks.long_run --rounds 2 --clients 1000 --csv docs/many_clients.csv "
        "--output_dir {cache}/many_clients",
        20,
        "results.md",
    ),
)


def filled(step: Step, args: argparse.Namespace) -> str:
    """The command with this machine's folders in it."""
    base = args.base or args.cache / "base"
    return step.command.format(data=args.data or "DATA", cache=args.cache, base=base, encoder=args.encoder or "ENCODER")


def missing(step: Step, args: argparse.Namespace) -> str | None:
    """What a step needs and cannot have, in words; None when it can run."""
    here: dict[str, Callable[[], bool]] = {
        "data": lambda: args.data is not None and (args.data / "dolly").is_dir(),
        "base": lambda: (
            (args.base or args.cache / "base").is_dir() or args.data is not None
        ),  # the step `base` makes it
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


def run(step: Step, args: argparse.Namespace) -> int:
    """Run one step in the project's folder; noted when it ends well. Its exit code."""
    command = filled(step, args)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    code = subprocess.run(words, cwd=PROJECT, env=environment, check=False).returncode
    if code == 0:
        note = args.cache / "done" / step.name
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(command)
    return code


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """List or run; 1 when a step failed (the others run all the same)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps], help="these steps")
    parser.add_argument("--data", type=Path, help="folder of the published datasets")
    parser.add_argument("--encoder", type=Path, help="folder with all-MiniLM-L6-v2")
    parser.add_argument("--base", type=Path, help="a base model made before (default: made in the cache)")
    parser.add_argument("--cache", type=Path, default=Path("results_cache"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    for name in ("data", "encoder", "base", "cache"):
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
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
