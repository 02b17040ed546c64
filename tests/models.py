"""Tiny models, a tokenizer and clients' data, built on the spot: the same for every test, drawn from seeds alone."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import sample_data
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fedlora_hf import FederatedConfig, FederatedTrainer
from fedlora_hf.methods import METHODS

VOCABULARY = 64
CLASSES = 3
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny_llama(seed: int = 0, vocab_size: int = VOCABULARY, **changes: Any) -> LlamaForCausalLM:
    """A causal LM of two layers and hidden size 16, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**_SHAPE, **changes}))


def tiny_classifier(seed: int = 0, vocab_size: int = VOCABULARY, **changes: Any) -> LlamaForSequenceClassification:
    """The same size, with a head of three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=vocab_size, num_labels=CLASSES, **{**_SHAPE, **changes})
        )


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens with EOS and padding and no BOS, trained on generated records."""
    model = Tokenizer(tokenizer_models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        [f"{record['instruction']} {record['response']}" for record in sample_data.dolly_records(100)],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")


def save_base(folder: Path, classifier: bool = False) -> Path:
    """A tiny base model and its tokenizer as a folder that `from_pretrained` reads."""
    tokenizer = tiny_tokenizer()
    build = tiny_classifier if classifier else tiny_llama
    build(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_examples(count: int, seed: int, length: int = 10) -> datasets.Dataset:
    """`count` tokenised examples of 6 to `length` tokens that count upwards in steps of the seed, the prompt masked."""
    generator = torch.Generator().manual_seed(seed)
    step = 1 + seed % 5
    rows = []
    for _ in range(count):
        size = int(torch.randint(6, length + 1, (1,), generator=generator))
        start = int(torch.randint(2, VOCABULARY, (1,), generator=generator))
        ids = [2 + (start + step * place) % (VOCABULARY - 2) for place in range(size)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return datasets.Dataset.from_list(rows)


def class_examples(count: int, seed: int) -> datasets.Dataset:
    """`count` tokenised examples whose class is the remainder of their first token by the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (count, 6), generator=generator).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": [row[0] % CLASSES for row in ids]})


def token_clients(
    sizes: Mapping[str, int], make: Any = token_examples, held_out: int = 0
) -> dict[str, dict[str, datasets.Dataset]]:
    """{client id: splits} of tokenised examples; `held_out` examples each for validation and test."""
    clients = {}
    for number, (client_id, size) in enumerate(sizes.items()):
        clients[client_id] = {"train": make(size, number)}
        if held_out:
            clients[client_id]["validation"] = make(held_out, number + 100)
            clients[client_id]["test"] = make(held_out, number + 200)
    return clients


def options(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """FederatedConfig's arguments for a tiny, quiet run in `folder`."""
    return {
        "output_dir": str(folder),
        "aggregation": "fedavg",
        "num_rounds": 2,
        "local_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_r": 2,
        "lora_alpha": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def federation(
    folder: Path | str, clients: Mapping[str, Any] | None = None, *, model: Any = None, more: Any = None, **changes: Any
) -> FederatedTrainer:
    """A trainer of a tiny model over three clients of unequal size; `more`: further arguments of FederatedTrainer.

    Where the method compares clients with the server, it is given the clients' kind of data."""
    method = METHODS.get(str(changes.get("aggregation")))
    if method and method.needs_server and "server_dataset" not in changes:
        changes["server_dataset"] = "server.jsonl"
        splits = clients or token_clients({"ada": 4})
        first = splits[min(splits)]
        more = {"server_dataset": first["train"] if isinstance(first, datasets.DatasetDict) else first, **(more or {})}
    return FederatedTrainer(
        model or tiny_llama(),
        FederatedConfig(**options(folder, **changes)),
        clients or token_clients({"ada": 4, "bob": 6, "eve": 5}),
        **(more or {}),
    )


def weight_files(folder: Path) -> dict[str, bytes]:
    """{path under `folder`: content} of every safetensors file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def logits(model: Any) -> Tensor:
    """The model's logits on a few fixed tokens, in evaluation mode."""
    ids = torch.arange(2, 34).reshape(4, 8)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits
    model.train(was_training)
    return found
