"""Options of what the federation makes of the updates: aggregation, privacy, pipeline, evaluation, the Hub."""
# SPDX-License-Identifier: Apache-2.0

import re
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_hf.options.facts import GIVEN, Bound, at_least, not_negative, option, positive, share


@dataclass
class AggregationOptions:
    """Aggregation and personal adapters"""

    aggregation: str = option("clair", "Aggregation method; fedlora methods lists them.")
    # With `str` in the union a flag's text arrives as it is; `Any` would be called on it, and fail.
    aggregation_options: dict[str, Any] | str | None = option(
        None, "The method's own options: NAME=VALUE ..., or one JSON object; fedlora methods METHOD lists them."
    )
    clusters: Literal["1", "auto"] = option(
        "1",
        "clair: 1 global adapter, or (auto) one for each group of clients that agree within and not between; clients "
        "start from their group's. All clients take part in every round. See docs/clair.md.",
        bound=Bound(lambda c: c in ("1", "auto"), "must be 1 or auto", "1 is one global adapter"),
        needs={
            "aggregation": ("clair",),
            "pipeline": ("none",),
            "server_optimizer": ("none",),
            "clients_per_round": (None,),
            "functional_judges": (0, "auto"),
            "load_best_model_at_end": (False,),
        },
        side="server",
    )
    functional_judges: int | str | None = option(
        "auto",
        "clair: whose validation data each update is evaluated on: auto (all others', in rounds where that costs less "
        "than a tenth of the training, by counts of tokens), N other clients drawn anew each round, or 0 for nobody's. "
        "Holds while most judges are honest. See docs/clair.md.",
        bound=Bound(
            lambda value: value == "auto" or (type(value) is int and value >= 0),  # true is no number
            "must be auto or a whole number of clients, 0 or more",
            "0 judges on the updates alone",
        ),
        needs={"aggregation": ("clair",)},
        side="server",
    )
    server_optimizer: Literal["none", "avgm", "adam", "yogi", "adagrad"] = option(
        "none",
        "Step of the server around an averaging method: momentum, or adaptive. See docs/choosing.md.",
        side="server",
    )
    server_learning_rate: float | None = option(
        None,
        "Of the server's step; default 1 for avgm, 1e-3 for the others.",
        bound=positive("leave it out for the default"),
        needs={"server_optimizer": ("avgm", "adam", "yogi", "adagrad")},
        side="server",
    )
    server_momentum: float = option(
        0.9,
        "Of the server's step: avgm's momentum, beta_1 of the others.",
        bound=share("0 is no momentum"),
        needs={"server_optimizer": ("avgm", "adam", "yogi", "adagrad")},
        side="server",
    )
    server_beta2: float = option(
        0.99,
        "Of the server's step: decay of adam's and yogi's second moment.",
        bound=share("0.99 for instance"),
        needs={"server_optimizer": ("adam", "yogi")},
        side="server",
    )
    server_tau: float = option(
        1e-3,
        "Of the server's step: adaptivity of adam, yogi and adagrad.",
        bound=positive("1e-3 for instance"),
        needs={"server_optimizer": ("adam", "yogi", "adagrad")},
        side="server",
    )
    aggregation_device: str = option(
        "auto",
        "Where updates are combined: cpu, cuda or cuda:n; auto is the training device when it is a GPU with room for "
        "the clients' factors of one module. Flags are the same on both.",
        bound=Bound(
            lambda place: re.fullmatch(r"auto|cpu|cuda(:\d+)?", place) is not None,
            "must be auto, cpu, cuda or cuda:n",
            "choose one of these",
        ),
        resumable=True,
        side="server",
    )
    weight_by: Literal["examples", "uniform"] = option("examples", "Weights of the clients in a mean.")
    weight_cap: float = option(
        3.0,
        "Robust methods: no client counts for more than so many times the cohort's median number of examples, whatever "
        "it claims; inf believes every claim. Plain means trust the claims.",
        bound=at_least(1, "inf believes every number of examples that a client claims"),
    )
    personalise: Literal["select", "method"] = option(
        "select",
        "Personal adapters: what the method refined (or the client's own last update), or the best on the client's "
        "validation split among that, the global adapter, its own update and mixes of the two.",
        resumable=True,
    )
    personal_steps: int | None = option(
        None,
        "Further local steps of each client from its personal adapter, at the end; default 0, in a pipeline 20.",
        bound=at_least(0, "0 adds none"),
        resumable=True,
    )
    personal_proximal_mu: float = option(
        0.0,
        "Ditto: the personal steps start from the global adapter, and half the squared distance to it, times this, is "
        "added to their loss. 0: they start from the adapter that was chosen, and nothing holds them.",
        bound=not_negative("0 leaves the term out"),
        needs={"personal_steps": GIVEN},
        resumable=True,
    )
    personal_learning_rate: float | None = option(
        None,
        "Learning rate of the personal steps; default learning_rate, in a pipeline 5e-2.",
        bound=positive("personal_steps=0 adds none"),
        needs={"personal_steps": GIVEN},
        resumable=True,
    )


@dataclass
class PrivacyOptions:
    """Differential privacy of what leaves a client (docs/privacy.md)"""

    dp_clip: float | None = option(
        None,
        "Largest L2 norm of a client's change of the trained factors in a round; longer ones are scaled down.",
        bound=positive("the norm of a usual change"),
    )
    dp_noise_multiplier: float | None = option(
        None,
        "Standard deviation of the noise that each client adds to every entry, in units of dp_clip; default 0.",
        bound=not_negative("0 only clips"),
        needs={"dp_clip": GIVEN},
    )
    dp_delta: float | None = option(
        None,
        "The delta that epsilon is told for; default 1e-5.",
        bound=Bound(lambda d: 0 < d < 1, "must lie between 0 and 1", "leave it out for 1e-05"),
        needs={"dp_clip": GIVEN, "dp_noise_multiplier": GIVEN},
    )
    dp_max_epsilon: float | None = option(
        None,
        "Stop before the round that would take a client past this epsilon (exit code 3, nothing changed).",
        bound=positive("8 for instance"),
        needs={"dp_clip": GIVEN, "dp_noise_multiplier": GIVEN},
        resumable=True,
        side="server",
    )
    dp_seed: int | None = option(
        None,
        "Draw the noise from this instead of a secret: for experiments; it voids the guarantee.",
        bound=at_least(0, "leave it out for a secret"),
        needs={"dp_clip": GIVEN, "dp_noise_multiplier": GIVEN},
    )


@dataclass
class PipelineOptions:
    """The direction/magnitude pipeline"""

    pipeline: Literal["none", "fedlora_optimizer"] = option(
        "none",
        "fedlora_optimizer: after the federated rounds, global rounds that train A's direction alone, then personal "
        "steps on B's magnitude alone (needs adapter dirmag, and sets it).",
    )
    global_rounds: int = option(
        1,
        "Rounds of the global stage (0 leaves it out).",
        bound=at_least(0, "0 leaves the global stage out"),
        needs={"pipeline": ("fedlora_optimizer",)},
        resumable=True,
    )
    global_learning_rate: float | None = option(
        None,
        "Learning rate of the global stage; default learning_rate.",
        bound=positive("global_rounds=0 leaves the global stage out"),
        needs={"pipeline": ("fedlora_optimizer",), "global_rounds": GIVEN},
    )
    server_dataset: str | None = option(
        None,
        "Data of the server's own, for the global stage (default there: the clients' data, federated) or for fltrust.",
        side="server",
    )


@dataclass
class EvaluationOptions:
    """Evaluation"""

    evaluate_rounds: bool = option(
        False, "Evaluate the global adapter on every client after every round.", resumable=True
    )
    generation_examples: int = option(
        4,
        "Test examples a client answers greedily for ROUGE-L (0: none).",
        bound=at_least(0, "0 generates nothing"),
        needs={"task": ("causal_lm",)},
        resumable=True,
    )
    max_new_tokens: int = option(
        64,
        "Longest generated answer, in tokens.",
        bound=at_least(1, "pass generation_examples=0 to generate nothing"),
        needs={"task": ("causal_lm",), "generation_examples": GIVEN},
        resumable=True,
    )
    report_answers: int = option(
        0,
        "Show N test questions with their answers before and after in the report: clients' own text, never pushed.",
        bound=at_least(0, "0 shows none"),
        needs={"task": ("causal_lm",), "generation_examples": GIVEN},
        resumable=True,
        side="server",
    )
    max_eval_examples: int | None = option(
        None,
        "At most so many test examples a client.",
        bound=at_least(1, "leave it out for all of them"),
        resumable=True,
    )


@dataclass
class HubOptions:
    """The Hub"""

    hub_license: str | None = option(
        None,
        "Licence of the adapters, for the model card (an identifier the Hub knows).",
        resumable=True,
        side="server",
    )
    hub_language: list[str] | None = option(
        None, "Languages of the data, for the model card (en, de ...).", resumable=True, side="server"
    )
    hub_with_clients: bool = option(
        False,
        "Push the personal adapters too; they derive from the clients' private data.",
        resumable=True,
        side="server",
    )
    hub_with_client_facts: bool = option(
        False,
        "Push what the record says of each client too (names, counts, losses, norms, evidence), and the report.",
        resumable=True,
        side="server",
    )
