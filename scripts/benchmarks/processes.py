"""How much faster a round is on two processes, with one thread each; and, by a model checked on two, on eight.

    python -m scripts.benchmarks.processes --csv docs/benchmarks/processes.csv

One launch of two gloo processes; the ways to run a round take turns in it, so a drift of the machine's speed leaves the
ratios alone. Clients are of very uneven sizes (log-normal, seed 0) and train one epoch. The ways:
- one process: the first trains every client, the second waits;
- two, in turns: client i of the sorted ids goes to process i mod 2;
- two, longest first: each takes the longest client that is left when it is free, which is what a run does.
Then one client trained by one process that accumulates two micro-batches, and by two processes together
(`--client_parallel data`): the same steps on the same batches.

The model: a round takes as long as the process with the most work, whose clients take what they took one process alone
(medians; its update's files are part of that), plus what one process spends beside its clients: aggregation and commit,
which the first does while others wait.
The table sets it beside what was measured on two, and gives it for eight.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

import fedlora_hf.rounds.output
from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.launch.schedule import shares
from fedlora_hf.update import ClientUpdate
from scripts import common, python_path
from scripts.benchmarks.round import random_clients, small_model

Plan = list[list[str]]
WAYS = ("one process", "two, in turns", "two, longest first")


def uneven_clients(case: argparse.Namespace) -> dict[str, Dataset]:
    """{client id: its examples}: log-normal sizes, from one step to `most`."""
    steps = np.random.default_rng(0).lognormal(mean=np.log(case.steps), sigma=1.0, size=case.clients)
    made = random_clients(case.clients, case.batch * case.most, case.tokens)
    sizes = case.batch * np.clip(steps.round().astype(int), 1, case.most)
    return {client: data.select(range(size)) for (client, data), size in zip(made.items(), sizes, strict=True)}


def options(case: argparse.Namespace, folder: str, **more: Any) -> FederatedConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3}
    return FederatedConfig(folder, aggregation="fedavg", per_device_train_batch_size=case.batch, **quiet, **more)


def model(case: argparse.Namespace) -> Any:
    return small_model(case.hidden, case.layers, case.rank, ["q_proj", "v_proj"])


class Rounds(FederatedTrainer):
    """Rounds run in one way after the other, after a first one that warms up; all are timed, and so are the clients."""

    def __init__(self, case: argparse.Namespace, folder: str) -> None:
        self.order = [WAYS[0], *WAYS * case.repeats]
        args = options(case, folder, num_rounds=len(self.order), local_epochs=1.0)
        clients = uneven_clients(case)
        super().__init__(model(case), args, clients, callbacks=[(times := RoundTimes())])
        self.seconds = times.seconds
        self.costs = {client: float(self.num_local_steps(self.clients[client])) for client in clients}
        self.alone: dict[str, list[float]] = {client: [] for client in clients}

    def claim(self, clients: Iterable[str]) -> Iterator[str]:
        way = self.order[self.run.round] if self.run.round < len(self.order) else WAYS[0]
        if way == "two, longest first":
            return super().claim(clients)
        plan = planned(way, self.costs)
        return iter(plan[self.processes.number] if self.processes.number < len(plan) else [])

    def train_client(self, client_id: str, number: int) -> ClientUpdate:
        began = time.perf_counter()
        update = super().train_client(client_id, number)
        if number > 1 and self.order[number - 1] == WAYS[0]:
            self.alone[client_id].append(time.perf_counter() - began)
        return update


class RoundTimes(TrainerCallback):
    """Seconds of every round, on the wall."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def whole_rounds(case: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """The table's rows about whole rounds; none on the second process, which has no clients' times."""
    trainer = Rounds(case, folder)
    trainer.train()
    if not trainer.processes.first:
        return []
    seconds = {way: trainer.seconds[1 + place :: len(WAYS)] for place, way in enumerate(WAYS)}
    each = {client: statistics.median(values) for client, values in trainer.alone.items()}
    training = sum(each.values())
    beside = statistics.median(seconds[WAYS[0]]) - training
    print(f"{len(each)} clients, {sum(trainer.costs.values()):.0f} steps, {training:.2f} s of training by one process")
    print(f"the longest client: {max(each.values()):.2f} s; beside training: {beside:.3f} s a round")
    rows = []
    for way in (*WAYS, "eight, in turns", "eight, longest first"):
        modelled = makespan(planned(way, trainer.costs), each) + beside
        measured = row(way, seconds[way], seconds[WAYS[0]]) if way in WAYS else row(way, [], [])
        rows.append(measured | {"modelled_s": round(modelled, 3)})
        rows[-1]["modelled_speed_up"] = round((training + beside) / modelled, 2)
    return rows


def planned(way: str, costs: Mapping[str, float]) -> Plan:
    """The clients of each process."""
    processes = {"one": 1, "two": 2, "eight": 8}[way.replace(",", " ").split()[0]]
    return in_turns(costs, processes) if way.endswith("in turns") else shares(costs, processes)


def in_turns(costs: Mapping[str, float], processes: int) -> Plan:
    ids = sorted(costs)
    return [ids[number::processes] for number in range(processes)]


def makespan(plan: Plan, seconds: Mapping[str, float]) -> float:
    return max(sum(seconds[client] for client in part) for part in plan)


def row(kind: str, seconds: list[float], one: list[float]) -> dict[str, Any]:
    """Median seconds, and the median of the ratios to the neighbouring measurements of one process."""
    found: dict[str, Any] = {"kind": kind, "s": "", "speed_up": "", "modelled_s": "", "modelled_speed_up": ""}
    if seconds:
        ratio = statistics.median(alone / own for alone, own in zip(one, seconds, strict=True))
        found |= {"s": round(statistics.median(seconds), 3), "speed_up": round(ratio, 2)}
    return found


def one_client(case: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """The table's rows about one client trained by one process, and by two together."""
    clients = random_clients(1, 2 * case.batch * case.steps, case.tokens)
    (name,) = clients
    single = FederatedTrainer(model(case), options(case, f"{folder}/one", gradient_accumulation_steps=2), clients)
    together = FederatedTrainer(model(case), options(case, f"{folder}/both", client_parallel="data"), clients)
    ways: dict[str, Callable[[], object]] = {
        "one client, one process": lambda: single.processes.first and single.train_client(name, 1),
        "one client, two together": lambda: together.train_client(name, 1),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + case.repeats):
        for way, work in ways.items():
            together.accelerator.wait_for_everyone()
            began = time.perf_counter()
            work()
            together.accelerator.wait_for_everyone()
            seconds[way].append(time.perf_counter() - began)
    return [row(way, values[1:], seconds["one client, one process"][1:]) for way, values in seconds.items()]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 2, "rank": 8, "clients": 24, "batch": 4, "tokens": 64, "steps": 5, "most": 30}
    for name, default in {**sizes, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def launched(arguments: list[str]) -> None:
    """Run this script again in two processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "scripts.benchmarks.processes"]
    with tempfile.TemporaryDirectory() as folder:
        command += [*arguments, "--folder", folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"})


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    case = parse_arguments(arguments)
    if not case.folder:
        launched(arguments)
        return
    logging.set_verbosity_error()
    # Figures are no part of a round.
    fedlora_hf.rounds.output.write_report = lambda record, folder: []
    rows = whole_rounds(case, f"{case.folder}/rounds")
    alone_or_together = one_client(case, case.folder)
    if rows:
        rows += alone_or_together
        print(f"{common.environment()}\n\n{common.markdown(rows)}")
        if case.csv:
            common.write_csv(case.csv, rows)


if __name__ == "__main__":
    main()
