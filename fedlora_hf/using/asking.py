"""Questions put to a finished run's adapters in the words they were trained with, and their answers."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch

from fedlora_hf.data.schemas import render_prompt
from fedlora_hf.data.tokenize import question_ids
from fedlora_hf.data.wording import Wording, is_tuned, template_of
from fedlora_hf.errors import ConfigError
from fedlora_hf.training.metrics import generate_answers
from fedlora_hf.using.finished import Adapter, Finished
from fedlora_hf.using.loaded import Loaded

_OWN_CHAT = "User:\n...\n\nAssistant:\n"
_AS_IT_IS = "..."


@dataclass(frozen=True)
class Question:
    """What is asked; context: what it speaks of; system: an instruction before it, where the wording has a place."""

    text: str
    context: str = ""
    system: str = ""


def wording_of_run(run: Finished, loaded: Loaded) -> Wording:
    """In whose words the run trained: as it recorded, with the template that its tokenizer kept.

    A run that recorded nothing (an aggregate, an older one) is asked by the tokenizer's own chat template where the
    base was tuned for instructions, and in our own words otherwise.
    """
    facts, template = run.wording, template_of(loaded.tokenizer)
    if facts.get("chat_template", "none") != "none":
        if template is None:
            raise ConfigError(
                f"{run.folder}: was trained in the words of a chat template, and its tokenizer is not there; restore "
                "tokenizer_config.json and chat_template.jinja"
            )
        every = facts.get("loss") == "all assistant turns"
        return Wording(template, str(facts["chat_template"]), facts.get("instructions") == "chat template", every)
    if not facts and template is not None and is_tuned(loaded.args.model_name_or_path):
        return Wording(template, "tokenizer", True)
    return Wording()


def told_wording(run: Finished, wording: Wording) -> str:
    """One line on the words that questions are put in, and whether the run says so or it is our guess."""
    if wording.template is not None:
        said = f"the chat template ({wording.origin})"
    elif run.wording.get("example") == _OWN_CHAT:
        said = "our wording of chats"
    elif run.wording.get("example") == _AS_IT_IS:
        said = "the question as it is"
    else:
        said = "our wording of instructions"
    return f"asked in {said}" + ("" if run.wording else "; the run did not record its wording")


def prompt_of(question: Question, run: Finished, wording: Wording) -> dict[str, object]:
    """The question as an example without an answer: what `question_ids` takes."""
    if wording.template is not None:
        turns = [{"role": "system", "content": question.system}] if question.system else []
        user = "\n\n".join(part.strip() for part in (question.text, question.context) if part.strip())
        turns.append({"role": "user", "content": user})
        return {"prompt": "", "chat": json.dumps({"messages": [*turns, {"role": "assistant", "content": ""}]})}
    form = run.wording.get("example")
    if form == _AS_IT_IS:
        parts = [part for part in (question.system, question.context, question.text) if part]
        return {"prompt": "\n\n".join(parts) if len(parts) > 1 else question.text}
    if form == _OWN_CHAT:
        user = "\n\n".join(part.strip() for part in (question.text, question.context) if part.strip())
        system = f"System:\n{question.system.strip()}\n\n" if question.system.strip() else ""
        return {"prompt": f"{system}User:\n{user}\n\nAssistant:\n"}
    instruction = "\n\n".join(part.strip() for part in (question.system, question.text) if part.strip())
    return {"prompt": render_prompt(instruction, question.context)}


def ask(
    run: Finished, loaded: Loaded, adapters: Sequence[Adapter], question: Question, max_new_tokens: int = 64
) -> list[tuple[str, str]]:
    """[(adapter's name, its answer)], greedy, in the order of the adapters; of a classifier the classes' probabilities.

    Raises ConfigError for adapters of a task that answers nothing (SEQ_2_SEQ_LM, TOKEN_CLS ...), and an empty question.
    """
    if not question.text.strip():
        raise ConfigError("question='': must say something; put it in quotes at the end of the command")
    if run.task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ConfigError(
            f"task_type={run.task_type!r}: only causal language models and sequence classifiers are asked here; load "
            "the adapter with PEFT"
        )
    answers = []
    for adapter in adapters:
        with loaded.using(adapter) as model:
            if run.task_type == "SEQ_CLS":
                answers.append((adapter.name, _classified(model, loaded, question)))
            else:
                row = prompt_of(question, run, wording := wording_of_run(run, loaded))
                ids = question_ids(
                    datasets.Dataset.from_list([row]), loaded.tokenizer, max_length=loaded.max_length, wording=wording
                )
                answer = generate_answers(model, ids, loaded.tokenizer, max_new_tokens=max_new_tokens)
                answers.append((adapter.name, answer[0].strip()))
    return answers


def _classified(model: torch.nn.Module, loaded: Loaded, question: Question) -> str:
    """The classes, most probable first (at most five), with their probabilities."""
    given = loaded.tokenizer(question.text, truncation=True, max_length=loaded.max_length, return_tensors="pt")
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"].to(device)).logits[0].float()
    shares = torch.softmax(logits, -1)
    names = loaded.model.config.id2label or {}
    best = torch.argsort(shares, descending=True, stable=True)[:5].tolist()
    return ", ".join(f"{names.get(number, number)} {shares[number]:.1%}" for number in best)
