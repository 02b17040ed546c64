"""Ids and masks of odd chats equal those that TRL's SFTTrainer makes of them, where TRL is installed (seen: 1.16.0)."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import chat_templates as chats
import datasets
import models
import pytest

from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.tokenize import tokenize_examples
from fedlora_hf.data.wording import choose_wording

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def of_trl(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **options: Any) -> list[Any]:
    """[(ids, labels)] of SFTTrainer's own preparation."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(folder), report_to="none", use_cpu=True, max_length=None, disable_tqdm=True, **options)
    data = datasets.Dataset.from_list(rows)
    model = models.tiny_llama(vocab_size=len(tokenizer) + 8)
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def of_ours(rows: list[dict[str, Any]], tokenizer: Any, all_turns: bool) -> list[Any]:
    wording = choose_wording(tokenizer, "auto", all_turns=all_turns)
    examples = load_examples(datasets.Dataset.from_list(rows))
    made = tokenize_examples(examples, tokenizer, max_length=10_000, wording=wording)
    return [(row["input_ids"], row["labels"]) for row in made]


def test_the_last_turn(tokenizer: Any, tmp_path: Path) -> None:
    chat = chats.with_template(tokenizer, chats.PLAIN)
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in chats.ODD_CHATS]
    assert len(rows) >= 10
    assert of_ours(rows, chat, False) == of_trl(rows, chat, tmp_path)


def test_all_turns_by_the_templates_marks(tokenizer: Any, tmp_path: Path) -> None:
    chat = chats.with_template(tokenizer, chats.MARKED)
    rows = [{"messages": turns} for turns in chats.ODD_CHATS]
    assert of_ours(rows, chat, True) == of_trl(rows, chat, tmp_path, assistant_only_loss=True)
