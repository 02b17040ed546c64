"""Direction/magnitude pipeline against its baselines: global and local loss, equal steps, rates tuned alike.

    python -m scripts.experiments.pipeline_comparison --model BASE --dolly databricks-dolly-15k.jsonl \
        --natural_instructions FOLDER --held_out_half --cache CACHE

Further flags are those of `fedlora train` (--max_length, --lora_r, --bf16, --gradient_checkpointing ...). Each client
takes --total_steps in every method. A finished cell is a row of cells.csv and is not run again. The rate of a method is
chosen from --rates by the validation loss of the first seed, for the global and for the local number apart; the other
seeds run the chosen ones, and test examples have no say.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import gc
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora_hf.config import FederatedConfig
from fedlora_hf.flags import parse
from fedlora_hf.loading import limited, load_base
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.update import AdapterState
from scripts.common import environment
from scripts.experiments.pipeline_comparison_data import Source, add_data_flags, sources
from scripts.experiments.pipeline_comparison_report import KINDS, Row, choose, write_report

Flags = Callable[[int, int], list[str]]


def baseline(aggregation: str, *more: str) -> Flags:
    """All rounds federated; a client's personal adapter is its own update of the last round."""
    return lambda rounds, steps: ["--aggregation", aggregation, "--num_rounds", str(rounds), *more]


def pipeline(aggregation: str, *, shared: int = 1, own: int = 1) -> Flags:
    """Federated rounds, `shared` global rounds (A's direction), `own` times a round's steps on B's magnitude."""

    def flags(rounds: int, steps: int) -> list[str]:
        numbers = {"num_rounds": rounds - shared - own, "global_rounds": shared, "personal_steps": own * steps}
        given = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        return ["--pipeline", "fedlora_optimizer", "--aggregation", aggregation, *given]

    return flags


# {name: flags of (rounds, steps a round)}. The base model takes no steps at all.
METHODS: dict[str, Flags] = {
    "base": lambda rounds, steps: ["--aggregation", "fedavg", "--num_rounds", "0"],
    "local": baseline("local"),
    "fedavg": baseline("fedavg"),
    "product_mean": baseline("product_mean"),
    "ffa": baseline("ffa"),
    "fedsa": baseline("fedsa"),
    "dirmag_mean": baseline("dirmag_mean", "--adapter", "dirmag"),
    "without global stage": pipeline("dirmag_mean", shared=0),
    "without local stage": pipeline("dirmag_mean", own=0),
    "pipeline": pipeline("dirmag_mean"),
    "pipeline, product_mean": pipeline("product_mean"),
    "pipeline, clair": pipeline("clair"),
}


class Measured(FederatedTrainer):
    """A run that neither scores nor writes anything by itself: both are the experiment's."""

    def test_metrics(self, states: Mapping[str, AdapterState]) -> dict[str, dict[str, float]]:
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        return None

    def personal_stage(self, rate: float) -> dict[str, AdapterState]:
        """The personal adapters anew, with another learning rate of the personal steps; {client id: adapter}."""
        self.args.personal_learning_rate = rate
        self.loop.personalise()
        return self.run.personalised


def config(args: argparse.Namespace, rest: Sequence[str], method: str, rate: float, seed: int) -> FederatedConfig:
    """The options of one cell: the caller's, and over them the method's."""
    flags = ["--generation_examples", "0", "--disable_tqdm", "true", "--report_to", "none", *rest]
    flags += ["--model_name_or_path", args.model, "--local_steps", str(args.round_steps), "--learning_rate", str(rate)]
    flags += ["--personalise", "method", "--seed", str(seed), "--output_dir", str(args.cache / "run")]
    flags += METHODS[method](args.total_steps // args.round_steps, args.round_steps)
    if "--personal_steps" in flags and flags[flags.index("--personal_steps") + 1] != "0":
        flags += ["--personal_learning_rate", str(args.personal_rates[0])]
    return parse(flags)


def measured(source: Source, options: FederatedConfig, personal_rates: Sequence[float]) -> Iterator[Row]:
    """Train one cell; its losses, accuracies, bytes and time. One row for each rate of the personal steps, if any: they
    start from one and the same global adapter."""
    model, tokenizer, max_length = load_base(options, None)
    options = limited(options, max_length)
    shutil.rmtree(options.output_dir, ignore_errors=True)  # the cell before this one, which no record calls a run
    trainer = Measured(model, options, source.clients(options, options.seed), processing_class=tokenizer)
    began = time.perf_counter()
    trainer.train()
    seconds, run = time.perf_counter() - began, trainer.run
    sent = [sum(entry["bytes_up"].values()) / len(trainer.clients) for entry in run.record.rounds]
    facts: Row = {"clients": len(trainer.clients), "flagged": len(run.record.flagged), "bytes_up": round(sum(sent))}
    facts["seconds"] = round(seconds, 1)
    shared = dict.fromkeys(trainer.clients, run.state)
    of_all = _all_scores(trainer, "global", shared)
    for rate in personal_rates if options.personal_steps else [None]:
        own = run.personalised if rate in (None, personal_rates[0]) else trainer.personal_stage(rate)
        local = _all_scores(trainer, "local", {**shared, **own})
        yield {"personal_rate": "" if rate is None else rate, **of_all, **local, **facts}


def _all_scores(trainer: FederatedTrainer, kind: str, states: Mapping[str, AdapterState]) -> Row:
    row: Row = {}
    for split in ("validation", "test"):
        row |= {f"{kind}_{split}_{name}": value for name, value in scores(trainer, states, split).items()}
    return row


def scores(trainer: FederatedTrainer, states: Mapping[str, AdapterState], split: str) -> dict[str, float]:
    """Unweighted means over all clients of each one's adapter on its own split; ROUGE-L on test, where asked for."""
    found: list[dict[str, float]] = []
    for client, state in states.items():
        metrics = trainer.scorer.metrics(state, getattr(trainer.clients[client], split))
        if split == "test":
            metrics |= trainer.scorer.answers(state, trainer.clients[client].questions)
        found.append(metrics)
    names = [name for name in ("loss", "token_accuracy", "rouge_l") if all(name in metrics for metrics in found)]
    return {name: round(statistics.fmean(metrics[name] for metrics in found), 6) for name in names}


def rates(args: argparse.Namespace, rows: Sequence[Row], data: str, method: str, seed: int) -> list[float]:
    """The first seed tries the whole grid; the others run what its validation losses chose, at most two rates."""
    if method == "base" or seed == args.seed:
        return list(args.rates[: 1 if method == "base" else None])
    first = [row for row in rows if int(row["seed"]) == args.seed]
    own = [row for row in first if row["data"] == data and row["method"] == method]
    return sorted({choose(own, kind, args.personal_rates[0]).rate for kind in KINDS})


def run(args: argparse.Namespace, rest: Sequence[str]) -> list[Row]:
    """All rows, those of the file and those that were missing, each appended as it is done; seed after seed."""
    path = args.output_dir / "cells.csv"
    rows = read(path)
    done = {_key(row) for row in rows}
    seeds = range(args.seed, args.seed + args.seeds)
    for seed, source, method in itertools.product(seeds, sources(args), args.methods):
        for rate in rates(args, rows, source.name, method, seed):
            key: Row = {"data": source.name, "seed": seed, "method": method, "rate": rate}
            if _key(key) in done:
                continue
            options = config(args, rest, method, rate, seed)
            found = [key | row for row in measured(source, options, args.personal_rates)]
            append(path, found)
            rows += found
            print(*(" ".join(map(str, row.values())) for row in found), sep="\n", flush=True)
            gc.collect()  # a trainer and its model refer to each other
    return rows


def _key(row: Mapping[str, Any]) -> tuple[str, int, str, float]:
    return str(row["data"]), int(row["seed"]), str(row["method"]), float(row["rate"])


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def append(path: Path, rows: Sequence[Row]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def arguments(given: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1.5e-3, 5e-3, 1.5e-2, 4.5e-2, 1.35e-1], help="grid of learning rates"
    )
    parser.add_argument("--personal_rates", nargs="+", type=float, default=[5e-2, 1e-2], help="of the personal steps")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--total_steps", type=int, default=40, help="of each client, whatever the method")
    parser.add_argument("--round_steps", type=int, default=8, help="of a client in a round; divides --total_steps")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the run in progress")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of cells.csv, the tables and the figure")
    args, rest = parser.parse_known_args(given)
    if args.total_steps % args.round_steps or args.total_steps < 3 * args.round_steps:
        parser.error(f"--total_steps {args.total_steps}: must be 3 or more times --round_steps {args.round_steps}")
    return args, rest


def main(given: Sequence[str] | None = None) -> None:
    args, rest = arguments(given)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = run(args, rest)
    machine = environment("cuda" if torch.cuda.is_available() else "cpu")
    write_report(args.output_dir, rows, machine, args.personal_rates[0])


if __name__ == "__main__":
    main()
