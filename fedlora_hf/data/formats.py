"""Instruction formats: records of any recognised schema become examples with one set of columns.

Causal LM examples have `prompt`, `completion`, `references` (the accepted answers, the completion first) and `group`
(Dolly's category, the Natural Instructions task, "" if none). Classification examples have `text`, `label` (a class
label that keeps its names) and `group`. Both have `client` where the source names clients.

Prompts are worded here, by our choice, and end with a line break, so that in the usual tokenizers no token holds the
end of a prompt and the start of an answer:

    Instruction:                    Instruction:                    User:
    <instruction or question>       <task definition>               <what was said>

    Context:                        Input:                          Assistant:
    <context, if any>               <input>                         <the answer that completes it>

    Answer:                         Answer:
    <answer>                        <answer>

Alpaca's input has the heading Input. Of a chat, the last assistant turn is the completion and all before it the
prompt, under System, User and Assistant. A `prompt` column is used as it is.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from fedlora_hf.data.sources import Record, class_names, column_names, read_table
from fedlora_hf.errors import ConfigError, DataError

TASKS = ("causal_lm", "sequence_classification")
GROUP_COLUMNS = ("category", "task", "task_name", "group")
TEXT_COLUMNS = ("text", "instruction")
LABEL_COLUMNS = ("label", "category")
CLIENT_COLUMN = "client"
_TEXT = datasets.Value("string")
_CHAT_NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Schema:
    """A recognised set of columns: those it needs, and how a record becomes (prompt, accepted answers)."""

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Record], tuple[str, list[str]]]


def render_prompt(instruction: str, extra: str = "", heading: str = "Context") -> str:
    """The prompt of an instruction and, where `extra` is not blank, what it speaks of, under `heading`."""
    sections = [f"Instruction:\n{instruction.strip()}"]
    if extra.strip():
        sections.append(f"{heading}:\n{extra.strip()}")
    return "\n\n".join([*sections, "Answer:\n"])


def load_examples(
    source: str | Path | datasets.Dataset,
    *,
    task: str = "causal_lm",
    split: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    client_column: str | None = None,
    revision: str | None = None,
) -> datasets.Dataset:
    """The examples of `source`, in memory, in the order of the source, nothing removed.

    source: a file, a folder or a Hub id as `sources.read_table` reads them, or a Dataset already loaded.
    task: "causal_lm" or "sequence_classification".
    text_column, label_column: for classification, the text and its class (by default text or instruction, label or
        category). For a causal LM they name a prompt and its completion where the columns are of no recognised schema.
    labels: the classes of a classification in order; these data may lack some, and have no other. Default: those the
        source declares, else those it has, sorted.
    client_column: the column that says whose record it is; "client" where there is one.

    Raises DataError for a source that cannot be read, columns that are not recognised, a record without a needed
    value, or a single class; ConfigError for an unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r}: must be one of {', '.join(TASKS)}; choose one")
    if isinstance(source, datasets.Dataset):
        records, names = source.to_list(), class_names(source)
    else:
        records, names = read_table(source, split=split, revision=revision)
    columns = column_names(records)
    if task == "causal_lm":
        examples = _causal_examples(records, _schema(columns, text_column, label_column))
    else:
        text = _choose(text_column, TEXT_COLUMNS, columns, "text_column")
        label = _choose(label_column, LABEL_COLUMNS, columns, "label_column")
        examples = _class_examples(records, text, label, names.get(label), labels)
    group = next((name for name in GROUP_COLUMNS if name in columns), None)
    groups = [""] * len(records) if group is None else _texts(records, group, names.get(group), missing="")
    examples = examples.add_column("group", groups, feature=_TEXT)
    if client_column is not None or CLIENT_COLUMN in columns:
        client = _choose(client_column, (CLIENT_COLUMN,), columns, "client_column")
        examples = examples.add_column("client", _texts(records, client, names.get(client)), feature=_TEXT)
    return examples


def _causal_examples(records: list[Record], schema: Schema) -> datasets.Dataset:
    prompts, references = [], []
    for number, record in enumerate(records, start=1):
        missing = [name for name in schema.needs if record.get(name) is None]
        if missing:
            raise DataError(
                f"record {number} has no {missing[0]!r}: every record of the schema {schema.name} needs "
                f"{', '.join(schema.needs)}; complete or remove it"
            )
        prompt, answers = schema.convert(record)
        prompts.append(prompt)
        references.append(answers)
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "completion": [answers[0] for answers in references], "references": references},
        features=datasets.Features(
            {"prompt": _TEXT, "completion": _TEXT, "references": datasets.List(datasets.Value("string"))}
        ),
    )


def _class_examples(
    records: list[Record], text: str, label: str, names: list[str] | None, labels: Sequence[str] | None
) -> datasets.Dataset:
    """Classes are numbered as in `labels`, else as the source declares them (`names`), else by the sorted values."""
    texts = _texts(records, text, None)
    values = _texts(records, label, names)
    present = set(values)
    if labels is not None and (odd := sorted(present - set(labels))):
        raise DataError(
            f"label column {label!r}: holds {odd[0]!r}, which is none of labels={','.join(labels)}; name it there, or "
            "correct the records"
        )
    if labels is None and len(present) < 2:
        raise DataError(
            f"label column {label!r}: holds the one class {values[0]!r}, and a classifier needs at least two; "
            "name another with label_column, or train a causal LM"
        )
    ordered = list(labels or names or sorted(present, key=_class_order))
    index = {name: position for position, name in enumerate(ordered)}
    return datasets.Dataset.from_dict(
        {"text": texts, "label": [index[value] for value in values]},
        features=datasets.Features({"text": _TEXT, "label": datasets.ClassLabel(names=ordered)}),
    )


def _class_order(value: str) -> tuple[bool, int, str]:
    """Whole numbers by value, then everything else by the alphabet."""
    number = value.removeprefix("-").isdecimal()
    return not number, int(value) if number else 0, value


def _choose(wanted: str | None, defaults: tuple[str, ...], columns: list[str], option: str) -> str:
    """The column to use: the one asked for, or the first default that is there."""
    found = next((name for name in ([wanted] if wanted is not None else defaults) if name in columns), None)
    if found is None:
        raise DataError(
            f"columns {', '.join(columns)}: must have {' or '.join([wanted] if wanted is not None else defaults)}; "
            f"name the column to use with {option}"
        )
    return found


def _schema(columns: list[str], text_column: str | None, label_column: str | None) -> Schema:
    """The schema of these columns: the two named ones where both are named, else the first recognised one."""
    if text_column is not None or label_column is not None:
        prompt = _choose(text_column, ("prompt",), columns, "text_column")
        completion = _choose(label_column, ("completion",), columns, "label_column")
        return Schema(
            f"{prompt} and {completion}", (prompt, completion), lambda r: (str(r[prompt]), _answers(r[completion]))
        )
    for schema in SCHEMAS:
        if set(schema.needs) <= set(columns):
            return schema
    known = "; ".join(f"{' + '.join(schema.needs)} ({schema.name})" for schema in SCHEMAS)
    raise DataError(
        f"columns {', '.join(columns)}: not a recognised set, which are {known}; rename the columns, or name the "
        "prompt with text_column and the completion with label_column"
    )


def _texts(records: list[Record], column: str, names: list[str] | None, missing: str | None = None) -> list[str]:
    """A column as strings: of a list its first item, of a class label its name; `missing` for no value, if allowed."""
    texts = []
    for number, record in enumerate(records, start=1):
        value = record.get(column)
        if isinstance(value, list):
            value = value[0] if value else None
        if names is not None and isinstance(value, int):
            value = names[value] if 0 <= value < len(names) else None
        value = missing if value is None else value
        if value is None:
            raise DataError(
                f"record {number} has no value in {column!r}: every record needs one; complete or remove it"
            )
        texts.append(str(value))
    return texts


def _answers(value: object) -> list[str]:
    """The accepted answers: a list as it is, anything else alone; at least one, which may be empty."""
    return ([str(item) for item in value] if isinstance(value, list) else [str(value)]) or [""]


def _instruction_schema(name: str, instruction: str, answer: str, extra: str, heading: str = "Context") -> Schema:
    def convert(record: Record) -> tuple[str, list[str]]:
        return render_prompt(str(record[instruction]), str(record.get(extra) or ""), heading), _answers(record[answer])

    return Schema(name, (instruction, answer), convert)


def _task_instance(record: Record) -> tuple[str, list[str]]:
    return render_prompt(str(record["definition"]), str(record["inputs"]), "Input"), _answers(record["targets"])


def _verbatim(record: Record) -> tuple[str, list[str]]:
    """Prompt and completion as they are; `references`, where there are some, are further accepted answers."""
    answers = _answers(record["completion"])
    further = record.get("references")
    answers += [text for text in _answers(further) if text not in answers] if isinstance(further, list) else []
    return str(record["prompt"]), answers


def _chat(record: Record) -> tuple[str, list[str]]:
    """The turns before the last assistant turn, each under who speaks, and that turn; what follows it is dropped."""
    messages = record["messages"]
    turns = [(str(m.get("role")), str(m.get("content"))) for m in messages] if isinstance(messages, list) else []
    last = max((place for place, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise DataError(
            f"messages {str(messages)[:60]!r}: must be a list of turns with role and content, one of them the "
            "assistant's after another's; correct or remove the record"
        )
    before = [f"{_CHAT_NAMES.get(role, role)}:\n{content.strip()}" for role, content in turns[:last]]
    return "\n\n".join([*before, "Assistant:\n"]), [turns[last][1]]


SCHEMAS = (
    Schema("Natural Instructions", ("definition", "inputs", "targets"), _task_instance),
    _instruction_schema("Dolly", "instruction", "response", "context"),
    _instruction_schema("Alpaca", "instruction", "output", "input", "Input"),
    Schema("prompt and completion", ("prompt", "completion"), _verbatim),
    _instruction_schema("question and answer", "question", "answer", "context"),
    Schema("chat", ("messages",), _chat),
)
