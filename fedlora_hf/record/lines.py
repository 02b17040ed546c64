"""A round in a few numbers for trackers, and in one line for the terminal."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN_CLAIMS = 10  # in one line; the record has them all


def round_log(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round that trackers get."""
    losses = [loss for loss in entry["train_loss"].values() if loss is not None]
    logs = {"round": entry["round"], "flagged": len(entry["flagged"]), "quarantined": len(entry["quarantined"])}
    if losses:
        logs["loss"] = sum(losses) / len(losses)
    logs["seconds"] = sum(entry["seconds"].values())
    logs |= {f"eval_global_{name}": value for name, value in entry["metrics"].get("global", {}).items()}
    return logs


def claims_line(rounds: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning that names who claimed far more examples than the others in the last round; None when nobody did, or
    the same clients as in the round before."""
    last, *earlier = [dict(entry.get("outlier_claims") or {}) for entry in rounds[:-3:-1]] or [{}]
    if not last or (earlier and set(earlier[0]) == set(last)):
        return None
    return "warning: " + "; ".join(f"{client} {said}" for client, said in sorted(last.items())[:SHOWN_CLAIMS])


def round_line(entry: Mapping[str, Any], num_rounds: int) -> str:
    """A round in one line for the terminal."""
    logs = round_log(entry)
    parts = [f"round {entry['round']}/{num_rounds}: {len(entry['cohort'])} clients"]
    parts += [f"train loss {logs['loss']:.3f}"] if "loss" in logs else []
    parts += [f"{kind} {', '.join(sorted(entry[kind]))}" for kind in ("flagged", "quarantined") if entry[kind]]
    return ", ".join([*parts, f"{logs['seconds']:.1f} s"])
