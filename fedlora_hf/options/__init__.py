"""Every option of our own, in groups, with all that is to be said about it: the manual of a run.

Imports neither torch nor transformers, so that `fedlora train --help` is instant. `FederatedConfig` (config.py) joins
these groups to `transformers.TrainingArguments`. A new option is one entry in its group: its help, its bound, what it
needs to have an effect, whether a resumed run may change it, and whether only the server reads it. The checks, the
comparison of a resumed run, Flower's nodes and the manual all read it there.
"""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.options.federation import (
    AggregationOptions,
    EvaluationOptions,
    HubOptions,
    PipelineOptions,
    PrivacyOptions,
)
from fedlora_hf.options.training import AdapterOptions, DataOptions, ModelOptions, RoundOptions

GROUPS = (
    ModelOptions,
    DataOptions,
    RoundOptions,
    AdapterOptions,
    AggregationOptions,
    PrivacyOptions,
    PipelineOptions,
    EvaluationOptions,
    HubOptions,
)

__all__ = [
    "GROUPS",
    "AdapterOptions",
    "AggregationOptions",
    "DataOptions",
    "EvaluationOptions",
    "HubOptions",
    "ModelOptions",
    "PipelineOptions",
    "PrivacyOptions",
    "RoundOptions",
]
