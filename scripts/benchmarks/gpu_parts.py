"""What `scripts.benchmarks.gpu` measures: each part takes the sizes and gives rows (see `measured`).

The model is made on the device in bfloat16 with random weights (no download): hidden 4096, 32 layers, r=16 on q_proj
and v_proj, gradient checkpointing. Local steps are those of `FederatedTrainer`; the bare loop is forward (autocast),
backward, clip, fused AdamW on the same model and batches, nothing else. Both take turns; ratios are medians of pairs.
Aggregation: the updates of `--clients` clients, each of 64 modules of that shape, held on the CPU and on the device.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_hf import FederatedConfig, FederatedTrainer, aggregate
from fedlora_hf.adapter.slot import with_adapter
from fedlora_hf.training.local import local_batches
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors
from fedlora_hf.util.seeding import derive_seed
from scripts import common

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
    """Time to aggregate the clients' updates, on the CPU and on the device, reading the global adapter only."""
    rows = []
    for device in dict.fromkeys(("cpu", case.device)):
        updates = [random_update(case, number, device) for number in range(case.clients)]
        for method in ("product_mean", "clair"):
            seconds = common.timed(lambda updates=updates, method=method: aggregate(updates, method)).wall  # type: ignore[misc]
            kind = f"{method}, {case.clients} clients x {2 * case.layers} modules on {device}"
            rows.append(measured(kind, round(seconds * 1e3, 1)))
    return rows


def random_update(case: argparse.Namespace, number: int, device: str) -> ClientUpdate:
    """A client that shares half of its directions with all others."""
    state = {}
    for module in range(2 * case.layers):
        shared, own = (torch.Generator().manual_seed(derive_seed(0, module, who)) for who in ("all", number))
        A = torch.cat([torch.randn(case.rank // 2, case.hidden, generator=g) for g in (shared, own)])
        B = torch.cat([torch.randn(case.hidden, case.rank // 2, generator=g) for g in (shared, own)], dim=1)
        state[f"module_{module:02d}"] = LoraFactors((A / case.hidden).to(device), B.to(device), 2.0)
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
    kind: str, ms: object, tokens_s: object = "", speed_ratio: object = "", peak_GiB: object = ""
) -> dict[str, Any]:
    """One row of the table: every part's rows have these columns."""
    return {"kind": kind, "ms": ms, "tokens_s": tokens_s, "speed_ratio": speed_ratio, "peak_GiB": peak_GiB}
