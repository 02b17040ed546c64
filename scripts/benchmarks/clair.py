"""CLAIR's time and memory beside a QR of the same stacks, product-space MultiKrum and a dense computation, in one run.

    python -m scripts.benchmarks.clair --modules 64 --csv docs/bench_clair.csv
    python -m scripts.benchmarks.clair --out_of_core 200 1000 --modules 2 --csv docs/bench_clair_disk.csv

In memory: K clients of rank r and `--modules` modules of `--size` x `--size`; the time of one QR of every module's two
stacks, of MultiKrum and of CLAIR through `aggregate`, in turn. Out of core: the clients' adapters lie on disk as
safetensors, each read module by module, every cohort in a process of its own so that its peak memory is its own. The
dense reference forms the updates and takes an SVD of their stack, at a size where that can run.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedlora_hf.aggregation import aggregate
from fedlora_hf.numerics.clair import Clair
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts import python_path

Row = dict[str, str | int | float]


def client_factors(k: int, modules: int, size: int, rank: int) -> dict[str, LoraFactors]:
    """Two shared directions, common ones at that, beside a client's own; every tenth client is unrelated."""
    common = torch.Generator().manual_seed(derive_seed(0, "bench"))
    own = torch.Generator().manual_seed(derive_seed(0, "bench", k))
    factors = {}
    for m in range(modules):
        U = torch.randn(size, 2, generator=common)
        V = torch.randn(2, size, generator=common)
        B, A = torch.randn(size, rank, generator=own), torch.randn(rank, size, generator=own)
        if k % 10 != 9:
            B[:, :2], A[:2] = 3 * U + B[:, :2], V + A[:2]
        factors[f"m{m:03d}"] = LoraFactors(A, B)
    return factors


@dataclass(frozen=True)
class OnDisk(Mapping[str, LoraFactors]):
    """An adapter in a safetensors file, read module by module."""

    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> LoraFactors:
        with safe_open(self.path, "pt") as file:
            return LoraFactors(file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def timed(action: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def qr_of_stacks(updates: list[ClientUpdate]) -> None:
    """One QR of each module's stacked B (out, n) and of its stacked A^T (in, n)."""
    for module in updates[0].state:
        factors = [update.state[module] for update in updates]
        torch.linalg.qr(torch.cat([f.B for f in factors], 1))
        torch.linalg.qr(torch.cat([f.A for f in factors]).T)


def in_memory(args: argparse.Namespace) -> list[Row]:
    updates = [
        ClientUpdate(f"c{k:03d}", AdapterState(client_factors(k, args.modules, args.size, args.rank)))
        for k in range(args.clients)
    ]
    held = peak_gb()
    rows: list[Row] = []
    aggregate([ClientUpdate(u.client_id, AdapterState({"m000": u.state["m000"]})) for u in updates], "clair")  # warm
    seconds, result = timed(lambda: aggregate(updates, "clair"))
    rows.append({"what": "clair", "seconds": seconds, "peak GB": peak_gb(), "of it updates": held})
    flagged = len(result.flagged)  # type: ignore[attr-defined]
    others: dict[str, Callable[[], object]] = {
        "multikrum": lambda: aggregate(updates, "multikrum"),
        "product_mean": lambda: aggregate(updates, "product_mean"),
        "qr of the stacks": lambda: qr_of_stacks(updates),
    }
    for name, action in others.items():
        rows.append({"what": name, "seconds": timed(action)[0], "peak GB": peak_gb(), "of it updates": held})
    for row in rows:
        row["clair / this"] = seconds / float(row["seconds"])
    print(f"flagged {flagged} of {args.clients}")
    return rows


def dense(args: argparse.Namespace) -> list[Row]:
    """One module of `--dense_size`: CLAIR on factors against the dense stack's SVD."""
    pairs = []
    for k in range(args.clients):
        factors = client_factors(k, 1, args.dense_size, args.rank)["m000"]
        pairs.append((factors.B, factors.A))
    fast, _ = timed(lambda: Clair(refine="none").fit(pairs, target_rank=args.rank))

    def stack() -> object:
        return torch.linalg.svd(torch.cat([B @ A for B, A in pairs], 1), full_matrices=False)

    slow, _ = timed(stack)
    name = f"one module of {args.dense_size}, dense stack and SVD"
    return [{"what": name, "seconds": slow, "peak GB": peak_gb(), "of it updates": 0.0, "clair / this": fast / slow}]


def from_disk(clients: int, args: argparse.Namespace) -> None:
    """In a process of its own: writes the adapters, aggregates, prints one line of JSON."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        names = tuple(f"m{m:03d}" for m in range(args.modules))
        updates = []
        for k in range(clients):
            path = Path(folder) / f"{k:04d}.safetensors"
            tensors = {}
            for name, f in client_factors(k, args.modules, args.size, args.rank).items():
                tensors |= {f"{name}.A": f.A.bfloat16(), f"{name}.B": f.B.bfloat16()}
            save_file(tensors, path)
            updates.append(ClientUpdate(f"c{k:04d}", AdapterState(OnDisk(path, names))))
        seconds, result = timed(lambda: aggregate(updates, "clair"))
        row = {"clients": clients, "seconds": seconds, "peak GB": peak_gb()}
        print(json.dumps(row | {"flagged": len(result.flagged)}))  # type: ignore[attr-defined]


def out_of_core(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for clients in args.out_of_core:
        command = [sys.executable, "-m", "scripts.benchmarks.clair", "--child", str(clients)]
        command += ["--modules", str(args.modules), "--size", str(args.size), "--rank", str(args.rank)]
        command += ["--folder", args.folder] if args.folder else []
        environ = {**os.environ, "PYTHONPATH": python_path()}
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
        row = json.loads(out.strip().splitlines()[-1])
        if rows:
            growth = row["seconds"] / float(rows[-1]["seconds"])
            row["exponent"] = math.log(growth) / math.log(clients / int(rows[-1]["clients"]))
        else:
            row["exponent"] = ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dense_size", type=int, default=512)
    parser.add_argument("--out_of_core", type=int, nargs="+", help="numbers of clients to read from disk")
    parser.add_argument("--folder", help="where the out-of-core adapters are written; default the system's")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.child:
        from_disk(args.child, args)
        return
    rows = out_of_core(args) if args.out_of_core else in_memory(args) + dense(args)
    head = list(rows[0])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=head)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
