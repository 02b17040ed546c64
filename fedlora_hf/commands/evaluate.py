"""`fedlora evaluate`: metrics of a finished run's adapters on other data."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora_hf.options.facts import at_least, check_number
from fedlora_hf.record.record import plain
from fedlora_hf.using.evaluating import evaluate, read
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.loaded import load
from fedlora_hf.util.disk import write_atomically


def evaluate_run(
    folder: str,
    dataset: Sequence[str],
    *,
    client: Sequence[str] = (),
    group: Sequence[str] = (),
    everything: bool = False,
    split: str | None = None,
    max_eval_examples: int | None = None,
    generation_examples: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    labels: Sequence[str] | None = None,
    output: str | None = None,
    base: str | None = None,
    use_cpu: bool = False,
) -> None:
    """Print a table: the base, the global adapter, and the clients' that are named (everything: all of them).

    output: a JSON file for the numbers, whole or not at all.
    """
    for name, value, least in (
        ("max_eval_examples", max_eval_examples, 1),
        ("generation_examples", generation_examples, 0),
        ("max_new_tokens", max_new_tokens, 1),
        ("per_device_eval_batch_size", batch_size, 1),
    ):
        check_number(name, value, int, at_least(least, "leave it out for the usual"))
    run = Finished.read(folder)
    some = client or group or everything
    adapters = run.adapters(client, True, group) if some else run.adapters((), True)[:2]
    loaded = load(run, base, use_cpu=use_cpu)
    source: Any = dataset[0] if len(dataset) == 1 else list(dataset)
    held = read(
        run, loaded, source, split=split, examples=max_eval_examples, generate=generation_examples, labels=labels
    )
    found = evaluate(loaded, adapters, held, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if output is not None:
        content = {"run": folder, "dataset": source, "examples": len(held.tokens), "metrics": plain(found)}
        write_atomically(Path(output), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table(found, len(held.tokens)))


def table(found: Mapping[str, Mapping[str, float]], examples: int) -> Table:
    """A row an adapter, a column a metric that some adapter has, with its interval where that is known."""
    every = list(dict.fromkeys(n for metrics in found.values() for n in metrics))
    names = [name for name in every if name != "num_items" and not name.endswith(("_low", "_high"))]
    shown = Table(title=f"{examples} examples")
    shown.add_column("adapter")
    for name in names:
        shown.add_column(f"{name} (95 %)" if f"{name}_low" in every else name, justify="right")
    for adapter, metrics in found.items():
        shown.add_row(Text(adapter), *(_cell(metrics, name) for name in names))
    return shown


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    ends = [metrics[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in metrics]
    return f"{metrics[name]:.4f}" + (f" ({ends[0]:.3f}-{ends[1]:.3f})" if ends else "")
