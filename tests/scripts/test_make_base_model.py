"""The base model script: what it saves loads with stock transformers, steps repeat themselves, text is learned."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import sample_data
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import make_base_model as script

SMALL = ["--hidden", "32", "--layers", "1", "--heads", "2", "--vocab_size", "320", "--max_length", "48"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    file = sample_data.write_dolly(folder / "dolly.jsonl", 60)
    tasks = sample_data.write_natural_instructions(folder / "tasks", tasks=2, instances=20)
    return ["--data", str(file), "--data", str(tasks)]


@pytest.fixture(scope="module")
def base(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    assert script.main([*data, *SMALL, "--steps", "30", "--output_dir", str(folder)]) == 0
    return folder


def test_the_base_loads_and_writes_any_text(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert model.config.model_type == "llama"
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (
        32,
        1,
        len(tokenizer),
    )
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == model.config.pad_token_id
    for text in ("Instruction:\nSay 1234.\n\nAnswer:\n", "Grüße 😀\t\u2028 end ", " two  blanks ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_the_card_says_what_it_was_made_of(base: Path) -> None:
    card = (base / "README.md").read_text()
    assert "| made of | dolly.jsonl, tasks |" in card
    assert "| examples used, held out | 95, 5 (seed 0, holdout_fraction 0.05) |" in card
    assert "30 steps of 4 x 48 tokens" in card
    assert str(base.parent) not in card
    losses = next(line for line in card.splitlines() if "loss before, after" in line)
    before, after = (float(word) for word in losses.replace(",", " ").split() if word.replace(".", "").isdigit())
    assert after < before - 0.5


def test_steps_repeat_and_the_seed_matters(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        torch.rand(1)  # The state of the global generator must not matter.
        arguments = [*data, *SMALL, "--steps", "2", "--seed", seed, "--output_dir", str(tmp_path / name)]
        assert script.main(arguments) == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert "held-out loss" in capsys.readouterr().out


def test_minutes_end_the_training(data: list[str], tmp_path: Path) -> None:
    assert script.main([*data, *SMALL, "--minutes", "0.01", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_held_out_texts_are_not_trained_on(data: list[str]) -> None:
    used, held_out = script.read_texts(data[1::2], 0.25, seed=0)
    assert (len(used), len(held_out)) == (75, 25)
    assert not set(used) & set(held_out)
    assert script.read_texts(data[1::2], 0.25, seed=0) == (used, held_out)
    assert script.read_texts(data[1::2], 0.25, seed=1) != (used, held_out)


def test_blocks_are_the_texts_in_a_row(data: list[str]) -> None:
    texts, _ = script.read_texts(data[1::2], 0.0, seed=0)
    tokenizer = script.make_tokenizer(texts, 320, 512)
    blocks = script.pack(texts, tokenizer, 10)
    assert blocks.shape[1] == 10
    row = "".join(f"{text.prompt}{text.completion}<eos>" for text in texts)
    assert row.startswith(tokenizer.decode(blocks.flatten()))


def test_every_epoch_sees_every_block_once() -> None:
    blocks = torch.arange(10).view(10, 1)
    made = script.batches(blocks, 4, seed=0)
    first, second = ([next(made) for _ in range(3)] for _ in range(2))
    assert (
        sorted(torch.cat(first).flatten().tolist()) == sorted(torch.cat(second).flatten().tolist()) == list(range(10))
    )
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    assert 0 < script.learning_rate(1.0, 0.0) < 0.1
    assert script.learning_rate(1.0, script.WARMUP) == pytest.approx(1.0)
    assert script.learning_rate(1.0, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (["--data", "absent.jsonl"], "'absent.jsonl': no such file"),
        (["--hidden", "30"], "--hidden 30: must be a multiple of twice the 2 heads"),
        (["--layers", "0"], "--layers 0: must be greater than 0"),
        (["--vocab_size", "100"], "--vocab_size 100: must be at least 300"),
        (["--holdout_fraction", "1"], "--holdout_fraction 1.0: must be at least 0 and below 1"),
        (["--max_length", "2000"], "--max_length 2000: must not exceed the context"),
        (["--max_length", "90000", "--context_length", "90000"], "do not fill one block"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    part: str,
) -> None:
    assert script.main([*data, *SMALL, "--steps", "1", "--output_dir", str(tmp_path / "out"), *changed]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
