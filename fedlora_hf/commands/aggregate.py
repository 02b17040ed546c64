"""`fedlora aggregate`: any PEFT LoRA adapters, trained anywhere, combined in one shot."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from fedlora_hf.adapter.files import plain_config, read_adapter
from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.screening import PartialModules
from fedlora_hf.commands.summary import print_summary
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub import Source, fetch_adapter, parse_source
from fedlora_hf.methods import method_named
from fedlora_hf.methods.method import Method
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import collaborative
from fedlora_hf.record.write import add_round, opening
from fedlora_hf.rounds import output
from fedlora_hf.training.stages import StageName
from fedlora_hf.update import ClientUpdate
from fedlora_hf.util.names import fit_ids, telling_names
from fedlora_hf.util.progress import Progress


def aggregate_adapters(
    adapters: Sequence[str],
    output_dir: str,
    *,
    method: str = "clair",
    target_rank: int | None = None,
    partial_modules: PartialModules = "quarantine",
    options: dict[str, Any] | None = None,
) -> None:
    """Read the adapters (lazily, module by module), aggregate them, and leave a full output folder.

    An adapter that cannot be used (unreadable, not LoRA, NaN, other modules) is quarantined with its reason; the
    others are aggregated. ConfigError when two adapters have one client id, AdapterError when none can be read.
    """
    options = options or {}
    chosen = method_named(method)
    progress, updates, configs, unreadable = Progress(), [], [], {}
    for client_id, source in progress.over(_named(adapters).items(), "reading adapters"):
        try:
            state, config = read_adapter(fetch_adapter(source))
        except AdapterError as error:
            unreadable[client_id] = str(error)
            continue
        updates.append(ClientUpdate(client_id, state))
        configs.append((client_id, config))
    if not updates:
        client_id, reason = next(iter(unreadable.items()))
        raise AdapterError(f"none of {len(adapters)} adapters can be read; {client_id!r} for one: {reason}")
    combined = aggregate(
        updates, method, weight_by="uniform", target_rank=target_rank, partial_modules=partial_modules, **options
    )
    quarantined = dict(sorted({**unreadable, **combined.quarantined}.items()))
    usable = [update for update in updates if update.client_id not in quarantined]
    config = plain_config(next(config for client_id, config in configs if client_id == usable[0].client_id))
    if "modules_left_out" in combined.diagnosis:
        config = {**config, "target_modules": list(combined.state)}
    record = _record(chosen, {**options, "target_rank": target_rank}, [*quarantined, *(u.client_id for u in usable)])
    record.model = {"name_or_path": config.get("base_model_name_or_path"), "task": _task(config)}
    cohort = sorted(record.clients)
    add_round(record, 1, cohort, usable, combined, quarantined, None, {}, stage=StageName.AGGREGATE)
    folders = output.ClientFolders(output_dir, config)
    folders.begin()
    own = {update.client_id: update.state for update in usable}
    for client_id in progress.over(collaborative(record), "personal adapter"):
        folders.write(client_id, combined.personalised.get(client_id, own[client_id]))
    folders.publish()
    output.write_run(output_dir, combined.state, config, record)
    print_summary(record, output_dir)


def _named(adapters: Sequence[str]) -> dict[str, Source]:
    """{client id: source}, sorted; ConfigError for a source given twice."""
    sources = [parse_source(text) for text in adapters]
    names = telling_names([source.steps for source in sources])
    if len(set(names)) < len(names):
        twice = next(text for text, name in zip(adapters, names, strict=True) if names.count(name) > 1)
        raise ConfigError(f"{twice}: is given twice; name every adapter once")
    ids = fit_ids(names)
    return dict(sorted((ids[name], source) for name, source in zip(names, sources, strict=True)))


def _record(method: Method, options: dict[str, Any], clients: list[str]) -> RunRecord:
    args = SimpleNamespace(seed=0, changed=lambda: {name: v for name, v in options.items() if v is not None})
    return opening(args, method, {"kind": "aggregate"}, dict.fromkeys(sorted(clients)), {})


def _task(config: dict[str, Any]) -> str:
    return {"SEQ_CLS": "sequence_classification", "SEQ_2_SEQ_LM": "seq_2_seq_lm"}.get(
        str(config.get("task_type")), "causal_lm"
    )
