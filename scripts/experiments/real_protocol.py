"""FlowerTune's general-NLP setting at our scale: loss against rounds and bytes, ours against Flower's own strategies.

    python -m scripts.experiments.real_protocol --base base-7m --data DATA --output_dir docs/results/real

20 iid clients of Dolly (which stands for alpaca-gpt4), 10 % of them a round, 10 steps each, the rate falling along half
a cosine from 5e-5 to 1e-6 over the rounds, r 32, alpha 64, at most 512 tokens. Clients, their order and their steps are
the same for all strategies; Flower's are called as flwr ships them on the factors of the adapters. CLAIR is not among
them: it judges three clients or more, and two take part in a round. A row a measured round; cells that are in the csv
are not run again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedlora_hf.aggregation import aggregate
from fedlora_hf.training.stages import FACTORS, Stage, StageName
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.seeding import derive_seed
from scripts.experiments.other_aggregators import by_strategy
from scripts.experiments.real_cells import DOLLY, Clients, Row, Table, add_flags, options, parsed, trainer_of
from scripts.experiments.vectors import flat, shaped, stacked

KEY = ("base", "peak", "strategy", "seed")
Combine = Callable[[Sequence[ClientUpdate], AdapterState], AdapterState]


def ours(method: str) -> Combine:
    """A rule of this package."""

    def combine(updates: Sequence[ClientUpdate], start: AdapterState) -> AdapterState:
        rank = next(iter(start.values())).rank
        return aggregate(updates, method, reference=start, target_rank=rank).state

    return combine


def flowers(name: str, **given: Any) -> Combine:
    """A strategy of flwr.serverapp on the factors as arrays; adaptive ones are told the arrays of the round before."""

    def combine(updates: Sequence[ClientUpdate], start: AdapterState) -> AdapterState:
        from flwr.serverapp import strategy

        made = getattr(strategy, name)(**given)
        made.current_arrays = {"0": flat(start)}
        return shaped(by_strategy(made, stacked([update.state for update in updates]), False).vector, start)

    return combine


STRATEGIES: dict[str, Combine] = {
    "flower FedAvg": flowers("FedAvg"),
    "flower FedMedian": flowers("FedMedian"),
    "flower Krum": flowers("Krum", num_malicious_nodes=0),
    "product_mean": ours("product_mean"),
    "fedavg": ours("fedavg"),
}


def rate(peak: float, low: float, number: int, rounds: int) -> float:
    """Half a cosine over rounds 1 to `rounds`, from `peak` to `low`."""
    return low + (peak - low) * (1 + math.cos(math.pi * (number - 1) / max(rounds - 1, 1))) / 2


def cell(args: argparse.Namespace, peak: float, strategy: str, seed: int) -> list[Row]:
    """One federation; a row for the start and for every `--every` rounds."""
    clients = Clients("dolly", DOLLY, "iid", num_clients=args.clients).of(args.data, seed, args.examples, 0.0, 0.1)
    flags = ["--max_length", str(args.max_length), "--lora_r", str(args.rank), "--lora_alpha", str(2 * args.rank)]
    flags += ["--per_device_train_batch_size", str(args.batch), "--local_steps", str(args.steps), *args.more]
    trainer = trainer_of(options(args.base, args.cache / "run", seed, flags), clients)
    test = [row for name in sorted(trainer.clients) for row in trainer.clients[name].test][: args.test]
    state, each = trainer.initial, flat(trainer.initial).nbytes
    rng, rows, names = np.random.default_rng(derive_seed(seed, "cohorts")), [], sorted(trainer.clients)
    for number in range(args.rounds + 1):
        chosen = sorted(rng.choice(names, args.cohort, replace=False).tolist()) if number else []
        updates = []
        for name in chosen:
            stage = Stage(StageName.FEDERATED, FACTORS, rate(peak, peak / 50, number, args.rounds))
            trainer.install(state)
            order = derive_seed(seed, "client", number, name)
            update = trainer.train_from(state, name, trainer.clients[name], stage, order)
            updates.append(ClientUpdate(name, update.state, 1))
        state = STRATEGIES[strategy](updates, state) if updates else state
        if number % args.every == 0 or number == args.rounds:
            found = trainer.scorer.metrics(state, test)
            key = dict(zip(KEY, (args.base_name, peak, strategy, seed), strict=True))
            values = {name: round(found[name], 5) for name in ("loss", "token_accuracy")}
            rows.append(key | {"round": number, "megabytes": round(2 * number * args.cohort * each / 1e6, 3), **values})
    return rows


def run(args: argparse.Namespace, table: Table) -> None:
    for seed in args.seeds[: 1 if args.quick else None]:
        for peak in args.peaks:
            for strategy in args.strategies:
                key = dict(zip(KEY, (args.base_name, peak, strategy, seed), strict=True))
                if not table.has(**key):
                    rows = cell(args, peak, strategy, seed)
                    table.add(rows)
                    print(*key.values(), *(row["loss"] for row in rows), flush=True)
                    gc.collect()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--peaks", nargs="+", type=float, default=[5e-5, 5e-3], help="first rates; the last is 1/50")
    numbers = (("clients", 20), ("cohort", 2), ("rounds", 10), ("steps", 10), ("batch", 2), ("max_length", 512))
    for name, default in (*numbers, ("rank", 32), ("every", 2), ("examples", 60), ("test", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parsed(parser, given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    run(args, Table(args.output_dir / "protocol.csv", KEY))


if __name__ == "__main__":
    main()
