"""What of an output folder may leave this machine: an allow-list, checked file by file, before anything is sent."""
# SPDX-License-Identifier: Apache-2.0

import re
import stat
from collections.abc import Container
from pathlib import Path, PurePosixPath

from fedlora_hf.adapter.header import read_header
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub.card import render_card
from fedlora_hf.hub.public import public_config, public_record
from fedlora_hf.hub.text import one_line
from fedlora_hf.record.group_names import group_names
from fedlora_hf.record.record import FILE_NAME, RunRecord
from fedlora_hf.util.disk import read_regular
from fedlora_hf.util.names import unfit_reason
from fedlora_hf.util.redaction import TOKEN

CONFIG, WEIGHTS, SIDE_CAR = "adapter_config.json", "adapter_model.safetensors", "dirmag_config.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl", "pytorch_model.bin")
# What a fast or a slow tokenizer saves; with it whoever loads the adapter can ask it as it was trained.
TOKENIZER: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
_REPORT_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.(?:png|html)", re.ASCII)
# What a push owns in a repository, and therefore takes away when the run no longer has it.
_OWNED = re.compile(rf"(?:clients|groups)/.+|report/{_REPORT_FILE.pattern}|{re.escape(SIDE_CAR)}", re.ASCII)

# What a report shows of the clients' own texts, between marks that no text can hold, since it is escaped.
_ANSWERS = re.compile(r"<!-- answers: begin -->.*?<!-- answers: end -->\n?", re.DOTALL)

Plan = dict[str, Path | bytes]


def make_plan(
    folder: Path, record: RunRecord, repo_id: str, with_clients: bool, with_client_facts: bool = False
) -> Plan:
    """{path in the repository: file, or content} of the output folder `folder`.

    The global adapter and those of further groups of clients, the tokenizer, the public part of the record
    (`public.public_record`), a card rendered from it for `repo_id`.
    with_clients: client adapters too, never one that was flagged or quarantined, whatever lies on the disk.
    with_client_facts: what the record says of each client, and the report, whose figures show it.
    Raises AdapterError or ConfigError for links, pickled weights, a missing adapter, or an access token inside a text
    file.
    """
    root = folder.resolve()
    plan: Plan = dict(_adapter(root, PurePosixPath()))
    for name in sendable_groups(root, record):
        plan.update(_adapter(root, PurePosixPath("groups", name)))
    clients = sendable_clients(root, record) if with_clients else []
    for client_id in clients:
        plan.update(_adapter(root, PurePosixPath("clients", client_id)))
    plan.update(_tokenizer(root))
    if with_client_facts:
        plan.update(_report(root))
    public = public_record(record, with_client_facts)
    figures = sorted(name for name in plan if name.endswith(".png"))
    plan[FILE_NAME] = public.to_json().encode()
    plan["README.md"] = render_card(public, repo_id, figures=figures, clients=clients).encode()
    return dict(sorted(plan.items()))


def stale(remote_paths: list[str], plan: Container[str]) -> list[str]:
    """Files of an earlier push that this one does not have: adapters of clients since flagged, old figures."""
    return sorted(path for path in remote_paths if _OWNED.fullmatch(path) and path not in plan)


def sendable_clients(root: Path, record: RunRecord) -> list[str]:
    """Sorted ids of the collaborative clients that have an adapter on disk and nothing against them."""
    barred = {str(name) for name in [*record.flagged, *record.quarantined]}
    return sorted(
        client_id
        for client_id, client in record.clients.items()
        if client.get("collaborative") is True
        and client_id not in barred
        and unfit_reason(client_id) is None
        and (root / "clients" / client_id).is_dir()
    )


def sendable_groups(root: Path, record: RunRecord) -> list[str]:
    """The groups of the record besides the first whose adapters lie on disk."""
    return [name for name in group_names(record) if (root / "groups" / name).is_dir()]


def check_weights(path: Path, where: str = "") -> None:
    """AdapterError, naming `where`, unless `path` has the header of a safetensors file and tensors that fill it."""
    try:
        if not read_header(path):
            raise ValueError("it holds no tensor")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{where or path}: not a safetensors file ({one_line(error, 80)}); save the adapter again"
        ) from None


def _adapter(root: Path, part: PurePosixPath) -> Plan:
    """The adapter files of one folder."""
    folder = root / part
    if not (folder / WEIGHTS).exists():
        pickled = [name for name in PICKLES if (folder / name).exists()]
        if pickled:
            raise AdapterError(f"{folder / pickled[0]}: pickled weights can run code; save the adapter as safetensors")
        raise AdapterError(f"{folder / WEIGHTS}: no such file; give the output folder of a finished run")
    files: Plan = {
        str(part / name): _own_file(root, part / name)
        for name in (CONFIG, WEIGHTS, SIDE_CAR)
        if name != SIDE_CAR or (folder / name).exists()
    }
    check_weights(folder / WEIGHTS)
    for name in (CONFIG, SIDE_CAR):
        if str(part / name) in files:
            _no_token(folder / name)
    files[str(part / CONFIG)] = _config(folder / CONFIG)
    return files


def _config(path: Path) -> bytes:
    try:
        return public_config(path.read_text(encoding="utf-8"))
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: not an adapter's config ({one_line(error, 80)}); save the adapter again") from None


def _tokenizer(root: Path) -> Plan:
    """The tokenizer's files that lie beside the global adapter."""
    names = [name for name in TOKENIZER if (root / name).exists()]
    for name in names:
        if not name.endswith(".model"):
            _no_token(root / name)
    return {name: _own_file(root, PurePosixPath(name)) for name in names}


def _report(root: Path) -> Plan:
    """The figures and pages of the report, without the answers to clients' questions that a page may show."""
    if not (root / "report").is_dir():
        return {}
    names = sorted(path.name for path in (root / "report").iterdir() if _REPORT_FILE.fullmatch(path.name))
    plan: Plan = {f"report/{name}": _own_file(root, PurePosixPath("report", name)) for name in names}
    for name in names:
        if name.endswith(".html"):
            _no_token(root / "report" / name)
            text = read_regular(root / "report" / name).decode("utf-8", errors="replace")
            if _ANSWERS.search(text):
                plan[f"report/{name}"] = _ANSWERS.sub("", text).encode()
    return plan


def _own_file(root: Path, part: PurePosixPath) -> Path:
    """root/part, when it is a plain file and no step on the way is a link that could lead elsewhere."""
    path = root
    for step in part.parts:
        path = path / step
        if path.is_symlink():
            raise AdapterError(f"{path}: is a link, and only files of the folder itself are pushed; copy it in place")
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise AdapterError(f"{path}: must be a plain file; write the output folder again")
    return path


def _no_token(path: Path) -> None:
    if TOKEN.search(read_regular(path).decode("utf-8", errors="replace")):
        raise ConfigError(f"{path}: holds what looks like an access token; remove it, and revoke the token")
