"""A Flower run's configuration: the flags of `fedlora train` as keys, and a few keys of a real federation's own."""
# SPDX-License-Identifier: Apache-2.0

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError
from fedlora_hf.flags import parse
from fedlora_hf.flower.feedback import WIRE_DTYPES

Value = str | int | float | bool


@dataclass(frozen=True)
class Settings:
    """Keys of [tool.flwr.app.config] that are no flag of `fedlora train`.

    min_nodes: clients that must have answered before the first round. wait_seconds: how long they are waited for.
    round_seconds: how long replies of a round are waited for; who has not answered is left out of it.
    wire_dtype: float, or int8, that clients send their updates in (bfloat16, float16, int8: the change, rounded, with
    error feedback: flower/feedback.py); what the server sends is always exact.
    roster: file {node id: client id}, JSON or YAML: only these nodes take part, each as that client.
    names_anew: where a run goes on, nodes that were not there before may take the names of those that are gone (all of
    them, after a simulation): whoever names a client first is it.
    flags: further flags of `fedlora train`, as on its command line.
    """

    min_nodes: int = 1
    wait_seconds: float = 600.0
    round_seconds: float = 3600.0
    wire_dtype: str = "float32"
    roster: str = ""
    names_anew: bool = False
    flags: str = ""

    def __post_init__(self) -> None:
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype={self.wire_dtype!r}: must be one of {', '.join(WIRE_DTYPES)}; choose one")
        for name in ("min_nodes", "wait_seconds", "round_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0; raise it")
        if self.roster and self.names_anew:
            raise ConfigError("names_anew=true: has no effect with a roster, which says who is who; leave it out")


def read(config: Mapping[str, Value]) -> tuple[FederatedConfig, Settings]:
    """(options, settings) of a run. An empty text is a flag left out; ConfigError for an unknown key."""
    own = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in config.items() if name in own})  # type: ignore[arg-type]
    flags = {field.name for field in fields(FederatedConfig)}
    if odd := sorted(set(config) - own - flags):
        raise ConfigError(
            f"{odd[0]}={config[odd[0]]!r}: is neither a flag of fedlora train nor a key of its own; remove it"
        )
    given = {name: value for name, value in config.items() if name in flags and value != ""}
    return parse([*(f"--{name}={value}" for name, value in given.items()), *shlex.split(settings.flags)]), settings
