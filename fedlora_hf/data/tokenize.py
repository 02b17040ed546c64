"""From examples to token ids: what is not learnt is masked, an answer ends with EOS, nothing is padded."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import datasets
from datasets.fingerprint import Hasher

from fedlora_hf.data.mapped import quiet_map, tokenizer_digest
from fedlora_hf.data.template import Spans, template_for
from fedlora_hf.data.wording import Wording
from fedlora_hf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Of an example that is too long, the prompt keeps at least this share of the tokens (our choice).
PROMPT_SHARE = 0.25
_IDS = datasets.List(datasets.Value("int32"))
# Part of the cache's key: another number when the ids of the same example change.
_VERSION = 1
_OWN = Wording()


def tokenize_examples(
    examples: datasets.Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    task: str = "causal_lm",
    wording: Wording | None = None,
) -> datasets.Dataset:
    """`input_ids` and `labels` of every example, in the order of `examples`, at most `max_length` tokens each.

    Causal LM: prompt and completion are tokenised as one text, as a reader would meet them, and EOS is appended.
    Labels are IGNORED for the prompt. A token that holds the end of the prompt and the start of the completion counts
    as completion, so every character of a completion is learned. (Tokenizers that do not know which character a token
    came from tokenise the two apart.) An example that is too long loses the start of its prompt, down to a quarter of
    `max_length`, then the end of its completion with the EOS. Every example keeps a label that has a token before it.

    wording: with a chat template, examples that have turns (`chat`) are worded by it, and learned where it says; an
    EOS is added only where the template leaves the last turn open. A chat that is too long is cut as a prompt is: all
    before the last answer counts as prompt.

    Sequence classification: `input_ids` cut at `max_length`, and `labels` the class number.

    Examples that lie on the disk are tokenised once: `datasets` keeps the result in its cache.
    """
    if max_length < 4:
        raise ConfigError(f"max_length {max_length}: must be at least 4 tokens; 256 or more is usual")
    per_token = task != "sequence_classification"
    features = datasets.Features({"input_ids": _IDS, "labels": _IDS if per_token else datasets.Value("int32")})
    if not len(examples):
        return datasets.Dataset.from_dict({"input_ids": [], "labels": []}, features=features)
    rows = _Rows(tokenizer, max_length, wording or _OWN)
    key = None
    if examples.cache_files:
        what = (examples._fingerprint, _VERSION, tokenizer_digest(tokenizer), max_length, task, wording)
        key = Hasher.hash(what)
    made = rows.answered if per_token else rows.classified
    return quiet_map(examples, made, features, key, with_indices=True)


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> list[list[int]]:
    """The ids of bare prompts, for generation: begun and cut as in training, and never empty."""
    ids = tokenizer(list(prompts), verbose=False)["input_ids"] if prompts else []
    first = _first(tokenizer)
    return [_keep_end(_clean(row, tokenizer) or [first], max_length, tokenizer.bos_token_id) for row in ids]


def question_ids(
    examples: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, wording: Wording | None = None
) -> list[list[int]]:
    """The ids that a model is given to answer each of these examples: its prompt, worded as in training."""
    template = template_for(tokenizer, wording)
    rows = []
    for row in examples:
        chat = json.loads(row["chat"]) if template is not None and row.get("chat") else None
        if chat is None or template is None:
            rows += tokenize_prompts([row["prompt"]], tokenizer, max_length=max_length)
        else:
            text = template.prompt(chat["messages"][:-1], chat.get("tools"))
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rows.append(_keep_end(ids or [_first(tokenizer)], max_length, tokenizer.bos_token_id))
    return rows


class _Rows:
    """Batches of examples into columns of ids and labels."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, wording: Wording) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = template_for(tokenizer, wording)

    def classified(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        ids = self.tokenizer(batch["text"], truncation=True, max_length=self.max_length)["input_ids"]
        return {"input_ids": ids, "labels": batch["label"]}

    def answered(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        eos, first = _eos(self.tokenizer), _first(self.tokenizer)
        chats = batch.get("chat") or [""] * len(batch["prompt"])
        made: list[tuple[list[int], list[int]] | None] = [None] * len(chats)
        plain = [place for place, chat in enumerate(chats) if not chat or self.template is None]
        pairs = _pairs([batch["prompt"][p] for p in plain], [batch["completion"][p] for p in plain], self.tokenizer)
        for place, (prompt, completion) in zip(plain, pairs, strict=True):
            prompt, completion = prompt or [first], [*completion, eos]
            made[place] = self._cut(prompt + completion, [IGNORED] * len(prompt) + completion, len(prompt))
        for place in sorted(set(range(len(chats))) - set(plain)):
            try:
                made[place] = self._cut(*self._worded(json.loads(chats[place]), eos, first))
            except DataError as error:
                raise DataError(f"example {indices[place] + 1}: {error}") from None
        rows = [row for row in made if row is not None]
        return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}

    def _worded(self, chat: dict[str, Any], eos: int, first: int) -> tuple[list[int], list[int], int]:
        """(ids, labels, where the last answer starts) of one chat in the template's words."""
        assert self.template is not None
        ids, learned = _marked(*self.template.chat(chat["messages"], chat.get("tools")), self.tokenizer)
        if not self.template.closes:
            ids, learned = [*ids, eos], [*learned, True]
        if learned and learned[0]:
            ids, learned = [first, *ids], [False, *learned]
        places = [place for place, is_learned in enumerate(learned) if is_learned]
        if not places:
            raise DataError("nothing of it is marked as the assistant's; correct the template or remove the record")
        start = next((p + 1 for p in range(places[-1], -1, -1) if not learned[p]), 0)
        return ids, [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)], start

    def _cut(self, ids: list[int], labels: list[int], start: int) -> tuple[list[int], list[int]]:
        """At most `max_length` of them; the answer starts at `start`, and both sides of it keep a token."""
        if len(ids) <= self.max_length:
            return ids, labels
        reserved = min(start, max(1, int(self.max_length * PROMPT_SHARE)))
        answer = range(start, len(ids))[: self.max_length - reserved]
        bos = 0 if ids[0] == self.tokenizer.bos_token_id else None
        kept = [*_keep_end(list(range(start)), self.max_length - len(answer), bos), *answer]
        return [ids[place] for place in kept], [labels[place] for place in kept]


def _marked(text: str, spans: Spans, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """(ids, which of them hold a character within the spans) of a text whose special tokens are written out."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return encoded["input_ids"], [any(a < end and b > start for start, end in spans) for a, b in offsets]
    cuts = sorted({0, len(text), *(place for span in spans for place in span)})
    ids: list[int] = []
    learned: list[bool] = []
    for left, right in pairwise(cuts):
        piece = tokenizer(text[left:right], add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        learned += [any(start <= left < end for start, end in spans)] * len(piece)
    return ids, learned


def _first(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands before an answer to nothing: BOS, or EOS where there is none."""
    return _eos(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


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
    """Ids with at most one BOS in front (a prompt may have its own) and, at the `end` of a text, no EOS."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids[:-1] if end and ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def _keep_end(ids: list[int], length: int, bos: int | None) -> list[int]:
    """The last `length` ids, with BOS still in front if it was there and there is room for more than it."""
    if len(ids) <= length:
        return ids
    return [ids[0], *ids[len(ids) - length + 1 :]] if ids[0] == bos and length > 1 else ids[len(ids) - length :]
