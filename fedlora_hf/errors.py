"""The errors a user can cause. Each message is one line: the value, the rule it breaks, the remedy."""
# SPDX-License-Identifier: Apache-2.0

MAX_MESSAGE = 2000


def one_line(value: object, limit: int = 300) -> str:
    """`value` as one line of printable text, at most `limit` characters (an ellipsis says that it was cut)."""
    # What is not printable, bidirectional overrides and half characters among it, becomes a space.
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class FedLoraError(Exception):
    """Base of every error this package raises on purpose; the command line prints it and exits with `exit_code`.

    Names in a message may be anybody's: as text it is one printable line, whatever they hold.
    """

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__(), MAX_MESSAGE)


class ConfigError(FedLoraError, ValueError):
    """A flag, a field or an option has a value that cannot be used."""


class DataError(FedLoraError, ValueError):
    """A dataset is missing, has the wrong columns, or leaves a client with nothing to train on."""


class UpdateError(FedLoraError, ValueError):
    """A client's update cannot be used (NaN, wrong modules, wrong shapes ...); the client is quarantined."""


class AdapterError(FedLoraError, ValueError):
    """An adapter, on disk or in a model, is not one this package can read or write."""


class RoundError(FedLoraError, RuntimeError):
    """A round cannot be completed, too few usable updates for instance; nothing was changed."""


class StoppedError(RoundError):
    """A limit that the user set (max_suspects, dp_max_epsilon) stops the run before a round; nothing was changed."""

    exit_code = 3


class RecordError(FedLoraError, ValueError):
    """A run record (run.json) is missing, unreadable, or not of the schema this version knows."""


class ProcessError(FedLoraError, RuntimeError):
    """Another process of the same run failed; this one stops with it instead of waiting for it."""


class StorageError(FedLoraError, RuntimeError):
    """Something cannot be written where it belongs: the disk is full, or a link leads out of the output folder."""


class ClientTimeoutError(FedLoraError, RuntimeError):
    """A client took longer than client_timeout allows; it is quarantined for the round."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before its tolerance; the message names the remedy."""
