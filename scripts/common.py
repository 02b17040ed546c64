"""What the benchmarks share: the environment in one line, a stopwatch that takes turns, and tables as text and csv."""
# SPDX-License-Identifier: Apache-2.0

import csv
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import accelerate
import peft
import torch
import transformers

Row = Mapping[str, object]


class Seconds(NamedTuple):
    """Time on the wall, and time on the processor (all threads): the second does not see what else the machine does."""

    wall: float
    cpu: float


def environment(device: str = "cpu") -> str:
    """Date, machine and versions, for beside the numbers."""
    libraries = (("torch", torch), ("transformers", transformers), ("peft", peft), ("accelerate", accelerate))
    versions = ", ".join(f"{name} {library.__version__}" for name, library in libraries)
    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU {processor()}"
    threads = torch.get_num_threads()
    return f"{datetime.date.today()}; {card}; {threads} threads; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """The processor's name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timed(work: Callable[[], object]) -> Seconds:
    """How long one call took, with the device's queue drained."""
    drain()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    drain()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    kinds: Mapping[str, Callable[[str], object]], items: Sequence[str], repeats: int
) -> dict[str, list[Seconds]]:
    """{kind: one time an item and repeat}. For each item all kinds run one after the other, in an order that turns."""
    times: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
    order = list(kinds)
    for item in [*items] * repeats:
        for kind in order:
            # Without a collector that wakes up in the middle of one kind and cleans up after another.
            gc.disable()
            times[kind].append(timed(lambda kind=kind, item=item: kinds[kind](item)))  # type: ignore[misc]
            gc.enable()
        order = order[1:] + order[:1]
    return times


def compared(times: Mapping[str, Sequence[Seconds]], reference: str) -> list[dict[str, object]]:
    """A row a kind: median ms, and medians of the paired ratios to `reference`, which a drift of speed leaves alone."""
    rows = []
    for kind, own in times.items():
        pairs = list(zip(own, times[reference], strict=True))
        rows.append(
            {
                "kind": kind,
                "ms": round(statistics.median(t.wall for t in own) * 1e3, 3),
                "ratio": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
                "cpu_ratio": round(statistics.median(a.cpu / b.cpu for a, b in pairs), 3),
            }
        )
    return rows


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; columns are the first row's."""
    rows = list(rows)
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows; columns are the first row's."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
