"""What the data tests share: a byte-level tokenizer trained on the spot, and small files of generated records."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import sample_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens with EOS and padding and no BOS."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    records = sample_data.dolly_records(200)
    model.train_from_iterator(
        [f"{record['instruction']} {record['response']}" for record in records],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    """80 distinct records in Dolly's schema, ten a category, and three repeats."""
    return sample_data.write_dolly(tmp_path / "dolly.jsonl", 80, duplicates=3)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Four Natural Instructions task files of ten instances."""
    return sample_data.write_natural_instructions(tmp_path / "tasks", tasks=4, instances=10)
