"""`fedlora aggregate`: any PEFT LoRA adapters, trained anywhere, combined in one shot."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedlora_hf.adapter.files import plain_config, read_adapter
from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.coverage import costs, filled, told
from fedlora_hf.aggregation.device import checked_device
from fedlora_hf.aggregation.screening import PartialModules, screen
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
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.ownership import check_output
from fedlora_hf.training.stages import StageName
from fedlora_hf.update import Aggregate, ClientUpdate
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.measuring import Bench, Measure, bench_of, record_metrics
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
    """Adapters that can be read, their folders and configs, {client: why} of those that cannot, and the bases they
    name."""

    updates: list[ClientUpdate]
    folders: dict[str, Path]
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
    measure: Measure | None = None,
    device: str = "auto",
) -> None:
    """Read the adapters (lazily, module by module), aggregate them, and leave a full output folder.

    An adapter that cannot be used (unreadable, not LoRA, NaN, other modules) is quarantined with its reason; the
    others are aggregated. weights: how much each counts, see `collection.read_weights`; default all alike.
    Differing bases are told, in the record too; with `require_same_base` a ConfigError. measure: data to measure the
    adapters on, which takes their base model. ConfigError also when two adapters have one client id, or when the output
    folder is an input's or another run's; AdapterError when none can be read.
    """
    options, chosen, progress = options or {}, method_named(method), Progress()
    measure = measure or Measure()
    measure.check(chosen.name)
    checked_device(device)
    sources = named(adapters)
    check_output(output_dir, "aggregate", [source.folder for source in sources.values() if source.folder is not None])
    counts = _weights(chosen, weights, sources)
    found = _collected(sources, counts, chosen.least_clients, progress)
    cost = costs(found.updates)
    costing = told(cost, partial_modules) if cost and partial_modules != "refuse" else []
    for line in [*check_bases(found.bases, require_same_base), *costing]:
        progress.say(line)
    zero = partial_modules == "zero"
    updates = filled(found.updates) if zero else found.updates
    screened: PartialModules = "quarantine" if zero else partial_modules
    combine = partial(
        aggregate,
        updates,
        method,
        weight_by="examples" if counts else "uniform",
        weight_cap=math.inf,  # they are not the clients' claims but what whoever aggregates has chosen
        target_rank=target_rank,
        partial_modules=screened,
        device=device,
        **options,
    )
    bench, functional = _measured(found, updates, measure, screened, combine, progress)
    combined = combine(functional=functional.evidence)
    told_options = {**options, "target_rank": target_rank, "weights": counts or None, **measure.told()}
    told_options["partial_modules"] = None if partial_modules == "quarantine" else partial_modules
    record, config = _recorded(found, updates, combined, chosen, told_options, functional)
    if cost:
        record.diagnosis["partial_modules"] = {"chosen": partial_modules, "costs": cost}
    if bench is not None:
        record.data = {**measure.data(), "num_examples": len(bench.whole)}
        own = {u.client_id: u.state for u in found.updates if u.client_id not in record.quarantined}
        record_metrics(record, bench, own, combined.state, combined.personalised, progress)
    _write(output_dir, found, record, config, combined, progress)
    print_summary(record, output_dir)


def _write(
    output_dir: str,
    found: Collected,
    record: RunRecord,
    config: dict[str, Any],
    combined: Aggregate,
    progress: Progress,
) -> None:
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


def _measured(
    found: Collected,
    updates: Sequence[ClientUpdate],
    measure: Measure,
    partial_modules: PartialModules,
    combine: Callable[[], Aggregate],
    progress: Progress,
) -> tuple[Bench | None, Functional]:
    """(what the adapters are measured with, what judges found); None and nothing where it was not asked for."""
    if measure.dataset is None:
        return None, Functional()
    sound = screen(updates, None, partial_modules).usable
    if not sound:
        return None, Functional()  # `aggregate` says why none can be used
    first = _first({update.client_id: found.configs[update.client_id] for update in sound})
    config = found.configs[first]
    model = {"name_or_path": config.get("base_model_name_or_path"), "task": _task(config)}
    record = RunRecord(kind="aggregate", method="", seed=0, model=model)
    # With all of their modules, whichever of them are aggregated.
    usable = {update.client_id for update in sound}
    whole = [update for update in updates if update.client_id in usable]
    bench = bench_of(Finished(found.folders[first], record, config), measure, whole)
    if not measure.judges:
        return bench, Functional()
    progress.say(f"judges: {', '.join(bench.panel(measure.judges, 0))}")
    return bench, bench.judged(sound, combine(), measure.judges, 0)


def _first(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The first client on the base that most of them name."""
    return next(iter(bases_of(configs).values()))[0]


def _task(config: Mapping[str, Any]) -> str:
    return TASKS.get(str(config.get("task_type")), "causal_lm")


def _weights(method: Method, given: Sequence[str] | None, clients: Mapping[str, Source]) -> dict[str, int]:
    """{client: how much it counts}; {} where all count alike."""
    if given is None:
        return {}
    if not method.weighted:
        raise ConfigError(f"weights: have no effect with {method.name}, in which every client counts once; leave out")
    return read_weights(given, clients)


def _collected(sources: Mapping[str, Source], counts: Mapping[str, int], least: int, progress: Progress) -> Collected:
    updates: list[ClientUpdate] = []
    folders, configs, unreadable = {}, {}, {}
    for client_id, source in progress.over(sources.items(), "reading adapters"):
        try:
            folder = fetch_adapter(source)
            state, config = read_adapter(folder)
        except AdapterError as error:
            unreadable[client_id] = str(error)
            continue
        updates.append(ClientUpdate(client_id, state, counts.get(client_id)))
        folders[client_id], configs[client_id] = Path(folder), config
    if not updates:
        client_id, reason = next(iter(unreadable.items()))
        raise AdapterError(f"none of {len(sources)} adapters can be read; {client_id!r} for one: {reason}")
    if len(updates) < least and unreadable:
        raise AdapterError(
            f"{len(updates)} of {len(sources)} adapters can be read, and the method needs {least}; the others: "
            + "; ".join(f"{client!r}: {reason}" for client, reason in list(unreadable.items())[:3])
        )
    return Collected(updates, folders, configs, unreadable, bases_of(configs))


def _recorded(
    found: Collected,
    updates: Sequence[ClientUpdate],
    combined: Aggregate,
    method: Method,
    options: Mapping[str, Any],
    functional: Functional,
) -> tuple[RunRecord, dict[str, Any]]:
    """(the record, the aggregate's own adapter_config.json). updates: as they were aggregated, filled in or not."""
    quarantined = dict(sorted({**found.unreadable, **combined.quarantined}.items()))
    usable = [update for update in updates if update.client_id not in quarantined]
    ids = [update.client_id for update in usable]
    config = plain_config(found.configs[_first({client: found.configs[client] for client in ids})])
    if "modules_left_out" in combined.diagnosis or updates is not found.updates:
        config = {**config, "target_modules": list(combined.state)}
    changed = {name: value for name, value in options.items() if value is not None}
    args = SimpleNamespace(seed=0, contaminated={}, changed=lambda: changed)
    clients = dict.fromkeys(sorted([*quarantined, *ids]))
    record = opening(args, method, {"kind": "aggregate"}, clients, {})
    record.model = {"name_or_path": config.get("base_model_name_or_path"), "task": _task(config)}
    if len(found.bases) > 1:
        record.model |= {"bases": found.bases, "num_bases": len(found.bases)}
    cohort = sorted(record.clients)
    add_round(
        *(record, 1, cohort, usable, combined, quarantined, None, {}),
        stage=StageName.AGGREGATE,
        functional=functional.evidence,
        effects={client: asdict(effect) for client, effect in functional.effects.items()},
        judging=functional.facts,
    )
    return record, config
