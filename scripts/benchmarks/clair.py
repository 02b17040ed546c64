"""CLAIR's and product_mean's time and memory beside QRs of the same stacks, MultiKrum and a dense SVD, in one run.

    python -m scripts.benchmarks.clair --modules 4 --repeats 3 --csv docs/bench_clair.csv
    python -m scripts.benchmarks.clair --modules 64 --csv docs/bench_clair_64.csv
    python -m scripts.benchmarks.clair --out_of_core 50 200 1000 --modules 64 --size 1024 --rank 8 \\
        --csv docs/bench_clair_disk.csv --figure docs/figures/bench_clair_disk.png

In memory: K clients of rank r and `--modules` modules of `--size` x `--size`; CLAIR with its two rules of influence,
product_mean and MultiKrum through `aggregate`, and QRs of every module's stacks, take turns. Out of core: the clients'
adapters lie on disk as PEFT folders in bfloat16, read module by module, every cohort in a process of its own so that
its peak memory is its own. The dense reference forms the updates and takes an SVD of their stack, where that can run.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import save_file

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.aggregation import aggregate
from fedlora_hf.numerics.clair import Clair
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts import common, python_path

Row = dict[str, str | int | float]
QR = "one QR of the B stacks"


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


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def qr_of_stacks(updates: Sequence[ClientUpdate], both: bool) -> None:
    """One QR of each module's stacked B (out, n) and, if `both`, of its stacked A^T (in, n)."""
    for module in updates[0].state:
        factors = [update.state[module] for update in updates]
        torch.linalg.qr(torch.cat([f.B for f in factors], 1))
        if both:
            torch.linalg.qr(torch.cat([f.A for f in factors]).T)


def in_memory(args: argparse.Namespace) -> list[Row]:
    """Medians of what took turns, and ratios of them."""
    updates = [
        ClientUpdate(f"c{k:03d}", AdapterState(client_factors(k, args.modules, args.size, args.rank)))
        for k in range(args.clients)
    ]
    held = peak_gb()
    work: dict[str, Callable[[], object]] = {
        "clair": partial(aggregate, updates, "clair"),
        QR: partial(qr_of_stacks, updates, False),
        "product_mean": partial(aggregate, updates, "product_mean"),
        'clair, influence="flags"': partial(aggregate, updates, "clair", influence="flags"),
        "multikrum": partial(aggregate, updates, "multikrum"),
        "one QR of the B and of the A stacks": partial(qr_of_stacks, updates, True),
    }
    aggregate([ClientUpdate(u.client_id, u.state.restricted({"m000"})) for u in updates], "clair")  # warm
    found: dict[str, list[common.Seconds]] = {name: [] for name in work}
    peaks: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, action in work.items():
            found[name].append(common.timed(action))
            peaks.setdefault(name, peak_gb())
    wall, cpu = ({n: statistics.median(t[part] for t in times) for n, times in found.items()} for part in (0, 1))
    return [
        {
            "what": name,
            "seconds": wall[name],
            "times one QR of B": wall[name] / wall[QR],
            "processor seconds": cpu[name],
            "times one QR of B, processor": cpu[name] / cpu[QR],
            "peak GB so far": peaks[name],
            "of it updates": held,
        }
        for name in work
    ]


def dense(args: argparse.Namespace) -> str:
    """One module of `--dense_size`: CLAIR on factors against the dense stack's SVD."""
    pairs = []
    for k in range(args.clients):
        factors = client_factors(k, 1, args.dense_size, args.rank)["m000"]
        pairs.append((factors.B, factors.A))
    fast = common.timed(lambda: Clair(refine="none").fit(pairs, target_rank=args.rank)).wall
    slow = common.timed(lambda: torch.linalg.svd(torch.cat([B @ A for B, A in pairs], 1), full_matrices=False)).wall
    return f"one module of {args.dense_size}: clair {fast:.3g} s, dense stack and its SVD {slow:.3g} s"


def written(folder: Path, k: int, args: argparse.Namespace) -> Path:
    """A client's adapter as PEFT leaves it, in bfloat16."""
    place, tensors = folder / f"{k:05d}", {}
    place.mkdir()
    for name, f in client_factors(k, args.modules, args.size, args.rank).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = f.A.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = f.B.bfloat16()
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": args.rank, "target_modules": ["m"]}
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def from_disk(clients: int, args: argparse.Namespace) -> None:
    """In a process of its own: writes the adapters, aggregates, prints one line of JSON."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        places = [written(Path(folder), k, args) for k in range(clients)]
        before = peak_gb()
        flagged: list[str] = []

        def work() -> None:
            updates = [ClientUpdate(f"c{k:05d}", read_adapter(place)[0]) for k, place in enumerate(places)]
            flagged.extend(aggregate(updates, "clair").flagged)

        took = common.timed(work)
    row = {"clients": clients, "modules": args.modules, "size": args.size, "rank": args.rank, "seconds": took.wall}
    print(json.dumps(row | {"peak GB": peak_gb(), "of it before": before, "flagged": len(flagged)}))


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
        print(row, file=sys.stderr, flush=True)
    return rows


def draw(path: Path, tables: Sequence[Path]) -> None:
    """Seconds and peak memory against K, a line for each table of `--out_of_core`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for marker, table in zip("os^D", tables, strict=False):
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        K = [int(row["clients"]) for row in rows]
        label = "{modules} modules of {size} x {size}, rank {rank}".format(**rows[0]).replace("1 modules", "1 module")
        left.loglog(K, [float(row["seconds"]) for row in rows], marker=marker, label=label)
        right.semilogx(K, [float(row["peak GB"]) for row in rows], marker=marker, label=label)
    left.set(xlabel="clients", ylabel="seconds", title="Time of clair, read from disk")
    right.set(xlabel="clients", ylabel="GB", title="Peak memory of the process", ylim=(0, None))
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dense_size", type=int, default=512)
    parser.add_argument("--out_of_core", type=int, nargs="+", help="numbers of clients to read from disk")
    parser.add_argument("--folder", help="where the out-of-core adapters are written; default the system's")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path, help="draw time and memory against K")
    parser.add_argument("--tables", type=Path, nargs="+", help="with --figure: csv files to draw, and nothing is run")
    args = parser.parse_args()
    if args.child:
        from_disk(args.child, args)
        return
    if args.tables:
        draw(args.figure, args.tables)
        return
    rows = out_of_core(args) if args.out_of_core else in_memory(args)
    print(common.environment())
    print(common.markdown([{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
    if not args.out_of_core:
        print(dense(args))
    if args.csv:
        common.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
