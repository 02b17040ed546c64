"""From examples to token ids: the prompt is masked from the loss, the completion ends with EOS, nothing is padded."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import TYPE_CHECKING

import datasets

from fedlora_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Of an example that is too long, the prompt keeps at least this share of the tokens (our choice).
PROMPT_SHARE = 0.25


def tokenize_examples(
    examples: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, task: str = "causal_lm"
) -> datasets.Dataset:
    """`input_ids` and `labels` of every example, in the order of `examples`, at most `max_length` tokens each.

    Causal LM: prompt and completion are tokenised as one text, as a reader would meet them, and EOS is appended.
    Labels are IGNORED for the prompt. A token that holds the end of the prompt and the start of the completion counts
    as completion, so every character of a completion is learned. (Tokenizers that do not know which character a token
    came from tokenise the two apart.) An example that is too long loses the start of its prompt, down to a quarter of
    `max_length`, then the end of its completion with the EOS. Every example keeps a label that has a token before it.

    Sequence classification: `input_ids` cut at `max_length`, and `labels` the class number.
    """
    if max_length < 4:
        raise ConfigError(f"max_length {max_length}: must be at least 4 tokens; 256 or more is usual")
    if task == "sequence_classification":
        texts = examples["text"][:]
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": examples["label"][:]})
    eos = _eos(tokenizer)
    first = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    rows = [
        _fit(prompt or [first], [*completion, eos], max_length, tokenizer.bos_token_id)
        for prompt, completion in _pairs(examples["prompt"][:], examples["completion"][:], tokenizer)
    ]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in rows],
            "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in rows],
        }
    )


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> list[list[int]]:
    """The ids of bare prompts, for generation: begun and cut as in training, and never empty."""
    eos = _eos(tokenizer)
    first = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    ids = tokenizer(list(prompts), verbose=False)["input_ids"] if prompts else []
    return [_keep_end(_clean(row, tokenizer) or [first], max_length, tokenizer.bos_token_id) for row in ids]


def with_chat_template(examples: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase") -> datasets.Dataset:
    """Causal examples whose prompts are worded as one user turn of the tokenizer's chat template, for tuned models.

    Raises ConfigError when the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r}: has no chat template; use the plain prompts, or the tokenizer of a "
            "chat model"
        )
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
        for prompt in examples["prompt"][:]
    ]
    return datasets.Dataset.from_dict({**examples[:], "prompt": prompts}, features=examples.features)


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r}: has no eos_token, and every completion ends with it; set "
            "tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def _pairs(
    prompts: list[str], completions: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each example, without an EOS."""
    if not prompts:
        return []
    if not tokenizer.is_fast:
        before = tokenizer(prompts, verbose=False)["input_ids"]
        after = tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]
        return [(_clean(p, tokenizer), c) for p, c in zip(before, after, strict=True)]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    encoded = tokenizer(texts, verbose=False)
    pairs: list[tuple[list[int], list[int]]] = []
    for row, (ids, prompt, text) in enumerate(zip(encoded["input_ids"], prompts, texts, strict=True)):
        # The first token of the completion; a character may belong to none (a blank, in some tokenizers).
        tokens = (encoded.char_to_token(row, place) for place in range(len(prompt), len(text)))
        start = next((token for token in tokens if token is not None), None)
        if start is None:
            pairs.append((_clean(ids, tokenizer), []))
        else:
            pairs.append((_clean(ids[:start], tokenizer, end=False), _clean(ids[start:], tokenizer)))
    return pairs


def _clean(ids: list[int], tokenizer: "PreTrainedTokenizerBase", end: bool = True) -> list[int]:
    """Ids with at most one BOS in front (a chat template writes its own) and, at the `end` of a text, no EOS."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids[:-1] if end and ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def _fit(prompt: list[int], completion: list[int], max_length: int, bos: int | None) -> tuple[list[int], list[int]]:
    """Prompt and completion cut to `max_length` tokens together; both keep at least one."""
    reserved = min(len(prompt), max(1, int(max_length * PROMPT_SHARE)))
    completion = completion[: max_length - reserved]
    return _keep_end(prompt, max_length - len(completion), bos), completion


def _keep_end(ids: list[int], length: int, bos: int | None) -> list[int]:
    """The last `length` ids, with BOS still in front if it was there and there is room for more than it."""
    if len(ids) <= length:
        return ids
    return [ids[0], *ids[len(ids) - length + 1 :]] if ids[0] == bos and length > 1 else ids[len(ids) - length :]
