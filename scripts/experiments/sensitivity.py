"""How far magnitudes and directions of A and B move between tasks and in training (arXiv 2510.11274).

    python -m scripts.experiments.sensitivity --model BASE --dolly databricks-dolly-15k.jsonl \
        --natural_instructions FOLDER --held_out_half --cache CACHE --output_dir docs/results/sensitivity

Every client trains plain LoRA for --steps from a start (--starts); snapshots are compared with those of other clients
and with its own first one; seeds that are in deltas.csv are not run again. Further flags are those of `fedlora train`
(--learning_rate, --max_length, --bf16 ...).

For two matrices with rows (or columns) of norm m_i, m_i' and direction d_i, d_i':

    delta_D = mean_i (1 - cos(d_i, d_i'))      delta_M = mean_i |m_i - m_i'|

and, since A and B have different sizes, delta_M relative to the mean of all m_i and m_i'.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import itertools
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fedlora_hf.adapter.slot import AdapterSlot
from fedlora_hf.config import FederatedConfig
from fedlora_hf.flags import parse
from fedlora_hf.loading import limited, load_base
from fedlora_hf.numerics.direction import Axis, component_change, split
from fedlora_hf.training.stages import FACTORS, Stage, StageName
from fedlora_hf.update import AdapterState, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts.common import environment
from scripts.experiments.pipeline_comparison import Measured
from scripts.experiments.pipeline_comparison_data import Source, add_data_flags, sources
from scripts.experiments.real_cells import Table
from scripts.experiments.sensitivity_report import Row, write_report

# Where clients start: from one fresh adapter, each from a fresh one of its own, from one that is federated already.
STARTS = ("fresh", "fresh, own", "federated")
AXES: tuple[Axis, ...] = ("row", "column")
Snapshots = dict[int, AdapterState]


class Recorder(TrainerCallback):
    """Keeps the adapter as it stands after the wanted steps."""

    def __init__(self, slot: AdapterSlot, wanted: Sequence[int]) -> None:
        self.slot, self.wanted, self.step = slot, frozenset(wanted), 0
        self.taken: Snapshots = {}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        if self.step in self.wanted:
            self.taken[self.step] = self.slot.read()


def snapshots(trainer: Measured, client: str, start: AdapterState, wanted: Sequence[int], rate: float) -> Snapshots:
    """{step: adapter} of one client's training from `start`."""
    recorder = Recorder(trainer.slot, wanted)
    trainer.slot.write(start)
    trainer.add_callback(recorder)
    stage = Stage(StageName.PERSONAL, FACTORS, rate)
    seed = derive_seed(trainer.args.seed, "sensitivity", client)
    trainer.train_from(start, client, trainer.clients[client], stage, seed, steps=max(wanted))
    trainer.remove_callback(recorder)
    return recorder.taken


def starts(trainer: Measured, kind: str) -> dict[str, AdapterState]:
    """{client: the adapter it starts from}."""
    if kind == "fresh, own":
        return {client: drawn_anew(trainer.initial, trainer.args.seed, client) for client in trainer.clients}
    return dict.fromkeys(trainer.clients, trainer.initial if kind == "fresh" else trainer.run.state)


def drawn_anew(initial: AdapterState, seed: int, client: str) -> AdapterState:
    """`initial` with A drawn by PEFT's rule (Kaiming uniform, a = sqrt 5) from a seed of the client's own."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "own start", client))
    factors = {
        module: LoraFactors(
            torch.nn.init.kaiming_uniform_(torch.empty_like(f.A), a=math.sqrt(5), generator=generator), f.B, f.scale
        )
        for module, f in initial.items()
    }
    return AdapterState(factors, initial.extras)


def deltas(first: Tensor, second: Tensor, axis: Axis) -> dict[str, float]:
    """delta_D, and delta_M absolute and relative, of one factor."""
    turn, stretch = component_change(first, second, axis)
    size = float(split(first, axis).magnitude.mean() + split(second, axis).magnitude.mean()) / 2
    return {"direction": turn, "magnitude": stretch, "relative": stretch / size if size else 0.0}


def compared(pairs: Sequence[tuple[AdapterState, AdapterState]], axes: Sequence[Axis]) -> Iterator[Row]:
    """One row for each module, factor and axis: means over the pairs."""
    for module, factor, axis in itertools.product(pairs[0][0], FACTORS, axes):
        found = [deltas(getattr(a[module], factor), getattr(b[module], factor), axis) for a, b in pairs]
        means = {name: float(f"{statistics.fmean(item[name] for item in found):.5g}") for name in found[0]}
        yield {"module": module, "factor": factor, "axis": axis, **means}


def observed(taken: Mapping[str, Snapshots]) -> Iterator[Row]:
    """Rows of one start: between clients at every snapshot, and of each client against its own first snapshot."""
    steps = sorted(next(iter(taken.values())))
    for step in steps:
        axes = AXES if step == steps[-1] else AXES[:1]
        clients = list(itertools.combinations([snapshot[step] for snapshot in taken.values()], 2))
        yield from ({"between": "clients", "step": step, **row} for row in compared(clients, axes))
        if step > steps[0]:
            own = [(snapshot[steps[0]], snapshot[step]) for snapshot in taken.values()]
            yield from ({"between": "steps", "step": step, **row} for row in compared(own, axes))


def study(source: Source, options: FederatedConfig, args: argparse.Namespace) -> Iterator[Row]:
    """All rows of one dataset and seed."""
    rate = options.learning_rate if args.client_rate is None else args.client_rate
    model, tokenizer, max_length = load_base(options, None)
    options = limited(options, max_length)
    shutil.rmtree(options.output_dir, ignore_errors=True)  # the cell before this one, which no record calls a run
    trainer = Measured(model, options, source.clients(options, options.seed), processing_class=tokenizer)
    trainer.train()
    for kind in args.starts:
        begin = starts(trainer, kind)
        taken = {client: snapshots(trainer, client, start, args.steps, rate) for client, start in begin.items()}
        yield from ({"data": source.name, "seed": options.seed, "start": kind, **row} for row in observed(taken))


def settings(args: argparse.Namespace) -> list[Source]:
    """The datasets and, if asked, Dolly dealt out at random: clients that differ in nothing but their examples."""
    found = sources(args)
    dealt = {"name": "dolly, iid", "partition_by": "iid", "groups": None, "num_clients": args.groups}
    return [*found, *(replace(source, **dealt) for source in found if args.iid and source.name == "dolly")]


def config(args: argparse.Namespace, rest: Sequence[str], seed: int) -> FederatedConfig:
    """The options of a run whose rounds make the federated start."""
    flags = ["--generation_examples", "0", "--disable_tqdm", "true", "--report_to", "none", "--learning_rate", "5e-3"]
    flags += ["--aggregation", "fedavg", "--num_rounds", "5", "--local_steps", "8", *rest]
    flags += ["--model_name_or_path", args.model, "--seed", str(seed), "--output_dir", str(args.cache / "run")]
    return parse(flags)


def arguments(given: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 10, 20, 40], help="when snapshots are taken")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="what clients start from")
    parser.add_argument(
        "--client_rate",
        type=float,
        help="learning rate of the compared clients; default that of the "
        "rounds that make the federated start (--learning_rate)",
    )
    parser.add_argument("--iid", action="store_true", help="also Dolly dealt out at random")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the run in progress")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the tables and figures")
    args, rest = parser.parse_known_args(given)
    if len(set(args.steps)) < 2 or min(args.steps) < 1:
        parser.error(f"--steps {args.steps}: must be two or more different steps from 1 on")
    return args, rest


def main(given: Sequence[str] | None = None) -> None:
    args, rest = arguments(given)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = Table(args.output_dir / "deltas.csv", ("data", "seed"))
    for seed in range(args.seed, args.seed + args.seeds):
        for source in settings(args):
            if not table.has(data=source.name, seed=seed):
                table.add(list(study(source, config(args, rest, seed), args)))
                print(f"seed {seed}, {source.name}: done", flush=True)
                gc.collect()  # a trainer and its model refer to each other
    write_report(args.output_dir, [{**row, "step": int(row["step"])} for row in table.rows], environment())


if __name__ == "__main__":
    main()
