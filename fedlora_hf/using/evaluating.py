"""A finished run's adapters measured on other data, read and worded as the run's own were."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from fedlora_hf.data.collate import Collator
from fedlora_hf.data.mapped import quiet
from fedlora_hf.data.several import load_several
from fedlora_hf.data.tokenize import question_ids, tokenize_examples
from fedlora_hf.data.wording import Wording
from fedlora_hf.errors import ConfigError
from fedlora_hf.numerics.intervals import bootstrap
from fedlora_hf.training.answers import exact_matches, rouge_ls
from fedlora_hf.training.metrics import generate_answers, held_out_metrics
from fedlora_hf.using.asking import wording_of_run
from fedlora_hf.using.finished import Adapter, Finished
from fedlora_hf.using.loaded import Loaded
from fedlora_hf.util.say import say

Metrics = dict[str, float]


@dataclass(frozen=True, eq=False)
class Held:
    """The examples as the model takes them (`tokens`) and, where answers are generated, the questions of some.

    sources: whose each example is, where the data are several clients' or several sources."""

    tokens: datasets.Dataset
    questions: datasets.Dataset | None
    sources: Sequence[str] | None = None


def read(
    run: Finished,
    loaded: Loaded,
    dataset: Any,
    *,
    split: str | None = None,
    examples: int | None = None,
    generate: int = 0,
    labels: Sequence[str] | None = None,
) -> Held:
    """Examples of `dataset`, whatever `fedlora train` reads (a source with test examples gives those).

    split: of a source that has several. examples: at most so many, the first. generate: so many questions are answered
    for exact match and ROUGE-L. labels: the classes in the order of their numbers, where the run did not record them.
    """
    if run.task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ConfigError(
            f"task_type={run.task_type!r}: only causal language models and sequence classifiers are evaluated here; "
            "load the adapter with PEFT"
        )
    args, wording = loaded.args, wording_of_run(run, loaded) if run.task_type == "CAUSAL_LM" else Wording()
    known = list((loaded.model.config.id2label or {}).values())
    found = load_several(
        dataset,
        split=split,
        labels=list(labels or known) if run.task_type == "SEQ_CLS" else None,
        task=args.task,
        text_column=args.text_column,
        label_column=args.label_column,
        turns=wording.instructions,
    )
    if found.test is not None:
        say("of these data the test examples are measured; name a file to measure another part")
    chosen = found.train if found.test is None else found.test
    chosen = chosen.select(range(min(len(chosen), examples or len(chosen))))
    tokens = tokenize_examples(chosen, loaded.tokenizer, max_length=loaded.max_length, task=args.task, wording=wording)
    sources = chosen["client"][:] if "client" in chosen.column_names else None
    if not generate or run.task_type != "CAUSAL_LM":
        return Held(tokens, None, sources)
    questions = chosen.select(range(min(generate, len(chosen))))
    ids = question_ids(questions, loaded.tokenizer, max_length=loaded.max_length, wording=wording)
    with quiet():
        return Held(tokens, questions.add_column("prompt_ids", ids), sources)


def evaluate(
    loaded: Loaded, adapters: Sequence[Adapter], held: Held, *, batch_size: int = 8, max_new_tokens: int = 64
) -> Mapping[str, Metrics]:
    """{adapter's name: metrics}: those of training, see `training.metrics.held_out_metrics`, and where answers are
    generated "exact_match" and "rouge_l", each with the ends of its 95 % interval over the answered examples
    ("..._low", "..._high"; `numerics.intervals.bootstrap`, the same draws for every adapter)."""
    pad = loaded.tokenizer.pad_token_id
    collate, task = Collator(int(pad) if isinstance(pad, int) else 0), loaded.args.task
    found: dict[str, Metrics] = {}
    for adapter in adapters:
        with loaded.using(adapter) as model:
            metrics = held_out_metrics(model, held.tokens, collate, task=task, batch_size=batch_size)
            if held.questions is not None:
                prompts = held.questions["prompt_ids"][:]
                answers = generate_answers(model, prompts, loaded.tokenizer, max_new_tokens=max_new_tokens)
                metrics |= _scored(answers, held.questions["references"][:])
            found[adapter.name] = metrics
    return found


def _scored(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    found: Metrics = {}
    for name, scores in (
        ("exact_match", exact_matches(answers, references)),
        ("rouge_l", rouge_ls(answers, references)),
    ):
        found[name] = sum(scores) / len(scores)
        found[f"{name}_low"], found[f"{name}_high"] = bootstrap(scores, seed=0)
    return found
