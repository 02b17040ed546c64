"""A run on the Hub taken over as the last committed round of an output folder."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.errors import ConfigError
from fedlora_hf.hub import fetch_run, parse_source
from fedlora_hf.launch.processes import Processes
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.federation import Federation
from fedlora_hf.rounds.groups import read_groups
from fedlora_hf.rounds.output import check_overwrite


def adopted(source: str, federation: Federation, processes: Processes, now: RunRecord) -> str:
    """Take the run that `source` ("hub:user/name") names as the last committed round here; that round's number.

    now: the record of the run that is about to begin: what a push leaves out (paths, names) is taken from it.
    ConfigError for a method whose clients keep what is not on the Hub, for a run that was pushed without what it says
    of its clients, and where an unfinished run would be lost.
    """
    args, method, store = federation.args, federation.method, federation.store
    with processes.all_or_none():
        place = parse_source(source)
        folder = fetch_run(str(place.repo_id), place.revision, token=args.hub_token)
        record = RunRecord.load(folder)
        if not record.clients:
            raise ConfigError(
                f"resume_from={source!r}: its record names no clients, so who was flagged is not known; push it with "
                "--hub_with_client_facts, or resume from the output folder"
            )
    record.options = {**now.options, **record.options}
    record.model, record.data = {**record.model, **now.model}, {**record.data, **now.data}
    record.command, record.sha256 = now.command, {**now.sha256, **record.sha256}
    if method.keeps or method.restarts:
        raise ConfigError(
            f"resume_from={source!r}: {method.name} goes on from what clients keep for themselves, which is "
            "not on the Hub; resume from the output folder"
        )
    with processes.all_or_none():
        if processes.first:
            check_overwrite(args.output_dir, store)
            store.clear()
            store.adopt(len(record.rounds), read_adapter(folder)[0], record, read_groups(folder))
    return str(len(record.rounds))
