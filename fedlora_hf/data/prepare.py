"""One client's data as the trainer takes it, and the examples of a data set divided among clients."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa

from fedlora_hf.data.clients import make_clients
from fedlora_hf.data.contaminate import KINDS, contaminate_share
from fedlora_hf.data.formats import load_examples
from fedlora_hf.data.mapped import quiet
from fedlora_hf.data.notices import empty_answers, notice
from fedlora_hf.data.packing import PackedRows
from fedlora_hf.data.rows import TokenRows
from fedlora_hf.data.several import SPLITS, Loaded, parts_of
from fedlora_hf.data.sources import MAX_STREAMED
from fedlora_hf.data.tokenize import question_ids, tokenize_examples
from fedlora_hf.data.tokens import as_tokens
from fedlora_hf.data.wording import Wording, choose_wording, own_form
from fedlora_hf.errors import DataError, one_line
from fedlora_hf.util.say import say
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig

_STREAMS = (datasets.IterableDataset, str, Path)


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's tokenised splits; `questions`: the raw test examples with prompt and references, for generation,
    and `prompt_ids`, what the model is given to answer them. worded: by a chat template, some of them at least. form:
    of a prompt in our own wording, see `own_form`. empty: training answers that say nothing; unlearned: training
    examples without a token that is learned."""

    train: TokenRows | PackedRows
    validation: datasets.Dataset | None = None
    test: datasets.Dataset | None = None
    questions: datasets.Dataset | None = None
    worded: bool = False
    form: str = ""
    empty: int = 0
    unlearned: int = 0


def rule_of(partition_by: str | None, several: bool) -> str:
    """How examples become clients where the options leave it open: several sources are clients, one has categories."""
    return partition_by or ("client" if several else "category")


def divided(args: "FederatedConfig", loaded: Loaded | datasets.Dataset, partition_by: str | None) -> dict[str, Any]:
    """{client id: splits} of the examples, as the options say."""
    if isinstance(loaded, datasets.Dataset):
        loaded = Loaded(loaded, None, None, False)
    return make_clients(
        loaded.train,
        partition_by=rule_of(partition_by, loaded.several),
        num_clients=args.num_clients,
        dirichlet_alpha=args.dirichlet_alpha,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
        max_examples_per_client=args.max_examples_per_client,
        seed=args.seed,
        validation=loaded.validation,
        test=loaded.test,
    )


def wording_of(args: "FederatedConfig", tokenizer: Any) -> Wording:
    """In whose words the options have a causal LM trained; ours where there is no tokenizer, or another task."""
    if args.task != "causal_lm" or tokenizer is None:
        return Wording()
    base = args.model_name_or_path or getattr(tokenizer, "name_or_path", None)
    return choose_wording(tokenizer, args.chat_template, base=base, all_turns=args.assistant_only_loss)


def prepare_client(
    client_id: str, data: Any, tokenizer: Any, args: "FederatedConfig", head: Sequence[str] | None = None
) -> ClientData:
    """A client's data as the trainer takes it, ready for the model.

    data: a Dataset, an IterableDataset (at most max_examples_per_client of it, or sources.MAX_STREAMED), a list of
        records, a DataFrame, a path or Hub id, or {"train", "validation", "test"} of any of these. Examples are of any
        schema that `load_examples` reads, or made by it, or already tokenised (see `as_tokens`).
    head: the classes that the model's head knows by name, for labels that are names.
    Raises DataError for a client without a training example or without a column to train on.
    """
    wording = wording_of(args, tokenizer)
    try:
        splits = {name: _read(split, args, wording, head) for name, split in _splits(data).items()}
    except DataError as error:
        raise DataError(f"client {client_id!r}: {error}") from None
    if not len(splits.get("train") or ()):
        raise DataError(f"client {client_id!r}: 0 training examples; at least 1 is needed; drop it or give it data")
    test = splits.get("test") or None
    if test is not None and args.max_eval_examples is not None:
        test = test.select(range(min(args.max_eval_examples, len(test))))

    spoiled = args.contaminated.get(client_id)
    if spoiled is not None and spoiled.kind in KINDS:
        share, seed = spoiled.strength or 1.0, derive_seed(args.seed, "rehearsal", client_id)
        splits["train"] = contaminate_share(splits["train"], spoiled.kind, share, seed)

    try:
        found = {"train": splits["train"], "validation": splits.get("validation"), "test": test}
        made = {name: _tokenised(split, tokenizer, args, wording) for name, split in found.items()}
    except DataError as error:
        raise DataError(f"client {client_id!r}: {error}") from None
    rows = TokenRows(made["train"])
    if rows.unlearned == len(rows):
        raise DataError(
            f"client {client_id!r}: none of its {len(rows)} training examples has a token to learn; labels other than "
            "-100 are needed, after the first token"
        )
    train = PackedRows(rows, args.max_length) if args.packing else rows
    worded = wording.template is not None and "chat" in splits["train"].column_names and any(splits["train"]["chat"])
    form = own_form(splits["train"][0]["prompt"]) if "prompt" in splits["train"].column_names else ""
    questions = _questions(test, tokenizer, args, wording)
    lost = {"empty": empty_answers(splits["train"]), "unlearned": rows.unlearned}
    return ClientData(train, made["validation"], made["test"], questions, worded, form, **lost)


def _tokenised(examples: Any, tokenizer: Any, args: "FederatedConfig", wording: Wording) -> datasets.Dataset | None:
    """input_ids and labels of examples as text, or as tokens; None of none."""
    if not examples:
        return None
    if "input_ids" in examples.column_names:
        return as_tokens(examples, args.task)
    needed = ("prompt", "completion") if args.task == "causal_lm" else ("text", "label")
    if not set(needed) <= set(examples.column_names):
        raise DataError(
            f"columns {', '.join(examples.column_names)}; needs {' and '.join(needed)}, or input_ids and labels; load "
            "the data with fedlora_hf.data.formats.load_examples"
        )
    if tokenizer is None:
        raise DataError("text without a tokenizer; pass processing_class=tokenizer")
    return tokenize_examples(examples, tokenizer, max_length=args.max_length, task=args.task, wording=wording)


def prepare_clients(
    clients: Mapping[str, Any], tokenizer: Any, args: "FederatedConfig", head: Sequence[str] | None = None
) -> dict[str, ClientData]:
    """Every client's data, by id in order; see `prepare_client`. What would be lost without a word is said."""
    found = {client: prepare_client(client, clients[client], tokenizer, args, head) for client in sorted(clients)}
    notice(args, found.values())
    return found


def wording_facts(args: "FederatedConfig", tokenizer: Any, clients: Iterable[ClientData]) -> dict[str, Any]:
    """How the examples were worded, for the run record; {} where they came as tokens. A template is said too."""
    clients, wording = list(clients), wording_of(args, tokenizer)
    if any(data.worded for data in clients):
        also = " and instructions" if wording.instructions else ""
        say(f"chats{also} are worded by the chat template ({wording.origin}); --chat_template none takes our own words")
        return wording.facts()
    forms = sorted({data.form for data in clients if data.form})
    return Wording().facts(forms[0] if len(forms) == 1 else None) if forms else {}


def _questions(test: Any, tokenizer: Any, args: "FederatedConfig", wording: Wording) -> datasets.Dataset | None:
    """The test examples that are answered for ROUGE-L, with the ids of their prompts."""
    if test is None or "references" not in test.column_names or args.task != "causal_lm":
        return None
    questions = test.select(range(min(args.generation_examples, len(test))))
    if not len(questions) or tokenizer is None:
        return questions or None
    ids = question_ids(questions, tokenizer, max_length=args.max_length, wording=wording)
    with quiet():
        return questions.add_column("prompt_ids", ids)


def _splits(data: Any) -> dict[str, Any]:
    """{"train", "validation", "test": sources} of what stands for one client."""
    if isinstance(data, str | Path):
        part = parts_of({"data": data})[0]
        found = {"train": part.train, "validation": part.validation, "test": part.test}
        return {name: sources[0] if len(sources) == 1 else sources for name, sources in found.items() if sources}
    if not isinstance(data, Mapping):
        return {"train": data}
    strange = sorted(str(name) for name in data if name not in SPLITS)
    if strange:
        say(f"splits {', '.join(strange)}: not used; those that are: {', '.join(SPLITS)}")
    return {SPLITS[name]: split for name, split in data.items() if name in SPLITS}


def _read(split: Any, args: "FederatedConfig", wording: Wording, head: Sequence[str] | None) -> Any:
    """A split as examples, or tokenised as it was; what needs no reading is left as it is."""
    if isinstance(split, list):
        split = _from_records(split)
    elif type(split).__name__ == "DataFrame" and type(split).__module__.split(".")[0] == "pandas":
        split = datasets.Dataset.from_pandas(split, preserve_index=False)
    elif split is not None and not isinstance(split, (*_STREAMS, datasets.Dataset, tuple)):
        raise DataError(
            f"holds a {type(split).__name__}: must be a Dataset, a list of records, a DataFrame, a path or a Hub id"
        )
    if isinstance(split, tuple):
        return datasets.concatenate_datasets([_read(part, args, wording, head) for part in split])
    if not isinstance(split, _STREAMS) and not (isinstance(split, datasets.Dataset) and _is_raw(split, args)):
        return split
    return load_examples(
        split,
        task=args.task,
        text_column=args.text_column,
        label_column=args.label_column,
        labels=(args.labels or head) if args.task != "causal_lm" else None,
        turns=wording.instructions,
        records_at_most=args.max_examples_per_client or MAX_STREAMED,
    )


def _from_records(records: list[Any]) -> datasets.Dataset:
    """A list of {column: value} as a dataset."""
    odd = next((number for number, record in enumerate(records, 1) if not isinstance(record, Mapping)), None)
    if odd is not None:
        raise DataError(f"record {odd} is a {type(records[odd - 1]).__name__}: must be {{column: value}}; convert it")
    try:
        return datasets.Dataset.from_list([dict(record) for record in records])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"its records do not make columns of one type ({one_line(str(error), 100)}); make them alike"
        ) from None


def _is_raw(split: datasets.Dataset, args: "FederatedConfig") -> bool:
    """Whether a dataset is still to be read: neither tokenised nor with the columns of examples, all of them there."""
    columns = set(split.column_names)
    if not len(split) or "input_ids" in columns:
        return False
    needed = ("prompt", "completion") if args.task == "causal_lm" else ("text", "label")
    if not set(needed) <= columns or ((args.text_column or args.label_column) and "group" not in columns):
        return True  # `load_examples` gives every example a group
    kinds = [split.features[name] for name in needed if isinstance(split.features[name], datasets.Value)]
    texts = len(kinds) == len(needed) and all(kind.dtype in ("string", "large_string") for kind in kinds)
    if args.task == "causal_lm":
        return not texts or any(None in split[name][:] for name in needed)
    return isinstance(split.features["label"], datasets.Value) and not split.features["label"].dtype.startswith("int")
