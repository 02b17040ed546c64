"""What goes down to a node as a change against what it holds already, where that is fewer bytes.

A node keeps the adapters it was sent last in `Context.state` and tells their fingerprints with every answer. The next
message then leaves out the tensors that are the same, and of the others has the bits that differ, compressed. The node
has the same bytes as if the whole had been sent: it checks their fingerprint. One that holds nothing of what a message
builds on (it was started again) says so, and is sent the whole.
"""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora_hf.errors import UpdateError
from fedlora_hf.flower.wire import DTYPES, put
from fedlora_hf.update import AdapterState

XOR = "fedlora.xor"
# {name of a state in a message: where a node keeps it}; a global adapter is the start of the next round.
SLOTS = {"start": "held.start", "global": "held.start", "frozen": "held.frozen"}
# Adapters that the server keeps for nodes that were away for some rounds [our choice].
REMEMBERED = 4
# Bytes of an adapter that a node keeps: `Context.state` reaches every process of its in one message of at most 2 GiB.
LARGEST_HELD = 512 * 1024**2
# Fast: the bits that differ are noise but for the first bytes of a number, so more effort finds hardly more.
EFFORT = 1


@dataclass(frozen=True, eq=False)
class Parcel:
    """A state as it travels, whole, and the fingerprint of its arrays."""

    content: RecordDict
    fingerprint: str

    @classmethod
    def of(cls, state: AdapterState) -> "Parcel":
        content = RecordDict()
        put(content, "parcel", state)
        return cls(content, fingerprint_of(arrays_of(content, "parcel")))

    @property
    def arrays(self) -> ArrayRecord:
        return arrays_of(self.content, "parcel")


class Downlink:
    """The server's side: what it sent lately, and what each client says it holds."""

    def __init__(self) -> None:
        self._sent: dict[str, ArrayRecord] = {}
        self._held: dict[str, frozenset[str]] = {}
        self._changes: dict[tuple[str, str], ArrayRecord | None] = {}

    def heard(self, client: str, said: Mapping[str, object]) -> None:
        """Note what a client's answer says it holds; an untrue word makes it ask for the whole next time."""
        told = said.get("holds")
        listed = told[: len(SLOTS)] if isinstance(told, list) else []
        self._held[client] = frozenset(item for item in listed if isinstance(item, str))

    def forget(self, client: str) -> None:
        """The client holds nothing: the next message has everything whole."""
        self._held.pop(client, None)

    def put(self, content: RecordDict, name: str, parcel: Parcel, client: str) -> int:
        """Add a state to a client's message; the bytes of its tensors there."""
        self._remember(parcel)
        arrays, base = parcel.arrays, None
        for held in sorted(self._held.get(client, ())):
            change = self._change(held, parcel)
            if change is not None and size(change) < size(arrays):
                arrays, base = change, held
        content[f"{name}.arrays"] = arrays
        content[f"{name}.scales"] = parcel.content["parcel.scales"]
        if base is not None:
            content[f"{name}.change"] = ConfigRecord({"since": base, "fingerprint": parcel.fingerprint})
        return size(arrays)

    def _remember(self, parcel: Parcel) -> None:
        self._sent.pop(parcel.fingerprint, None)  # the last one sent is the last to go
        self._sent[parcel.fingerprint] = parcel.arrays
        for old in list(self._sent)[:-REMEMBERED]:
            del self._sent[old]
        self._changes = {pair: change for pair, change in self._changes.items() if set(pair) <= set(self._sent)}

    def _change(self, held: str, parcel: Parcel) -> ArrayRecord | None:
        """The change from what a client holds, made once for all that hold it; None where there is none to be had."""
        if held == parcel.fingerprint:
            return ArrayRecord()
        pair = (held, parcel.fingerprint)
        if held in self._sent and pair not in self._changes:
            self._changes[pair] = difference(parcel.arrays, self._sent[held])
        return self._changes.get(pair)


def restored(content: RecordDict, memory: RecordDict) -> bool:
    """The node's side: make every state in a message whole, in place, and keep it; False where that cannot be done.

    Raises UpdateError for a change that is none. memory: `Context.state`.
    """
    for name, slot in SLOTS.items():
        if f"{name}.arrays" not in content:
            continue
        arrays, change = arrays_of(content, name), content.get(f"{name}.change")
        if isinstance(change, ConfigRecord):
            base = next((b for b in _kept(memory) if fingerprint_of(b) == change.get("since")), None)
            if base is None:
                return False
            arrays = rebuilt(arrays, base)
            if fingerprint_of(arrays) != change.get("fingerprint"):
                return False
            content[f"{name}.arrays"] = arrays
            del content[f"{name}.change"]
        memory.pop(f"{slot}.arrays", None)
        if size(arrays) <= LARGEST_HELD:
            memory[f"{slot}.arrays"] = arrays
    return True


def holdings(memory: RecordDict) -> list[str]:
    """Fingerprints of what a node holds, for its answer."""
    return sorted({fingerprint_of(arrays) for arrays in _kept(memory)})


def _kept(memory: RecordDict) -> Iterable[ArrayRecord]:
    return (arrays_of(memory, slot) for slot in sorted(set(SLOTS.values())) if f"{slot}.arrays" in memory)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def difference(arrays: ArrayRecord, since: ArrayRecord) -> ArrayRecord | None:
    """What `rebuilt` makes `arrays` of, given `since`: the arrays that are not the same there, as the bits that differ
    where those are smaller. None where `since` has arrays that are no more."""
    if not set(since) <= set(arrays):
        return None
    changed = ArrayRecord()
    for key, array in arrays.items():
        old = since.get(key)
        alike = old is not None and (old.dtype, old.shape, old.stype) == (array.dtype, array.shape, array.stype)
        if old is None or not alike:
            changed[key] = array
        elif old.data != array.data:
            bits = zlib.compress(_planes(_xor(old.data, array.data), array.dtype), EFFORT)
            smaller = len(bits) < len(array.data)
            changed[key] = Array(array.dtype, array.shape, XOR, bits) if smaller else array
    return changed


def rebuilt(change: ArrayRecord, since: ArrayRecord) -> ArrayRecord:
    """The arrays that `change` was made of; UpdateError for bits that do not fit."""
    arrays = ArrayRecord(dict(since.items()))
    for key, array in change.items():
        arrays[key] = array if array.stype != XOR else _patched(array, since.get(key), key)
    return arrays


def _patched(array: Array, old: Array | None, key: str) -> Array:
    wrong = UpdateError(f"array {key[:80]!r}: its change does not fit what this node holds; start the node again")
    if old is None or old.dtype not in DTYPES:
        raise wrong
    try:
        # Never more than it must be, whatever a few bytes may claim to hold.
        planes = zlib.decompressobj().decompress(array.data, len(old.data) + 1)
    except zlib.error:
        raise wrong from None
    if len(planes) != len(old.data):
        raise wrong
    return Array(old.dtype, old.shape, old.stype, _xor(old.data, _unplaned(planes, old.dtype)))


def fingerprint_of(arrays: ArrayRecord) -> str:
    """SHA-256 of arrays, their names, dtypes and shapes, whatever their order: 16 bytes of it, as hex."""
    found = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        found.update(f"{key}\n{array.dtype} {tuple(array.shape)} {array.stype} {len(array.data)}\n".encode())
        found.update(array.data)
    return found.hexdigest()[:32]


def size(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())


def arrays_of(content: RecordDict, name: str) -> ArrayRecord:
    """The arrays of that name; UpdateError where there are none."""
    found = content.get(f"{name}.arrays")
    if not isinstance(found, ArrayRecord):
        raise UpdateError(f"{name}.arrays is no record of arrays; use this package's server and client")
    return found


def _xor(one: bytes, other: bytes) -> bytes:
    return (np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).tobytes()


def _planes(bits: bytes, dtype: str) -> bytes:
    """The first bytes of all numbers, then the second ones ...: those that are mostly 0 lie together."""
    return np.ascontiguousarray(np.frombuffer(bits, np.uint8).reshape(-1, DTYPES[dtype].itemsize).T).tobytes()


def _unplaned(planes: bytes, dtype: str) -> bytes:
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(DTYPES[dtype].itemsize, -1).T).tobytes()
