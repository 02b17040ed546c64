"""What `scripts.benchmarks.gpu` measures: each part takes the sizes and gives rows (see `measured`).

The model is made on the device in bfloat16 with random weights (no download): hidden 4096, 32 layers, r=16 on q_proj
and v_proj, gradient checkpointing. Local steps are those of `FederatedTrainer`; the bare loop is forward (autocast),
backward, clip, fused AdamW on the same model and batches, nothing else. Both take turns; ratios are medians of pairs.
Aggregation: the updates of `--clients` clients, each of 64 modules of that shape, on the CPU at the start, computed
there and on the device in one run.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_hf import FederatedConfig, FederatedTrainer, aggregate
from fedlora_hf.adapter.slot import with_adapter
from fedlora_hf.training.local import local_batches
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts import common
from scripts.benchmarks import scoring

CLIENT = "client"


def random_llama(case: argparse.Namespace) -> LlamaForCausalLM:
    """Random bfloat16 weights, made on the device: a 7B model is never in the host's memory."""
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 43 // 16,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        vocab_size=case.vocabulary,
        max_position_embeddings=max(case.tokens, 128),
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(case.device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def federated(case: argparse.Namespace, folder: str) -> FederatedTrainer:
    """The trainer with one client that has enough examples for one round's steps."""
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = with_adapter(random_llama(case), config, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, case.vocabulary, (case.batch * case.steps, case.tokens), generator=generator).tolist()
    args = FederatedConfig(
        output_dir=folder,
        local_steps=case.steps,
        per_device_train_batch_size=case.batch,
        bf16=True,
        activation_checkpointing=True,
        aggregation="fedavg",
        report_to="none",
        disable_tqdm=True,
        use_cpu=case.device == "cpu",
    )
    return FederatedTrainer(model, args, {CLIENT: Dataset.from_dict({"input_ids": ids, "labels": ids})})


def bare_loop(trainer: FederatedTrainer, parameters: list[torch.nn.Parameter]) -> None:
    """What a careful person writes by hand for the same steps, in the same precision."""
    args, device = trainer.args, trainer.args.device
    # Underneath the autocast that the accelerator has put around the model.
    forward = getattr(trainer.model, "_original_forward", trainer.model)
    batches = local_batches(trainer.clients[CLIENT].train, trainer.data_collator, args, derive_seed(0, CLIENT))
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    trainer.model.train()
    total = torch.zeros((), device=device)
    for _ in range(args.local_steps or 0):
        (batch,) = next(batches)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    total.item()


def client(case: argparse.Namespace) -> list[dict[str, Any]]:
    """A client's local steps beside a bare loop, in a model of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return local_steps(case, federated(case, folder))


def local_steps(case: argparse.Namespace, trainer: FederatedTrainer) -> list[dict[str, Any]]:
    """Tokens a second and peak device memory of the bare loop and of a client's local training; and swap times."""
    trainer.slot.train_only(("A", "B"))
    parameters = list(trainer.slot.parameters())
    kinds = {
        "bare PEFT loop": lambda _: bare_loop(trainer, parameters),
        "FederatedTrainer.train_client": lambda _: trainer.train_client(CLIENT, 1),
    }
    peaks = {}
    for kind, work in kinds.items():
        work(CLIENT)
        peaks[kind] = device_peak(case.device, lambda work=work: work(CLIENT))
    times = common.in_turns(kinds, [CLIENT], case.repeats)
    tokens = case.steps * case.batch * case.tokens
    rows = []
    for row in common.compared(times, "bare PEFT loop"):
        speed = round(tokens / (float(str(row["ms"])) / 1e3), 1)
        peak = peaks[str(row["kind"])]
        rows.append(
            measured(str(row["kind"]), row["ms"], tokens_s=speed, speed_ratio=round(1 / row["ratio"], 3), peak_GiB=peak)
        )  # type: ignore[operator]
    state = trainer.slot.read()
    for kind, work in (
        ("write an adapter into the model", lambda: trainer.slot.write(state)),
        ("read it out", trainer.slot.read),
    ):
        seconds = statistics.median(common.timed(work).wall for _ in range(case.repeats))
        rows.append(measured(kind, round(seconds * 1e3, 3)))
    return rows


def aggregation(case: argparse.Namespace) -> list[dict[str, Any]]:
    """The mean of the products and clair, on all modules; then clair on eight whose spectra fall as those of trained
    factors do: in a flat one there is no gap at the rank kept, and a best approximation is not well determined."""
    rows = aggregated(case, ("product_mean", "clair"), 2 * case.layers)
    return [*rows, *aggregated(case, ("clair",), 8, falling=2.0)]


def robust_aggregation(case: argparse.Namespace) -> list[dict[str, Any]]:
    """Methods that compare clients, on eight modules, and those that form matrices, on one of a quarter of the width:
    they sort every entry of all clients' products, which takes a processor minutes at full width."""
    narrow = argparse.Namespace(**{**vars(case), "hidden": max(case.hidden // 4, 2 * case.rank)})
    matrices = aggregated(narrow, ("median", "trimmed_mean"), 1)
    return [*aggregated(case, ("multikrum", "geometric_median"), 8), *matrices]


def aggregated(
    case: argparse.Namespace, methods: Sequence[str], modules: int, falling: float = 0.0
) -> list[dict[str, Any]]:
    """Time to aggregate updates that lie on the CPU, on the CPU and on the device, reading the global adapter only:
    medians of `--repeats` calls, of one where a call takes over five seconds; whether both flag the same, and how far
    the two global adapters are apart (relative, worst module)."""
    modules = min(modules, 2 * case.layers)
    updates = [random_update(case, number, modules, falling) for number in range(case.clients)]
    one = [replace(update, state=update.state.restricted({"module_00"})) for update in updates]
    rows = []
    for method in methods:
        found: list[Aggregate] = []
        for device in dict.fromkeys(("cpu", case.device)):
            if device != "cpu":
                aggregate(one, method, device=device)  # what starts with the first call is not counted
            work = partial(combined, updates, method, device, found)
            seconds = [common.timed(work).wall]
            while len(seconds) < case.repeats and seconds[0] < 5:
                found.pop()
                seconds.append(common.timed(work).wall)
            what = f"{modules} modules of {case.hidden}{', falling' if falling else ''}"
            kind = f"{method}, {case.clients} clients x {what} on {device}"
            beside = difference(found) if found[1:] else ""
            rows.append(measured(kind, round(statistics.median(seconds) * 1e3, 1), beside_cpu=beside))
    return rows


def scoring_of(case: argparse.Namespace) -> list[dict[str, Any]]:
    """A split scored by a model of SmolLM2-135M's shape with its 49,152 words: all logits and answered ones."""
    asked = ["--device", case.device, "--tolerance", "1e-4"]  # GPUs sum in other orders for other batches
    tiny = ["--hidden", "36", "--layers", "1", "--vocabulary", "512", "--examples", "6", "--longest", "48"]
    large = ["--layers", "30", "--examples", "64", "--longest", "512", "--batch", "16"]
    rows = scoring.measured(scoring.parse_arguments([*asked, *(large if case.device == "cuda" else tiny)]))
    return [
        measured(
            f"scoring, {row['kind']}",
            row["ms"],
            speed_ratio=round(1 / float(str(row["ratio"])), 3),
            peak_GiB=round(float(str(row["peak_MiB"] or 0)) / 1024, 3),
        )
        for row in rows
    ]


def combined(updates: Sequence[ClientUpdate], method: str, device: str, found: list[Aggregate]) -> None:
    found.append(aggregate(updates, method, device=device))


def difference(found: Sequence[Aggregate]) -> str:
    """Whether two results flag the same clients, and the largest relative difference of a module."""
    one, other = (result.state for result in found)
    apart = max((one[m] - other[m]).norm() / max(one[m].norm(), 1e-30) for m in one)
    same = found[0].flagged == found[1].flagged
    return f"{'the same' if same else 'OTHER'} flags, {apart:.1e} apart"


def random_update(case: argparse.Namespace, number: int, modules: int, falling: float = 0.0) -> ClientUpdate:
    """A client that shares half of its directions with all others; both halves fall over so many powers of ten."""
    state, size = {}, torch.logspace(0, -falling, case.rank // 2).repeat(2)
    for module in range(modules):
        shared, own = (torch.Generator().manual_seed(derive_seed(0, module, who)) for who in ("all", number))
        A = torch.cat([torch.randn(case.rank // 2, case.hidden, generator=g) for g in (shared, own)])
        B = torch.cat([torch.randn(case.hidden, case.rank // 2, generator=g) for g in (shared, own)], dim=1)
        state[f"module_{module:02d}"] = LoraFactors(A / case.hidden, B * size, 2.0)
    return ClientUpdate(f"client-{number:02d}", AdapterState(state), 100)


def device_peak(device: str, work: Any) -> float | str:
    """Peak GiB that the device's allocator held during a call; nothing on a CPU."""
    if device != "cuda":
        work()
        return ""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def measured(
    kind: str,
    ms: object,
    tokens_s: object = "",
    speed_ratio: object = "",
    peak_GiB: object = "",
    beside_cpu: object = "",
) -> dict[str, Any]:
    """One row of the table: every part's rows have these columns."""
    known = {"kind": kind, "ms": ms, "tokens_s": tokens_s, "speed_ratio": speed_ratio, "peak_GiB": peak_GiB}
    return {**known, "beside_cpu": beside_cpu}
