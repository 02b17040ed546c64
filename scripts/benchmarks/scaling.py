"""The cost model of docs/scaling.md: what a round costs in bytes, server memory and time, and whether that is so.

Measured: aggregation of K clients' adapters from disk, as the server does it, each case in a process of its own; the
bytes of a message; the time in which the server takes in one update. The model is fitted to the smaller cohorts and
held against the largest. Then it is evaluated for cohorts that were not run: those rows say "by formula".

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.scaling --csv docs/benchmarks/scaling.csv

takes about five minutes on an idle core.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedlora_hf.adapter.files import read_adapter, write_adapter
from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.screening import examine
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts import common, python_path

METHODS = ("fedavg", "product_mean", "clair")
CONFIG = {"peft_type": "LORA", "r": 0, "lora_alpha": 0, "target_modules": None}
# A model of 32 blocks of width 4096 (some 7 billion parameters), LoRA on its 64 query and value projections.
BLOCKS, WIDTH = 64, 4096


class Case(NamedTuple):
    """A cohort: K clients, `modules` square modules of `width`, adapters of `rank`."""

    K: int
    modules: int
    width: int
    rank: int

    @property
    def numbers(self) -> int:
        """Numbers in one client's adapter: r (in + out) a module."""
        return self.modules * self.rank * 2 * self.width

    @property
    def stack(self) -> int:
        """Bytes of all clients' factors of one module in float32: what the server has to hold at once."""
        return 4 * self.K * self.rank * 2 * self.width


def adapter(case: Case, k: int) -> AdapterState:
    """A client's adapter: two shared directions beside its own; every tenth client is unrelated."""
    common_draw = torch.Generator().manual_seed(derive_seed(0, "scaling"))
    own = torch.Generator().manual_seed(derive_seed(0, "scaling", k))
    factors = {}
    for module in range(case.modules):
        U, V = torch.randn(case.width, 2, generator=common_draw), torch.randn(2, case.width, generator=common_draw)
        B = torch.randn(case.width, case.rank, generator=own)
        A = torch.randn(case.rank, case.width, generator=own)
        if k % 10 != 9:
            B[:, :2], A[:2] = 3 * U + B[:, :2], V + A[:2]
        factors[f"block.{module}.proj"] = LoraFactors(A, B)
    return AdapterState(factors)


def measure(case: Case, method: str) -> dict[str, Any]:
    """In a process of its own: seconds and MiB of one aggregation from disk."""
    with tempfile.TemporaryDirectory() as folder:
        updates = []
        for k in range(case.K):
            place = Path(folder) / f"{k:05d}"
            write_adapter(place, adapter(case, k), CONFIG)
            updates.append(ClientUpdate(f"c{k:05d}", read_adapter(place)[0], 100))
        aggregate(updates[:3], method)  # what is loaded and allocated once
        before = peak()
        began = time.process_time()  # of the processor: what else the machine does is not looked at
        aggregate(updates, method)
        return {"seconds": time.process_time() - began, "MiB": (peak() - before) / 2**20}


def peak() -> int:
    """Bytes this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def apart(case: Case, method: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.benchmarks.scaling", "--child", method, *(str(size) for size in case)]
    environ = {**os.environ, "PYTHONPATH": python_path()}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def work(case: Case, method: str) -> float:
    """What the time of one module is proportional to, where it is linear in K: K r (in + out), all factors; for the
    exact mean of many products K r in out, because the sum is formed once the ranks together exceed the width."""
    dense = method == "product_mean" and case.K * case.rank * 2 > case.width
    return case.K * case.rank * (case.width**2 if dense else 2 * case.width)


def beside(case: Case, method: str) -> int:
    """The second term of one module's time: all pairs of clients, or the SVD of the sum that the exact mean forms."""
    return case.width**3 if method == "product_mean" else case.K**2


def between_passes(case: Case, method: str) -> int:
    """Bytes that stay between CLAIR's passes: 64 r coordinates a client and module, and the clients' inner products."""
    return 4 * 64 * case.rank * case.K * case.modules + 8 * case.K**2 if method == "clair" else 0


class Model(NamedTuple):
    """seconds = modules (linear `work` + other `beside`). bytes = copies x the stack of one module + what stays between
    passes + dense matrices of a module in float64."""

    method: str
    linear: float
    other: float
    copies: float
    dense: float

    def seconds(self, case: Case) -> float:
        return case.modules * (self.linear * work(case, self.method) + self.other * beside(case, self.method))

    def mib(self, case: Case) -> float:
        held = self.copies * case.stack + self.dense * 8 * case.width**2
        return (held + between_passes(case, self.method)) / 2**20


def fitted(method: str, small: dict[Case, dict[str, Any]]) -> Model:
    """The model through two cohorts; a second term that would be below zero is none."""
    cases, results = list(small), list(small.values())
    terms = [[c.modules * term(c, method) for c in cases] for term in (work, beside)]
    seconds = through(*terms, results, "seconds")
    held = [{"bytes": r["MiB"] * 2**20 - between_passes(c, method)} for c, r in small.items()]
    memory = through([c.stack for c in cases], [8 * c.width**2 for c in cases], held, "bytes")
    return Model(method, *seconds, *memory)


def through(
    first: Sequence[float], second: Sequence[float], results: Sequence[dict[str, Any]], name: str
) -> tuple[float, float]:
    """(a, b), not below 0, with a first + b second = the result in both cases, or in the larger alone."""
    values = [float(result[name]) for result in results]
    matrix = torch.tensor([[x, y] for x, y in zip(first, second, strict=True)], dtype=torch.float64)
    a, b = torch.linalg.solve(matrix, torch.tensor(values, dtype=torch.float64)).tolist()
    if b < 0:
        return values[-1] / first[-1], 0.0
    return (a, b) if a > 0 else (0.0, values[-1] / second[-1])


def rows(cohorts: Sequence[int], modules: int, width: int, rank: int) -> list[dict[str, Any]]:
    """A row a method and cohort: measured and modelled; then by formula alone."""
    found = []
    for method in METHODS:
        cases = [Case(K, modules, width, rank) for K in cohorts]
        results = {case: apart(case, method) for case in cases}
        model = fitted(method, {case: results[case] for case in cases[:2]})
        for case, result in results.items():
            found.append(row(method, case, model, result))
        for K in (1_000, 10_000, 100_000):
            found.append(row(method, Case(K, BLOCKS, WIDTH, 16), model, None))
    return found


def row(method: str, case: Case, model: Model, result: dict[str, Any] | None) -> dict[str, Any]:
    """One line of the table; `result` None: by formula."""
    line: dict[str, Any] = {"method": method, "basis": "measured" if result else "by formula", **case._asdict()}
    line |= {"model_s": round(model.seconds(case), 2), "model_MiB": round(model.mib(case), 1)}
    for name, digits in (("seconds", 2), ("MiB", 1)):
        line[name] = round(result[name], digits) if result else ""
    line["s/model"] = round(result["seconds"] / model.seconds(case), 2) if result else ""
    line["MiB/model"] = round(result["MiB"] / model.mib(case), 2) if result else ""
    return line


def traffic(case: Case) -> list[str]:
    """Bytes of a message against 4 r (in + out) a module, and what taking in one update costs the server."""
    from flwr.app import RecordDict
    from flwr.common.serde import recorddict_to_proto

    from fedlora_hf.flower.wire import put, take

    content = RecordDict()
    state = adapter(case, 0)
    size = put(content, "update", state)
    whole = len(recorddict_to_proto(content).SerializeToString())
    began = time.perf_counter()
    update = ClientUpdate("c", take(content, "update"), 100)
    examine(update)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), update.state, CONFIG)
    seconds = time.perf_counter() - began
    return [
        f"an update of {case.numbers} numbers: {size} bytes by the formula {4 * case.numbers}, {whole} as a message",
        f"taking it in (decode, look at every number, write to disk): {seconds * 1e3:.0f} ms, "
        f"{size / seconds / 2**20:.0f} MiB a second",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[100, 300, 1000], help="default: 100 300 1000")
    for name, default in {"modules": 1, "width": 1024, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Case(*map(int, args.child[1:])), args.child[0])))
        return
    found = rows(args.cohorts, args.modules, args.width, args.rank)
    print(common.environment())
    print(*traffic(Case(1, 8, WIDTH, 16)), sep="\n")
    print(common.markdown(found))
    if args.csv:
        common.write_csv(args.csv, found)


if __name__ == "__main__":
    main()
