"""`fedlora aggregate`: any PEFT LoRA adapters, trained anywhere, combined in one shot."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fedlora_hf.adapter.files import plain_config, read_adapter
from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.coverage import costs, filled, told
from fedlora_hf.aggregation.device import checked_device
from fedlora_hf.aggregation.screening import PartialModules
from fedlora_hf.commands.collection import bases_of, check_bases, named, read_weights
from fedlora_hf.commands.summary import print_summary
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub import Source, fetch_adapter
from fedlora_hf.methods import method_named
from fedlora_hf.methods.method import Method
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import collaborative
from fedlora_hf.record.write import add_round, opening
from fedlora_hf.rounds import output
from fedlora_hf.rounds.ownership import check_output
from fedlora_hf.training.stages import StageName
from fedlora_hf.update import Aggregate, ClientUpdate
from fedlora_hf.util.lock import one_writer
from fedlora_hf.util.progress import Progress

# PEFT's name of a task: the record's.
TASKS = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "sequence_classification",
    "SEQ_2_SEQ_LM": "seq_2_seq_lm",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
    "FEATURE_EXTRACTION": "feature_extraction",
}


@dataclass(frozen=True, eq=False)
class Collected:
    """Adapters that can be read, their configs, {client: why} of those that cannot, and the bases they name."""

    updates: list[ClientUpdate]
    configs: dict[str, dict[str, Any]]
    unreadable: dict[str, str]
    bases: dict[str, list[str]]


def aggregate_adapters(
    adapters: Sequence[str],
    output_dir: str,
    *,
    method: str = "clair",
    target_rank: int | None = None,
    partial_modules: PartialModules = "quarantine",
    require_same_base: bool = False,
    weights: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Read the adapters (lazily, module by module), aggregate them, and leave a full output folder.

    An adapter that cannot be used (unreadable, not LoRA, NaN, other modules) is quarantined with its reason; the
    others are aggregated. weights: how much each counts, see `collection.read_weights`; default all alike.
    Differing bases are told, in the record too; with `require_same_base` a ConfigError. ConfigError also when two
    adapters have one client id, or when the output folder is an input's or another run's; AdapterError when none can
    be read.
    """
    options, chosen, progress = options or {}, method_named(method), Progress()
    checked_device(device)
    sources = named(adapters)
    check_output(output_dir, "aggregate", [source.folder for source in sources.values() if source.folder is not None])
    counts = _weights(chosen, weights, sources)
    found = _collected(sources, counts, progress)
    for line in check_bases(found.bases, require_same_base):
        progress.say(line)
    cost = costs(found.updates)
    for line in told(cost, partial_modules) if cost and partial_modules != "refuse" else []:
        progress.say(line)
    zero = partial_modules == "zero"
    updates = filled(found.updates) if zero else found.updates
    combined = aggregate(
        updates,
        method,
        weight_by="examples" if counts else "uniform",
        weight_cap=math.inf,  # they are not the clients' claims but what whoever aggregates has chosen
        target_rank=target_rank,
        partial_modules="quarantine" if zero else partial_modules,
        device=device,
        **options,
    )
    told_options = {**options, "target_rank": target_rank, "weights": counts or None}
    told_options["partial_modules"] = None if partial_modules == "quarantine" else partial_modules
    record, config = _recorded(found, updates, combined, chosen, told_options)
    if cost:
        record.diagnosis["partial_modules"] = {"chosen": partial_modules, "costs": cost}
    own = {update.client_id: update.state for update in found.updates}
    with one_writer(output_dir):
        folders = output.ClientFolders(output_dir, config)
        folders.begin()
        for client_id in progress.over(collaborative(record), "personal adapter"):
            whose = {name: found.configs[client_id].get(name) for name in ("base_model_name_or_path", "revision")}
            named_base = {**config, **plain_config(whose)}
            folders.write(client_id, combined.personalised.get(client_id, own[client_id]), named_base)
        folders.publish()
        output.write_run(output_dir, combined.state, config, record)
    print_summary(record, output_dir)


def _weights(method: Method, given: Sequence[str] | None, clients: Mapping[str, Source]) -> dict[str, int]:
    """{client: how much it counts}; {} where all count alike."""
    if given is None:
        return {}
    if not method.weighted:
        raise ConfigError(f"weights: have no effect with {method.name}, in which every client counts once; leave out")
    return read_weights(given, clients)


def _collected(sources: Mapping[str, Source], counts: Mapping[str, int], progress: Progress) -> Collected:
    updates: list[ClientUpdate] = []
    configs, unreadable = {}, {}
    for client_id, source in progress.over(sources.items(), "reading adapters"):
        try:
            state, config = read_adapter(fetch_adapter(source))
        except AdapterError as error:
            unreadable[client_id] = str(error)
            continue
        updates.append(ClientUpdate(client_id, state, counts.get(client_id)))
        configs[client_id] = config
    if not updates:
        client_id, reason = next(iter(unreadable.items()))
        raise AdapterError(f"none of {len(sources)} adapters can be read; {client_id!r} for one: {reason}")
    return Collected(updates, configs, unreadable, bases_of(configs))


def _recorded(
    found: Collected, updates: Sequence[ClientUpdate], combined: Aggregate, method: Method, options: Mapping[str, Any]
) -> tuple[RunRecord, dict[str, Any]]:
    """(the record, the aggregate's own adapter_config.json). updates: as they were aggregated, filled in or not."""
    quarantined = dict(sorted({**found.unreadable, **combined.quarantined}.items()))
    usable = [update for update in updates if update.client_id not in quarantined]
    ids = [update.client_id for update in usable]
    # Of the usable ones, the first on the base that most of them name.
    bases = bases_of({client: found.configs[client] for client in ids})
    config = plain_config(found.configs[next(iter(bases.values()))[0]])
    if "modules_left_out" in combined.diagnosis or updates is not found.updates:
        config = {**config, "target_modules": list(combined.state)}
    changed = {name: value for name, value in options.items() if value is not None}
    args = SimpleNamespace(seed=0, contaminated={}, changed=lambda: changed)
    clients = dict.fromkeys(sorted([*quarantined, *ids]))
    record = opening(args, method, {"kind": "aggregate"}, clients, {})
    task = TASKS.get(str(config.get("task_type")), "causal_lm")
    record.model = {"name_or_path": config.get("base_model_name_or_path"), "task": task}
    if len(found.bases) > 1:
        record.model |= {"bases": found.bases, "num_bases": len(found.bases)}
    add_round(record, 1, sorted(record.clients), usable, combined, quarantined, None, {}, stage=StageName.AGGREGATE)
    return record, config
