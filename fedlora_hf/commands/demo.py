"""`fedlora demo`: a text-copying federation with contaminated clients on a Transformer trained on the spot.

The base model learns to copy a line of letters. In the federation's language a line is copied with some letters
replaced: most replacements are common to all clients, two are a client's own. Eight clients hold such lines, few of
them; four hold lines whose copies are random letters. Every client alone, FedAvg and CLAIR train on the same data for
the same number of steps.
"""
# SPDX-License-Identifier: Apache-2.0

import string
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fedlora_hf.commands.summary import print_summary
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.data.tokenize import tokenize_examples
from fedlora_hf.options.facts import check_number
from fedlora_hf.options.numbers import NUMBERS
from fedlora_hf.record.record import RunRecord
from fedlora_hf.trainer import FederatedTrainer
from fedlora_hf.util.progress import Progress
from fedlora_hf.util.seeding import derive_seed

NUM_CLIENTS, NUM_CONTAMINATED = 12, 4
LINE, LINES, HELD_OUT = 8, 6, 40  # six lines show a client only some of the letters
COMMON, OWN = 12, 2  # letters replaced for everybody, and for one client alone
PRETRAINING = 400  # steps; copying is learnt after about 300
LETTERS = string.ascii_lowercase
BASELINES = {"local": "every client alone", "fedavg": "FedAvg of the factors", "clair": "CLAIR"}


def demo(output_dir: str, seed: int = 0) -> dict[str, RunRecord]:
    """Run the demo, print what came out, leave CLAIR's output folder and the baselines' below it; the three records."""
    check_number("seed", seed, *NUMBERS["seed"])
    disable_progress_bar()  # of saving and loading a few kilobytes
    progress = Progress()
    folder = Path(output_dir)
    progress.say("1/2  a small Transformer learns to copy lines of letters")
    tokenizer = letter_tokenizer()
    base = copying_model(tokenizer, seed, progress)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    clients = federation(seed)
    records = {}
    for method, title in BASELINES.items():
        progress.say(f"2/2  {NUM_CLIENTS} clients, {NUM_CONTAMINATED} of them contaminated: {title}")
        place = folder if method == "clair" else folder / "baselines" / method
        args = _config(str(place), method, seed)
        facts = {
            "kind": "demo",
            "model": {"name_or_path": str(folder / "base"), "local": True, "task": "causal_lm", "dtype": "float32"},
            "data": {"dataset": "text copying, made on the spot", "local": True, "partition_by": "client"},
        }
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        trainer = FederatedTrainer(model, args, clients, processing_class=tokenizer, record=facts)
        trainer.train()
        records[method] = trainer.run.record
    print_summary(records["clair"], output_dir)
    _print_comparison(records)
    return records


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and the signs around a line."""
    signs = ["<pad>", "<s>", "</s>", "\n"]
    vocabulary = {token: number for number, token in enumerate([*signs, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def lines(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(rng.choice(list(LETTERS), LINE)) for _ in range(count)]


def examples(rng: np.random.Generator, count: int, mapping: dict[str, str] | None) -> Dataset:
    """Lines and their copies with the letters of `mapping` replaced; None: the copies are random letters."""
    prompts = lines(rng, count)
    copies = (
        lines(rng, count)
        if mapping is None
        else ["".join(mapping.get(letter, letter) for letter in p) for p in prompts]
    )
    return Dataset.from_dict(
        {"prompt": [f"{p}\n" for p in prompts], "completion": copies, "references": [[c] for c in copies]}
    )


def federation(seed: int) -> dict[str, DatasetDict]:
    """The clients' data. Contaminated clients are spread over the ids, so that no order gives them away."""
    rng = np.random.default_rng(derive_seed(seed, "demo"))
    order = rng.permutation(list(LETTERS))
    common = dict(zip(order[:COMMON], np.roll(order[:COMMON], 1), strict=True))
    contaminated = set(rng.choice(NUM_CLIENTS, NUM_CONTAMINATED, replace=False).tolist())
    clients = {}
    for number in range(NUM_CLIENTS):
        own = rng.permutation(order[COMMON:])[:OWN]
        mapping = None if number in contaminated else {**common, own[0]: own[1], own[1]: own[0]}
        sizes = {"train": LINES, "validation": HELD_OUT // 2, "test": HELD_OUT}
        name = f"client-{number:02d}{'-contaminated' if mapping is None else ''}"
        clients[name] = DatasetDict({split: examples(rng, size, mapping) for split, size in sizes.items()})
    return clients


def copying_model(tokenizer: PreTrainedTokenizerFast, seed: int, progress: Progress) -> LlamaForCausalLM:
    """A two-layer Llama trained until it copies lines of letters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "base"))
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        rng = np.random.default_rng(derive_seed(seed, "base"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        collate = Collator(int(tokenizer.pad_token_id))
        for _ in progress.over(range(PRETRAINING), "copying"):
            batch = tokenize_examples(examples(rng, 64, {}), tokenizer, max_length=32)
            loss = model(**collate(list(batch))).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def _config(output_dir: str, method: str, seed: int) -> FederatedConfig:
    return FederatedConfig(
        output_dir=output_dir,
        aggregation=method,
        # Alone means alone: without a federation there is nothing else to choose from.
        personalise="method" if method == "local" else "select",
        seed=seed,
        num_rounds=4,
        local_steps=20,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        learning_rate=5e-3,
        lora_r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        max_length=32,
        generation_examples=0,
        report_to="none",
    )


def _print_comparison(records: dict[str, RunRecord]) -> None:
    """Accuracy of the benign clients under each method, contaminated clients left out of every mean."""
    table = Table(title=f"token accuracy on the {NUM_CLIENTS - NUM_CONTAMINATED} benign clients' own test lines")
    for column in ("", "global adapter", "personal adapters"):
        table.add_column(column, justify="left" if not column else "right")
    for method, title in BASELINES.items():
        record = records[method]
        table.add_row(title, *(f"{benign_accuracy(record, kind):.3f}" for kind in ("global", "personalised")))
    Console().print(table)


def benign_accuracy(record: RunRecord, kind: str) -> float:
    """Mean token accuracy over the benign clients, of the "global" or the "personalised" adapter."""
    benign = [facts["metrics"][kind] for client, facts in record.clients.items() if "contaminated" not in client]
    return sum(metrics["token_accuracy"] for metrics in benign) / len(benign)
