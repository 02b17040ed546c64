"""FedLoRA-Optimizer's question on real bases: its pipeline and its stages against averaging methods and clients alone.

    python -m scripts.experiments.real_methods --base base-7m --data DATA --output_dir docs/results/real

Every method gives each client the same number of steps and has the same number of learning rates tried on seeds that
are not reported. The rate with the least validation loss of the global adapter, and the one with the least of the
personal adapters, run on the reported seeds, each for the adapters it was chosen for. A client's personal adapter is
what the method leaves it (its own last update; in the pipeline the personal steps'). A row a client; cells that are in
the csv are not run again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from scripts.experiments.real_cells import (
    SOURCES,
    Row,
    Table,
    add_flags,
    answers,
    each,
    options,
    parsed,
    scores,
    trainer_of,
)

Flags = Callable[[int, int], list[str]]
KEY = ("base", "data", "tuning", "seed", "method", "rate")


def _plain(aggregation: str, *more: str) -> Flags:
    return lambda rounds, steps: ["--aggregation", aggregation, "--num_rounds", str(rounds), *more]


def _pipeline(*, shared: int = 1, own: int = 1) -> Flags:
    def flags(rounds: int, steps: int) -> list[str]:
        numbers = {"num_rounds": rounds - shared - own, "global_rounds": shared, "personal_steps": own * steps}
        given = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        return ["--pipeline", "fedlora_optimizer", "--aggregation", "dirmag_mean", *given]

    return flags


# {name: flags of (rounds, steps a round)}.
METHODS: dict[str, Flags] = {
    "base": lambda rounds, steps: ["--aggregation", "fedavg", "--num_rounds", "0"],
    "fedavg": _plain("fedavg"),
    "local": _plain("local"),
    "pipeline": _pipeline(),
    "without global stage": _pipeline(shared=0),
    "without local stage": _pipeline(own=0),
    "product_mean": _plain("product_mean"),
    "fedavg, cosine": _plain("fedavg", "--round_lr_scheduler", "cosine"),
    "ffa": _plain("ffa"),
    "fedsa": _plain("fedsa"),
}
QUICK, QUICK_RATES = ("base", "fedavg", "local", "pipeline"), (3e-3, 1e-2, 3e-2)
KINDS = ("global", "local")
# The personal steps train one magnitude a row: they have three times the rate of the others [our choice].
PERSONAL = 3


def cell(
    args: argparse.Namespace, data: str, seed: int, method: str, rate: float, tuning: bool, kinds: Sequence[str] = KINDS
) -> list[Row]:
    """Train one cell; a row a client, scored on its test examples with adapters of these kinds (tuning: not at all)."""
    raw = SOURCES[data].of(args.data, seed, args.examples, args.validation_share, args.test_share)
    flags = ["--learning_rate", str(rate), "--local_steps", str(args.steps), "--max_length", str(args.max_length)]
    flags += ["--per_device_train_batch_size", str(args.batch), *args.more]
    flags += METHODS[method](args.rounds, args.steps)
    if "--personal_steps" in flags and flags[flags.index("--personal_steps") + 1] != "0":
        flags += ["--personal_learning_rate", str(PERSONAL * rate)]
    if "--round_lr_scheduler" in flags:
        flags += ["--round_lr_min", str(rate / 10)]  # the last round would train nothing otherwise
    trainer = trainer_of(options(args.base, args.cache / "run", seed, flags), raw)
    began = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - began, 1)
    run = trainer.run
    sent = sum(sum(entry["bytes_up"].values()) for entry in run.record.rounds) // len(trainer.clients)
    rows = []
    for client in sorted(trainer.clients):
        row: Row = dict(zip(KEY, (args.base_name, data, int(tuning), seed, method, rate), strict=True))
        row |= {"client": client, "bytes_up": sent, "seconds": seconds}
        for kind, state in (("global", run.state), ("local", run.personalised.get(client, run.state))):
            row[f"{kind}_validation_loss"] = scores(trainer, client, state, "validation")["loss"]
            found: dict[str, Any] = {"loss": "", "token_accuracy": "", "exact_match": "", "rouge_l": ""}
            if not tuning and kind in kinds:
                found |= scores(trainer, client, state, "test")
                if data in args.answers:
                    found |= answers(trainer, client, state, raw[client]["test"], args.new_tokens)
            row |= {f"{kind}_{name}": value for name, value in found.items()}
        rows.append(row)
    return rows


def best_rate(rows: Sequence[Row], data: str, method: str, kind: str, rates: Sequence[float]) -> float:
    """Of the tuning rows: the rate of the least validation loss of a method's global or personal ("local") adapters."""
    own = [row for row in rows if row["data"] == data and row["method"] == method and int(row["tuning"])]

    def loss(rate: float) -> float:
        return statistics.fmean(float(row[f"{kind}_validation_loss"]) for row in own if float(row["rate"]) == rate)

    return min(rates, key=loss)


def chosen(rows: Sequence[Row], data: str, method: str, rates: Sequence[float]) -> dict[float, list[str]]:
    """{rate: the kinds of adapters that it is best for}; clients alone have no global adapter, the base no rate."""
    if method == "base":
        return {0.0: list(KINDS)}
    found: dict[float, list[str]] = {}
    for kind in KINDS if method != "local" else ("local",):
        found.setdefault(best_rate(rows, data, method, kind, rates), []).append(kind)
    return found


def run(args: argparse.Namespace, table: Table) -> None:
    """Tuning seeds first, then the reported ones, seed by seed, so that a run cut off leaves whole seeds."""
    methods, rates = (QUICK, QUICK_RATES) if args.quick else (args.methods, args.rates)
    for tuning, seed in each(args):
        for data in args.sources[: 1 if args.quick else None]:
            for method in methods:
                own = [row for row in table.rows if row["base"] == args.base_name]
                tried = {} if method == "base" else dict.fromkeys(rates, KINDS)
                for rate, kinds in (tried if tuning else chosen(own, data, method, rates)).items():
                    key = dict(zip(KEY, (args.base_name, data, int(tuning), seed, method, rate), strict=True))
                    if table.has(**key):
                        continue
                    began = time.perf_counter()
                    rows = cell(args, data, seed, method, rate or 1e-3, tuning, kinds)
                    table.add([row | {"rate": rate} for row in rows])
                    loss = statistics.fmean(row["local_validation_loss"] for row in rows)
                    print(data, seed, method, rate, f"{loss:.4f} {time.perf_counter() - began:.0f} s", flush=True)
                    gc.collect()  # a trainer and its model refer to each other


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1], help="tried by each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a client in a round")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=96)
    parser.add_argument("--examples", type=int, default=200, help="at most, a client")
    parser.add_argument("--validation_share", type=float, default=0.15, help="of a client's examples")
    parser.add_argument("--test_share", type=float, default=0.5, help="of a client's examples")
    parser.add_argument("--answers", nargs="*", default=["tasks"], help="the sources whose test answers are generated")
    parser.add_argument("--new_tokens", type=int, default=16, help="of a generated answer, at most")
    return parsed(parser, given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    table = Table(args.output_dir / "methods.csv", KEY)
    run(args, table)


if __name__ == "__main__":
    main()
