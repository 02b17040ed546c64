"""One small federation by three engines, in one run: this project in one process and in two, and Flower's simulation.

The same base model, data, numbers of clients, steps and rounds. This project is run as a user runs it, report and card
included: in one process with as many threads as cores, and by torchrun in two processes of one thread. Flower's
simulation runs the usual app, benchmarks/flower_stock, which builds the model for every message and averages with
Flower's FedAvg, in as many actors as cores; its SuperLink is running already when the clock starts, and counts as
memory.

    python -m scripts.benchmarks.engines --csv docs/benchmarks/engines.csv

takes about ten minutes on idle cores. On busy ones pass --threads 1: threads that wait for each other stand still when
one does not get its core. Memory is PSS, which counts a page shared by n processes as 1/n, summed over all processes of
an engine, twice a second.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts import common, python_path
from scripts.checks.flower_daemons import Daemons, free_port

SCRIPT = Path(__file__).resolve()
VOCABULARY, TOKENS, BATCH, RANK, RATE = 600, 32, 4, 8, 1e-3
LAYERS = {64: 2, 256: 4}
MARK = "FEDLORA_BENCH_MARK"


class Measured(NamedTuple):
    """One run of an engine. seconds: from start to end; first: of round 1; round: median of the rounds after it;
    peak: MiB of PSS."""

    seconds: float
    first: float
    round: float
    peak: float


class Case(NamedTuple):
    """What is run: the folder with base/ and data.safetensors, and the sizes."""

    folder: Path
    clients: int
    steps: int
    rounds: int


def write_case(case: Case, hidden: int) -> None:
    """The base model and the clients' token ids, drawn from fixed seeds."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": LAYERS.get(hidden, 4)}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=4, **shape)
    LlamaForCausalLM(config).save_pretrained(case.folder / "base")
    data = {
        f"{place:03d}": torch.randint(
            3, VOCABULARY, (case.steps * BATCH, TOKENS), generator=torch.Generator().manual_seed(place)
        )
        for place in range(case.clients)
    }
    save_file(data, case.folder / "data.safetensors")


# ---- this project ----------------------------------------------------------------------------------------------------


def work(case: Case) -> None:
    """The federation by this project, in this process or in what torchrun started; prints the seconds of its rounds."""
    import datasets
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, TrainerCallback

    from fedlora_hf import FederatedConfig, FederatedTrainer

    class Rounds(TrainerCallback):
        """When the rounds begin and end."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    rounds = Rounds()
    data = load_file(case.folder / "data.safetensors")
    clients = {
        name: datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        for name, ids in data.items()
    }
    args = FederatedConfig(
        output_dir=str(case.folder / "out"),
        aggregation="fedavg",
        num_rounds=case.rounds,
        local_steps=case.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lora_r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    model = AutoModelForCausalLM.from_pretrained(case.folder / "base")
    trainer = FederatedTrainer(model, args, clients, callbacks=[rounds])
    trainer.train()
    if trainer.is_world_process_zero():
        (case.folder / "rounds.json").write_text(json.dumps(rounds.seconds), encoding="utf-8")


def ours(case: Case, processes: int, threads: int) -> Measured:
    """This project, started as a command."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    sizes = ["--clients", str(case.clients), "--steps", str(case.steps), "--rounds", str(case.rounds)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), "--work", str(case.folder), *sizes]
    mark = str(uuid.uuid4())
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path(), MARK: mark}
    with Memory(mark) as memory:
        began = time.perf_counter()
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seconds = time.perf_counter() - began
    return measured(seconds, case.folder / "rounds.json", memory)


# ---- Flower ----------------------------------------------------------------------------------------------------------


def flower(case: Case) -> Measured:
    """The usual app by Flower's simulation engine."""
    mark, cores = str(uuid.uuid4()), os.cpu_count() or 1
    out = case.folder / "flower.json"
    out.unlink(missing_ok=True)
    run = {"base": str(case.folder / "base"), "data": str(case.folder / "data.safetensors"), "out": str(out)}
    run |= {
        "rounds": case.rounds,
        "clients": case.clients,
        "steps": case.steps,
        "batch": BATCH,
        "rank": RANK,
        "rate": RATE,
    }
    federation = {"num-supernodes": case.clients, "client-resources-num-cpus": 1, "init-args-num-cpus": cores}
    with (
        tempfile.TemporaryDirectory() as folder,
        Daemons(Path(folder), {MARK: mark, "OMP_NUM_THREADS": "1"}) as daemons,
    ):
        daemons.superlink("--insecure", "--simulation")
        with Memory(mark) as memory:
            began = time.perf_counter()
            status = daemons.wait(daemons.submit(SCRIPT.parent / "flower_stock", run, federation), 900)
            seconds = time.perf_counter() - began
    if not out.is_file():
        raise RuntimeError(f"the run on Flower is {status} and left nothing; see flwr log")
    return measured(seconds, out, memory)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Memory:
    """The largest PSS, summed over the processes whose environment holds a mark, while the block runs. Linux."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0.0

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak, sum(map(self._pss, Path("/proc").glob("[0-9]*"))) / 1024)

    def _pss(self, process: Path) -> int:
        """KiB of one process; 0 for one that is not marked, or is gone by now."""
        try:
            if self._mark not in (process / "environ").read_bytes():
                return 0
            lines = (process / "smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measured(seconds: float, rounds: Path, memory: Memory) -> Measured:
    times = json.loads(rounds.read_text(encoding="utf-8"))
    return Measured(seconds, times[0], statistics.median(times[1:]), memory.peak)


def compare(args: argparse.Namespace, hidden: int) -> list[dict[str, Any]]:
    """A row an engine: medians, and Flower's over each as a ratio, the median of the ratios of each repeat."""
    engines: Mapping[str, Callable[[Case], Measured]] = {
        "one process": lambda case: ours(case, 1, args.threads),
        "two processes": lambda case: ours(case, 2, 1),
        "Flower simulation": flower,
    }
    found: dict[str, list[Measured]] = {name: [] for name in engines}
    order = list(engines)
    for repeat in range(args.repeats):
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(Path(folder), args.clients, args.steps, args.rounds)
                write_case(case, hidden)
                found[name].append(engines[name](case))
            print(f"hidden {hidden}, repeat {repeat + 1}, {name}: {found[name][-1]}", flush=True)
        order = order[1:] + order[:1]
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"hidden": hidden, "engine": name}
        for place, field in enumerate(Measured._fields):
            unit = "MiB" if field == "peak" else "s"
            ratios = [theirs[place] / own[place] for own, theirs in zip(runs, found["Flower simulation"], strict=True)]
            row[f"{field}_{unit}"] = round(statistics.median(run[place] for run in runs), 3)
            row[f"Flower/{field}"] = round(statistics.median(ratios), 2)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256], help="widths (default: 64 256)")
    for name, default in {"clients": 8, "steps": 5, "rounds": 3, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the one process (%(default)s)")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Case(args.work, args.clients, args.steps, args.rounds))
        return
    rows = [row for hidden in args.hidden for row in compare(args, hidden)]
    print(common.environment())
    print(common.markdown(rows))
    if args.csv:
        common.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
