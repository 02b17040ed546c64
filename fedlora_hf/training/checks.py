"""What a trainer is given, looked at before anything is built: one line for whatever does not fit."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.prepare import ClientData
from fedlora_hf.errors import ConfigError, DataError, FedLoraError, one_line
from fedlora_hf.util.names import unfit_reason

SPLITS = ("train", "validation", "test")
# Arguments of Trainer that mean one training of one data set.
_REFUSED = {
    "train_dataset": "every client has its own; pass client_datasets={id: Dataset}",
    "model_init": "a run has one model; pass model=",
}


def check_construction(args: Any, client_datasets: Any, given: Mapping[str, Any]) -> None:
    """ConfigError or DataError for the first argument that cannot be used. given: the further keyword arguments."""
    if not isinstance(args, FederatedConfig):
        raise ConfigError(f"args is a {type(args).__name__}: must be a FederatedConfig; import it from fedlora_hf")
    for name, remedy in _REFUSED.items():
        if given.get(name) is not None:
            raise ConfigError(f"{name}=...: {remedy}")
    if any(part is not None for part in given.get("optimizers") or ()):
        raise ConfigError(
            "optimizers=(...): every client needs a fresh optimizer and scheduler; pass optimizer_cls_and_kwargs and "
            "lr_scheduler_type instead"
        )
    if not isinstance(client_datasets, Mapping):
        raise DataError(f"client_datasets is a {type(client_datasets).__name__}: pass {{client id: Dataset}}")
    if not client_datasets:
        raise DataError("0 clients: a federation needs at least one; pass client_datasets={id: Dataset}")
    for client_id, data in client_datasets.items():
        if reason := unfit_reason(client_id):
            raise ConfigError(reason)
        _check_splits(client_id, data)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """What Trainer complains of, over several lines, is a ConfigError of one: it is about what it was given."""
    try:
        yield
    except (FedLoraError, NotImplementedError):
        raise
    except OSError as error:  # of the output folder, which Trainer makes; others' have no file name
        if error.filename is None:
            raise ConfigError(one_line(error, 400)) from error
        raise ConfigError(f"output_dir={error.filename!r}: {error.strerror}; pass another --output_dir") from error
    except (ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ConfigError(one_line(error, 400)) from error


def _check_splits(client_id: str, data: Any) -> None:
    odd = sorted(str(name) for name in data if name not in SPLITS) if isinstance(data, Mapping) else []
    if odd:
        close = get_close_matches(odd[0], SPLITS, 1, 0.3)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"client {client_id!r}: split {odd[0]!r} is none of {', '.join(SPLITS)}{guess}")


def check_tokens(model: Any, clients: Mapping[str, ClientData]) -> None:
    """DataError for a client with a token that the base has no embedding for: its first batch could not be run."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows: Any = getattr(embedding, "num_embeddings", None)
    for client_id, data in clients.items() if isinstance(rows, int) else ():
        largest = data.train.largest_id
        if largest >= rows:
            raise DataError(
                f"client {client_id!r}: has the token id {largest}, and the model embeddings for {rows} tokens; give "
                "the tokenizer that belongs to the model, or resize the model's token embeddings"
            )
