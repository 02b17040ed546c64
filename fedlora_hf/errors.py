"""The errors a user can cause. Each message is one line: the value, the rule it breaks, the remedy."""
# SPDX-License-Identifier: Apache-2.0


class FedLoraError(Exception):
    """Base of every error this package raises on purpose; the command line prints it and exits with 2."""


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


class RecordError(FedLoraError, ValueError):
    """A run record (run.json) is missing, unreadable, or not of the schema this version knows."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before its tolerance; the message names the remedy."""
