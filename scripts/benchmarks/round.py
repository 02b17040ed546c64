"""What a federated round costs beside a loop written by hand, and what a hundred clients cost in memory.

    python -m scripts.benchmarks.round --csv round.csv
    python -m scripts.benchmarks.round --memory --csv memory.csv

Time: one PEFT model, every client's local training done in each of these ways, one after the other, in a turning order:
- raw: the floor. Copy the start's factors in, a fresh fused AdamW, then for each batch, already collated and in memory:
  forward, backward, clip the gradient norm, step, zero the gradients; copy the factors out. Nothing else.
- raw with a DataLoader: the same, over the same shuffled batches made on the way from the client's dataset.
- FederatedTrainer.train_client: what a round does for a client, from the state it starts with to the update it sends.
- Trainer.train(), one Trainer: `transformers.Trainer` used again for each client with a fresh optimizer.
- Trainer.train(), a new Trainer: one for each client.
The table has the median ms of a client's local training and the median of the paired ratios to raw, on the wall and on
the processor. Whole rounds (all clients trained, their updates on disk, aggregated, committed) are timed inside
`FederatedTrainer.train()` and compared with the sum of the raw loops.

Memory: the peak resident size of a process that runs whole rounds with few clients, and of one with many: when all is
built, when the clients of the first round are trained, at the end; the difference also in sizes of one adapter.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.adapter.slot import with_adapter
from fedlora_hf.training.local import local_batches
from fedlora_hf.util.seeding import derive_seed
from scripts import common, python_path

VOCABULARY = 512


def small_model(hidden: int, layers: int, rank: int, targets: list[str] | str) -> PeftModel:
    """A Llama with random weights and a fresh adapter."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    return with_adapter(model, LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"), seed=0)


def random_clients(clients: int, examples: int, tokens: int) -> dict[str, Dataset]:
    """{client id: tokenised examples, all of one length}."""
    made = {}
    for number in range(clients):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, VOCABULARY, (examples, tokens), generator=generator).tolist()
        made[f"client-{number:03d}"] = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return made


def options(folder: str, **more: Any) -> FederatedConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    return FederatedConfig(output_dir=folder, **quiet, **more)


class Ways:
    """The ways to do one client's local training, on one model."""

    def __init__(self, case: argparse.Namespace, hidden: int, folder: str) -> None:
        self.model = small_model(hidden, case.layers, case.rank, ["q_proj", "v_proj"])
        self.clients = random_clients(case.clients, case.batch * case.steps, case.tokens)
        self.args = options(
            folder,
            num_rounds=case.rounds,
            local_steps=case.steps,
            per_device_train_batch_size=case.batch,
            aggregation=case.aggregation,
        )
        self.rounds = RoundTimes()
        self.federated = FederatedTrainer(self.model, self.args, self.clients, callbacks=[self.rounds])
        self.collate = self.federated.data_collator
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]
        self.ready = {client: list(self._loader(client)) for client in self.clients}
        self.plain_args = TrainingArguments(
            folder,
            max_steps=case.steps,
            per_device_train_batch_size=case.batch,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        self.reused = self._plain_trainer(next(iter(self.clients)))

    def all(self) -> dict[str, Callable[[str], object]]:
        return {
            "raw": lambda client: self.by_hand(self.ready[client]),
            "raw with a DataLoader": lambda client: self.by_hand(self._loader(client)),
            "FederatedTrainer.train_client": lambda client: self.federated.train_client(client, 1),
            "Trainer.train(), one Trainer": self.again,
            "Trainer.train(), a new Trainer": self.anew,
        }

    def _loader(self, client: str) -> Iterator[dict[str, torch.Tensor]]:
        """The batches that `train_client` takes in round 1, made by a shuffling DataLoader on the way."""
        seed = derive_seed(self.args.seed, "client", 1, client)
        for (batch,) in islice(
            local_batches(self.clients[client], self.collate, self.args, seed), self.args.local_steps
        ):
            yield batch

    def by_hand(self, batches: Any) -> list[torch.Tensor]:
        """The raw loop: all that a careful person would write, and no more."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.0, fused=True)
        self.model.train()
        total = torch.zeros(())
        for batch in batches:
            loss = self.model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        total.item()
        return [p.detach().clone() for p in self.parameters]

    def again(self, client: str) -> None:
        self.reused.train_dataset = self.clients[client]
        self.reused.optimizer = self.reused.lr_scheduler = None
        self.reused.train()

    def anew(self, client: str) -> None:
        self._plain_trainer(client).train()

    def _plain_trainer(self, client: str) -> Trainer:
        trainer = Trainer(self.model, self.plain_args, self.collate, train_dataset=self.clients[client])
        trainer.remove_callback(PrinterCallback)
        return trainer

    def difference(self) -> float:
        """Largest difference between the update of `train_client` and the raw loop's over the same batches."""
        client = next(iter(self.clients))
        state = self.federated.train_client(client, 1).state
        trained = [tensor for factors in state.values() for tensor in (factors.A, factors.B)]
        return max(float((a - b).abs().max()) for a, b in zip(trained, self.by_hand(self.ready[client]), strict=True))


class RoundTimes(TrainerCallback):
    """Seconds of each round of a FederatedTrainer, for which Trainer's events are epochs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def measure_time(case: argparse.Namespace, hidden: int) -> tuple[list[dict[str, Any]], float]:
    """(the rows of one size, the largest difference of a client's update from the raw loop's)."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(case, hidden, folder)
        kinds = ways.all()
        for work in kinds.values():
            work("client-000")
        difference = ways.difference()
        times = common.in_turns(kinds, list(ways.clients), case.repeats)
        rows = common.compared(times, "raw")
        raw = statistics.median(t.wall for t in times["raw"]) * case.clients
        whole = common.timed(ways.federated.train)
    for kind, seconds in (
        ("FederatedTrainer.train(): a round", statistics.median(ways.rounds.seconds)),
        (f"FederatedTrainer.train(): all, {case.rounds} rounds", whole.wall),
    ):
        rows.append({"kind": kind, "ms": round(seconds * 1e3, 3), "ratio": round(seconds / raw, 3), "cpu_ratio": ""})
    size = {"hidden": hidden, "batch": case.batch, "tokens": case.tokens, "threads": torch.get_num_threads()}
    return [size | row for row in rows], difference


def measure_memory(case: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clients; each is a process of its own. `more`: than the first row, in adapters."""
    rows: list[dict[str, Any]] = []
    for clients in case.memory_clients:
        flags = ["--peak_of", str(clients), "--aggregation", case.aggregation, "--rank", str(case.rank)]
        flags += ["--hidden", str(case.hidden[0]), "--layers", str(case.layers), "--rounds", str(case.rounds)]
        command = [sys.executable, "-m", "scripts.benchmarks.round", *flags]
        environ = {**os.environ, "PYTHONPATH": python_path()}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
        adapter, built, trained, peak = (int(value) / 2**20 for value in done.stdout.split()[-4:])
        row = {
            "aggregation": case.aggregation,
            "clients": clients,
            "adapter_MiB": adapter,
            "all_MiB": adapter * clients,
        }
        row |= {"built_MiB": built, "trained_MiB": trained, "peak_MiB": peak}
        first = rows[0] if rows else row
        row |= {f"more_{name}": (row[f"{name}_MiB"] - first[f"{name}_MiB"]) / adapter for name in ("trained", "peak")}
        rows.append({name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()})
    return rows


def peak_of(case: argparse.Namespace) -> tuple[int, ...]:
    """Bytes: one adapter, and the process's peak when all is built, when the last client is trained, at the end."""
    model = small_model(case.hidden[0], case.layers, case.rank, "all-linear")
    with tempfile.TemporaryDirectory() as folder:
        args = options(folder, num_rounds=case.rounds, local_steps=1, aggregation=case.aggregation)
        seen = AfterSteps()
        trainer = FederatedTrainer(model, args, random_clients(case.peak_of, 2, 16), callbacks=[seen])
        built = resident_peak()
        trainer.train()
        return trainer.initial.nbytes(), built, seen.peak, resident_peak()


class AfterSteps(TrainerCallback):
    """The peak of memory up to the last local step of the first round: before anything is aggregated."""

    peak = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.epoch:
            self.peak = resident_peak()


def resident_peak() -> int:
    """Peak resident bytes of this process (of its own: `resource` counts what a parent held before exec as well)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[64, 256], help="widths of the model (memory: the first)"
    )
    sizes = {"clients": 10, "steps": 5, "batch": 4, "tokens": 64, "rank": 8, "layers": 2, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="each client is timed so often each way (%(default)s)")
    parser.add_argument("--aggregation", default="fedavg", help="method of the whole rounds (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--memory_clients", type=int, nargs="+", default=[10, 100], help="default: 10 100")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    parser.add_argument("--peak_of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    case = parse_arguments(arguments)
    logging.set_verbosity_error()
    if case.peak_of:
        print(*peak_of(case))
        return
    print(common.environment())
    if case.memory:
        rows = measure_memory(case)
    else:
        measured = [measure_time(case, hidden) for hidden in case.hidden]
        rows = [row for part, _ in measured for row in part]
        print(f"largest difference of an update from the raw loop's: {max(d for _, d in measured):g}")
    print(common.markdown(rows))
    if case.csv:
        common.write_csv(case.csv, rows)


if __name__ == "__main__":
    main()
