"""The roster file: which node may speak for which client, as the operator says, whatever a node says of itself."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import yaml

from fedlora_hf.errors import ConfigError, one_line
from fedlora_hf.util.names import NameBook, unfit_reason

MAX_BYTES = 16 * 1024**2
_SHAPE = "must be a mapping {node id: client id}"


def read_roster(path: str) -> dict[int, str]:
    """{node id: client id} from a JSON or YAML file; several nodes may speak for one client, one at a time.

    A node id is the number that `flwr supernode list` shows; with SuperNode authentication it stays with the node's key
    for good. ConfigError, one line, for anything else, be it a node that is named twice or a name unfit for a client.
    """
    found: dict[int, str] = {}
    spellings = NameBook()
    for key, value in _pairs(path):
        if not key.isascii() or not key.isdigit():
            raise ConfigError(
                f"roster={path!r}: {one_line(key, 80)!r} is no node id; write the number that `flwr supernode list` "
                "shows for that key"
            )
        reason = unfit_reason(value) or spellings.clash(value)
        if reason:
            raise ConfigError(f"roster={path!r}: node {key}: {reason}")
        if int(key) in found:
            raise ConfigError(f"roster={path!r}: node {key} is named twice; leave one out")
        found[int(key)] = value
        spellings.add(value)
    if not found:
        raise ConfigError(f"roster={path!r}: names no node; {_SHAPE}")
    return found


def _pairs(path: str) -> list[tuple[str, str]]:
    """The file's keys and values as they are written: 007 stays 007, and a key that comes twice comes twice."""
    file = Path(path)
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ConfigError(f"roster={path!r}: no such file; {_SHAPE}")
        with open(file, "rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"roster={path!r}: larger than {MAX_BYTES >> 20} MiB; {_SHAPE}")
        tree = yaml.compose(content.decode("utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"roster={path!r}: not readable ({one_line(error, 120)}); {_SHAPE}") from None
    if not isinstance(tree, yaml.MappingNode) or not all(
        isinstance(part, yaml.ScalarNode) for pair in tree.value for part in pair
    ):
        raise ConfigError(f"roster={path!r}: is something else; {_SHAPE}")
    return [(key.value, value.value) for key, value in tree.value]
