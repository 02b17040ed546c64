"""Makes a small base model without downloads: a Llama-architecture causal LM and its tokenizer, from instruction text.

    python scripts/make_base_model.py --data dolly.jsonl --data natural_instructions/ --minutes 6 --output_dir base

The model learns whole texts, prompt and completion alike, packed into blocks; LoRA has then something to adapt. With
--steps the result is a function of the arguments (on one machine); with --minutes it depends on the machine's speed.
Where there is a GPU it is used, in bfloat16 and compiled (--device cpu: not), and the weights are saved in float32.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from fedlora_hf.data.formats import load_examples
from fedlora_hf.errors import ConfigError, DataError, FedLoraError
from fedlora_hf.util.seeding import derive_seed

PAD, EOS = "<pad>", "<eos>"
WARMUP = 0.05
WEIGHT_DECAY = 0.1
MAX_HELD_OUT_BLOCKS = 64
SHOWN = 10  # steps between two looks at the loss


@dataclass(frozen=True)
class Text:
    """Prompt and completion of one example."""

    prompt: str
    completion: str


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; --minutes is 8 when neither it nor --steps is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="file, task folder or Hub id; may be repeated")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--hidden", type=int, default=192, help="width (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=6, help="attention heads (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="default %(default)s")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="wall-clock budget of the training (default 8)")
    length.add_argument("--steps", type=int, help="optimiser steps instead of minutes")
    parser.add_argument("--batch_size", type=int, default=4, help="blocks a step (default %(default)s)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens a block (default %(default)s)")
    parser.add_argument("--context_length", type=int, default=1024, help="positions of the model (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak (default %(default)s)")
    parser.add_argument(
        "--holdout_fraction", type=float, default=0.05, help="share of examples never trained on (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--no_compile", dest="compile", action="store_false", help="on a GPU: run the model as it is")
    options = parser.parse_args(arguments)
    if options.minutes is None and options.steps is None:
        options.minutes = 8.0
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for sizes that make no model."""
    positive = ("hidden", "layers", "heads", "steps", "minutes", "batch_size", "max_length", "learning_rate")
    for name in positive:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value}: must be greater than 0; raise it")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that torch can use; leave it out")
    if options.hidden % (2 * options.heads):
        raise ConfigError(
            f"--hidden {options.hidden}: must be a multiple of twice the {options.heads} heads; change either"
        )
    if options.vocab_size < 300:
        raise ConfigError(f"--vocab_size {options.vocab_size}: must be at least 300, as there are 256 bytes; raise it")
    if not 0 <= options.holdout_fraction < 1:
        raise ConfigError(f"--holdout_fraction {options.holdout_fraction}: must be at least 0 and below 1; lower it")
    if options.max_length > options.context_length:
        raise ConfigError(
            f"--max_length {options.max_length}: must not exceed the context of {options.context_length}; raise "
            "--context_length"
        )


def read_texts(sources: list[str], holdout_fraction: float, seed: int) -> tuple[list[Text], list[Text]]:
    """(texts to train on, texts held out), each shuffled; the choice is a function of the seed."""
    texts = [Text(*pair) for source in sources for pair in _pairs(source)]
    order = np.random.default_rng(derive_seed(seed, "holdout")).permutation(len(texts))
    shuffled = [texts[place] for place in order]
    held_out = round(len(texts) * holdout_fraction)
    return shuffled[held_out:], shuffled[:held_out]


def _pairs(source: str) -> Iterator[tuple[str, str]]:
    examples = load_examples(source)
    return zip(examples["prompt"][:], examples["completion"][:], strict=True)


def make_tokenizer(texts: list[Text], vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be written, and digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.prompt + text.completion for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def pack(texts: list[Text], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """All texts in a row, an EOS after each, cut into blocks: (blocks, length) ids; the last part block is left out."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text.prompt + text.completion, verbose=False)["input_ids"], tokenizer.eos_token_id]
    blocks = len(ids) // length
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def make_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the flags' size with seeded random weights and one matrix for input and output embeddings."""
    # Eight thirds of the width, as in Llama, up to a multiple of 32.
    intermediate = -(-options.hidden * 8 // 3 // 32) * 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(options.seed, "weights"))
        return LlamaForCausalLM(config)


def batches(blocks: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """(batch, length) for ever: every epoch goes through the blocks in another order."""
    epoch = 0
    while True:
        order = np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(len(blocks))
        for start in range(0, len(order), batch_size):
            yield blocks[order[start : start + batch_size]]
        epoch += 1


def learning_rate(peak: float, share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak; `share` of the training is done."""
    if share < WARMUP:
        return peak * (share / WARMUP * 0.95 + 0.05)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, blocks: Tensor, batch_size: int) -> float:
    """Mean cross-entropy a token, in nats."""
    model.eval()
    parts = blocks[:MAX_HELD_OUT_BLOCKS].to(model.device).split(batch_size)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in parts]
    return sum(losses) / sum(map(len, parts))


def train(model: LlamaForCausalLM, blocks: Tensor, options: argparse.Namespace) -> tuple[int, float]:
    """AdamW until the steps or the minutes are spent; returns (steps, seconds)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    on_gpu = options.device == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=on_gpu or None)
    model.train()
    forward = torch.compile(model) if on_gpu and options.compile else model
    started, step, share = time.monotonic(), 0, 0.0
    columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("training", total=1.0, state="")
        for batch in batches(blocks, options.batch_size, options.seed):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options.learning_rate, share)
            ids = batch.to(options.device, non_blocking=True)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds = time.monotonic() - started
            share = step / options.steps if options.steps is not None else seconds / (60 * options.minutes)
            if step % SHOWN == 1 or share >= 1:  # reading the loss waits for the GPU
                speed = step * batch.numel() / max(seconds, 1e-9)
                state = f"step {step}, loss {loss.item():.3f}, {speed:,.0f} tokens/s"
                progress.update(bar, completed=min(share, 1.0), state=state)
            if share >= 1:
                break
    return step, time.monotonic() - started


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 48) -> str:
    """The greedy answer to one prompt."""
    model.eval()
    ids = torch.tensor(
        [tokenizer(prompt, verbose=False)["input_ids"][-model.config.max_position_embeddings + tokens :]],
        device=model.device,
    )
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)  # type: ignore[misc]
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [small, base-model]
---
# A small base model

A Llama-architecture causal LM made from scratch by `scripts/make_base_model.py` of fedlora_hf, as a base for federated
LoRA runs without downloads. It writes plausible fragments and knows little; it is no assistant.

| | |
|---|---|
| parameters | {parameters:,} |
| hidden, layers, heads, vocabulary | {hidden}, {layers}, {heads}, {vocabulary} |
| made of | {data} |
| examples used, held out | {used:,}, {held_out:,} (seed {seed}, holdout_fraction {holdout_fraction}) |
| training | {steps:,} steps of {batch_size} x {max_length} tokens in {seconds:.0f} s ({speed:,.0f} tokens/s) |
| {measured} loss before, after | {before:.3f}, {after:.3f} nats a token |

The licences of the data above apply to what is derived from it.
"""


def main(arguments: list[str] | None = None) -> int:
    """Builds, trains, saves; 2 and one line on bad input, else 0."""
    options = parse_arguments(arguments)
    try:
        check_options(options)
        build(options)
    except FedLoraError as error:
        print(f"make_base_model: {error}", file=sys.stderr)
        return 2
    return 0


def build(options: argparse.Namespace) -> None:
    """The whole work of the script, from the data to the output folder."""
    transformers_logging.disable_progress_bar()
    used, held_out = read_texts(options.data, options.holdout_fraction, options.seed)
    tokenizer = make_tokenizer(used, options.vocab_size, options.context_length)
    blocks = pack(used, tokenizer, options.max_length)
    if len(blocks) == 0:
        raise DataError(
            f"--max_length {options.max_length}: the {len(used)} examples do not fill one block; lower it, or give more"
        )
    unseen = pack(held_out, tokenizer, options.max_length)
    measured, name = (unseen, "held-out") if len(unseen) else (blocks, "training")
    model = make_model(options, tokenizer).to(options.device)
    print(f"{model.num_parameters():,} parameters, {blocks.numel():,} tokens of {len(used):,} examples")
    before = mean_loss(model, measured, options.batch_size)
    steps, seconds = train(model, blocks, options)
    after = mean_loss(model, measured, options.batch_size)
    speed = steps * options.batch_size * options.max_length / seconds
    print(f"{name} loss {before:.3f} -> {after:.3f} nats a token; {steps} steps, {speed:,.0f} tokens/s")
    shown = (held_out or used)[0]
    print(f"--- a prompt\n{shown.prompt}\n--- its answer by the model\n{sample(model, tokenizer, shown.prompt)}")
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    card = CARD.format(
        parameters=model.num_parameters(),
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        vocabulary=len(tokenizer),
        data=", ".join(Path(source).name if Path(source).exists() else source for source in options.data),
        used=len(used),
        held_out=len(held_out),
        seed=options.seed,
        holdout_fraction=options.holdout_fraction,
        steps=steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seconds=seconds,
        speed=speed,
        measured=name,
        before=before,
        after=after,
    )
    (options.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(f"saved to {options.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
