"""The model card: what a run was and found, made from its record alone."""
# SPDX-License-Identifier: Apache-2.0

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from fedlora_hf.hub import tables
from fedlora_hf.hub.text import fenced, hub_id, markdown, one_line
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.stage_costs import stage_costs
from fedlora_hf.util.disk import write_atomically
from fedlora_hf.util.names import unfit_reason
from fedlora_hf.util.redaction import redacted

NAME = "README.md"
_FIGURE = re.compile(r"report/[A-Za-z0-9][\w.-]*\.png", re.ASCII)
# task of the record: (pipeline tag of the Hub, transformers' class)
_TASKS = {
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "seq_2_seq_lm": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "question_answering": ("question-answering", "AutoModelForQuestionAnswering"),
    "feature_extraction": ("feature-extraction", "AutoModel"),
}
_KINDS = {
    "train": "a federated fine-tuning run",
    "demo": "the text-copying demonstration",
    "aggregate": "a one-shot aggregation of separately trained adapters",
}
_AVERAGES = {"factors": "A and B separately", "product": "the updates B A themselves"}


def render_card(
    record: RunRecord,
    repo_id: str | None = None,
    *,
    figures: Sequence[str] = (),
    clients: Sequence[str] | None = None,
) -> str:
    """The card as Markdown with YAML front matter, from `record` alone.

    repo_id: where it will be shown; None: beside the output folder. figures: "report/<name>.png" files to embed.
    clients: ids whose personal adapters lie beside the card; None: the record's collaborative clients. Whatever the
    record holds (names, reasons, a dataset's title) is shown as plain text: no link, HTML or YAML can come from it.
    """
    task, auto_class = _TASKS.get(str(record.model.get("task")), (None, "AutoModelForCausalLM"))
    if clients is None:
        clients = [name for name, client in sorted(record.clients.items()) if client.get("collaborative") is True]
    text = _template().render(
        record=record,
        front_matter=front_matter(record, repo_id, task),
        title=(repo_id or f"{record.method} adapters").split("/")[-1],
        kind=_KINDS.get(record.kind, "a run"),
        averages=_AVERAGES.get(str(record.method_info.get("averages"))),
        data={
            **{name: value for name, value in record.data.items() if name not in ("names", "wording")},
            "dataset": _dataset_name(record),
            "local": None,
        },
        groups=tables.groups(record),
        names=tables.texts(record.data.get("names")),
        wording=tables.wording(record),
        options={name: value for name, value in record.options.items() if name not in ("output_dir", "dataset")},
        folder=repo_id or "path/to/this/folder",
        base=hub_id(record.model, "name_or_path"),
        base_name=_last_part(record.model, "name_or_path"),
        bases=tables.bases(record),
        auto_class=auto_class,
        personal=[name for name in clients if unfit_reason(name) is None],
        results=tables.results(record),
        rejected=tables.rejected(record),
        cohort=tables.numbers(record.data.get("cohort")),
        claims=tables.claims(record),
        rounds=tables.rounds(record),
        costs=stage_costs(record),
        modules=tables.modules(record),
        max_rows=tables.MAX_ROWS,
        figures=[name for name in figures if _FIGURE.fullmatch(name)],
        privacy=tables.privacy_told(record.privacy),
        command=shlex.join(one_line(part, 1000) for part in redacted(record.command)),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write_card(folder: str | os.PathLike[str], repo_id: str | None = None) -> Path:
    """Render the card of the output folder `folder` from its run.json, in the place of PEFT's placeholder.

    PEFT's own cards in clients/<id>/ and groups/<name>/ are taken away: they hold nothing but
    "[More Information Needed]".
    """
    folder = Path(folder)
    record = RunRecord.load(folder)
    figures = sorted(f"report/{path.name}" for path in folder.glob("report/*.png"))
    for inner in ("clients", "groups"):
        for placeholder in () if (folder / inner).is_symlink() else folder.glob(f"{inner}/*/{NAME}"):
            if not placeholder.parent.is_symlink():
                placeholder.unlink()
    path = folder / NAME
    write_atomically(path, render_card(record, repo_id, figures=figures).encode())
    return path


def front_matter(record: RunRecord, repo_id: str | None, task: str | None) -> str:
    """The card's YAML: what the Hub indexes. Local paths are left out: there they would name somebody else's model."""
    dataset = hub_id(record.data, "dataset")
    licences = _words(record.model.get("license"))
    measured = _eval_results(record, dataset, task)
    data = ModelCardData(
        base_model=hub_id(record.model, "name_or_path"),
        datasets=[dataset] if dataset else None,
        language=_words(record.data.get("language")) or None,
        license=licences[0] if licences else None,
        library_name="peft",
        pipeline_tag=task,
        tags=["fedlora_hf", "federated-learning", "lora", "peft", _slug(record.method)],
        model_name=(repo_id or f"fedlora_hf-{_slug(record.method)}").split("/")[-1] if measured else None,
        eval_results=measured or None,
    )
    return str(data.to_yaml(line_break="\n"))


def _eval_results(record: RunRecord, dataset: str | None, task: str | None) -> list[EvalResult]:
    """One entry of the model-index for every mean metric of the finished adapters."""
    name = _dataset_name(record)
    after = tables.mapping(record.metrics.get("after"))
    return [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=dataset or _slug(name),
            dataset_name=name,
            metric_type=_slug(metric),
            metric_value=value,
            metric_name=f"{one_line(metric, 60)} ({kind})",
        )
        for kind in ("global", "personalised")
        for metric, value in sorted(tables.numbers(after.get(kind)).items())
    ]


def _dataset_name(record: RunRecord) -> str:
    return _last_part(record.data, "dataset") or "the clients' own data"


def _last_part(entry: Mapping[str, Any], key: str) -> str:
    """A Hub id whole; of a path its last part, since what lies above it is nobody's business."""
    return hub_id(entry, key) or re.split(r"[/\\]", one_line(entry.get(key) or "", 190).rstrip("/\\"))[-1]


def _words(value: object) -> list[str]:
    """One word or several (a language, a licence); what is not a short plain word is left out."""
    words = value if isinstance(value, list) else [value]
    return [word for word in words if isinstance(word, str) and re.fullmatch(r"[\w.-]{1,40}", word, re.ASCII)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-")[:60] or "unknown"


@cache
def _template() -> jinja2.Template:
    # Not HTML: every value that comes from a record passes through the filter `text` instead.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        text=markdown,
        number=tables.number,
        items=tables.plain_items,
        fenced=fenced,
        quoted=lambda value: repr(one_line(value, 200)),
    )
    source = resources.files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)
