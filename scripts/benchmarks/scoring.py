"""Scoring a split: logits of every position in batches as the data come, beside what a run does, in one run.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.scoring --csv docs/benchmarks/scoring.csv

- all logits: batches of `--batch` examples in the order of the data, the head on every position (as it was before).
- answered logits: the same batches, the head on answered positions alone.
- answered logits, like lengths: as a run does it (`held_out_metrics`): longest first, as many tokens a batch as
  `--batch` of the longest examples have.

A Llama with random weights and a vocabulary as small models have it today; examples of `--shortest` to `--longest`
tokens, of which the last quarter is the answer. Peak: how far the process's resident memory rises over what it was
before (Linux). The losses agree to 1e-6, or the script ends with an error.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_hf.data.collate import Collator
from fedlora_hf.training.heads import answered_logits
from fedlora_hf.training.metrics import held_out_metrics
from scripts import common

ALL, ANSWERED, RUN = "all logits", "answered logits", "answered logits, like lengths"
COLLATE = Collator(pad_token_id=0)


def model_of(case: argparse.Namespace) -> Any:
    """A Llama with random weights in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": case.hidden, "intermediate_size": 8 * case.hidden // 3, "num_hidden_layers": case.layers}
    config = LlamaConfig(**sizes, num_attention_heads=case.heads, vocab_size=case.vocabulary)
    return LlamaForCausalLM(config).to(case.device).eval()


def examples_of(case: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Random tokens, lengths spread evenly and shuffled; three quarters are the prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(case.shortest, case.longest, case.examples).int()
    found = []
    for length in lengths[torch.randperm(case.examples, generator=generator)].tolist():
        ids = torch.randint(2, case.vocabulary, (length,), generator=generator).tolist()
        prompt = 3 * length // 4
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def by_order(model: Any, examples: list[Any], batch_size: int, answered_alone: bool) -> float:
    """Mean loss in batches in the order of the examples."""
    nats = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for start in range(0, len(examples), batch_size):
        batch = {name: t.to(model.device) for name, t in COLLATE(examples[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        at = labels != -100
        with torch.no_grad():
            logits = answered_logits(model, batch, at) if answered_alone else model(**batch).logits[:, :-1][at]
            nats += cross_entropy(logits.float(), labels[at], reduction="sum").double().cpu()
        tokens += int(at.sum())
    return float(nats) / tokens


def ways(model: Any, examples: list[Any], batch_size: int) -> dict[str, Callable[[str], float]]:
    """The ways to score; each gives the mean loss."""

    def as_in_a_run(_: str) -> float:
        return held_out_metrics(model, examples, COLLATE, task="causal_lm", batch_size=batch_size)["loss"]

    return {
        ALL: lambda _: by_order(model, examples, batch_size, False),
        ANSWERED: lambda _: by_order(model, examples, batch_size, True),
        RUN: as_in_a_run,
    }


def peak_mib(device: str, work: Callable[[], object]) -> float | str:
    """How much more memory was held during a call than before it: the device's, or the process's; "" where untold."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    status = Path("/proc/self/status")
    if not status.is_file():
        return ""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _kib(status, "VmRSS")
    work()
    return round((_kib(status, "VmHWM") - before) / 1024, 1)


def _kib(status: Path, name: str) -> int:
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(case: argparse.Namespace) -> list[dict[str, object]]:
    """A row a way: ms, ratio to all logits, peak memory."""
    model, examples = model_of(case), examples_of(case)
    kinds = ways(model, examples, case.batch)
    losses = {kind: work("") for kind, work in kinds.items()}
    if max(losses.values()) - min(losses.values()) > case.tolerance:
        raise SystemExit(f"the losses differ: {losses}")
    peaks = {kind: peak_mib(case.device, lambda work=work: work("")) for kind, work in kinds.items()}  # type: ignore[misc]
    rows = common.compared(common.in_turns(kinds, ["split"], case.repeats), ALL)
    return [{**row, "peak_MiB": peaks[str(row["kind"])], "loss": f"{losses[str(row['kind'])]:.7f}"} for row in rows]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 576, "layers": 2, "heads": 9, "vocabulary": 49152, "examples": 16, "shortest": 32}
    sizes |= {"longest": 256, "batch": 8, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of the losses (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    case = parse_arguments(arguments)
    rows = measured(case)
    print(f"{common.environment(case.device)}\n\n{common.markdown(rows)}")
    if case.csv:
        common.write_csv(case.csv, rows)


if __name__ == "__main__":
    main()
