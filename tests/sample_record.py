"""A run record such as a real run leaves, made of seeded numbers: for tests of the report, the card and the tables."""
# SPDX-License-Identifier: Apache-2.0

import random

from fedlora_hf.record.record import RunRecord

MODULES = [f"model.layers.{layer}.self_attn.{part}" for layer in range(4) for part in ("q_proj", "v_proj", "o_proj")]
THRESHOLDS = {"subspace": 0.5, "direction": 0.6, "scale": 6.0}
STAGES = ("local", "global", "personal")


def sample_record(num_clients: int = 12, rounds: int = 3, flagged: int = 4, seed: int = 0) -> RunRecord:
    """`num_clients` judged clients, the last `flagged` of them flagged, and one more quarantined (none at 1 client)."""
    rng = random.Random(seed)
    ids = [f"client-{i:03d}" for i in range(num_clients)]
    bad = ids[num_clients - flagged :]
    quarantined = (
        {"broken": "module layers.0.q_proj: A holds NaN; fix the client's training"} if num_clients > 1 else {}
    )
    evidence = {client: _evidence(rng, client in bad) for client in ids}
    good_share = 1 / max(1, num_clients - flagged)
    weights = {client: 0.0 if client in bad else good_share for client in ids}
    entries = [_round(rng, n, rounds, ids, bad, evidence, weights, quarantined) for n in range(1, rounds + 1)]
    clients = {
        client: {
            "collaborative": client not in bad,
            "weight": weights[client],
            "num_examples": rng.randint(40, 400),
            "evidence": evidence[client],
            "metrics": _client_metrics(rng, client in bad),
        }
        for client in ids
    }
    good = [clients[client]["metrics"] for client in ids if client not in bad]
    return RunRecord(
        kind="train",
        method="clair",
        seed=seed,
        method_info={"title": "CLAIR", "paper": "He, Chen, Feng 2026 (arXiv 2605.21217)", "averages": "product"},
        options={"num_rounds": rounds, "local_steps": 20, "learning_rate": 5e-3, "aggregation": "clair"},
        command=["fedlora", "train", "--model_name_or_path", "base", "--dataset", "dolly.jsonl", "--seed", str(seed)],
        created="2026-01-02T03:04:05Z",
        versions={"python": "3.11.9", "fedlora_hf": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        model={"name_or_path": "base", "task": "causal_lm", "dtype": "float32", "parameters": 2_300_000},
        adapter={"kind": "lora", "r": 8, "alpha": 16, "rslora": False, "target_modules": ["q_proj", "v_proj"]},
        data={"dataset": "dolly.jsonl", "partition_by": "category", "num_examples": 15011, "duplicates_removed": 8},
        rounds=entries,
        flagged=list(bad),
        quarantined=quarantined,
        clients=clients,
        modules={name: _module(rng) for name in MODULES},
        metrics={
            "before": {"global": _means(good, "before")},
            "after": {view: _means(good, view) for view in ("global", "personalised", "local")},
        },
        diagnosis={
            "summary": "common structure: shared subspace yes, common direction yes",
            "identifiable": True,
            "agreement": 0.62,
            "shared_energy": 0.71,
        },
        similarity={"ids": ids, "cosine": _cosines(rng, ids, bad)},
    )


def _evidence(rng: random.Random, bad: bool) -> dict[str, dict[str, float]]:
    """Scores near 0 for an honest client, near 1 for a contaminated one (scale: a z-score); one threshold a client."""
    scores = {kind: rng.gauss(0, 0.15 * limit) for kind, limit in THRESHOLDS.items()}
    limits = {kind: limit if kind == "scale" else limit * rng.uniform(0.9, 1.1) for kind, limit in THRESHOLDS.items()}
    if bad:
        scores["subspace"] += rng.choice([0.0, 0.9])
        scores["direction"] += rng.uniform(0.9, 1.3)
        scores["scale"] += rng.choice([0.0, 0.0, 100.0])
    return {kind: {"score": scores[kind], "threshold": limits[kind]} for kind in THRESHOLDS}


def _view(rng: random.Random, loss: float) -> dict[str, float]:
    loss += rng.gauss(0, 0.08)
    return {"loss": loss, "token_accuracy": max(0.02, 0.95 - 0.22 * loss + rng.gauss(0, 0.01)), "num_items": 400}


def _client_metrics(rng: random.Random, bad: bool) -> dict[str, dict[str, float]]:
    own = rng.gauss(0, 0.15)
    found = {"before": _view(rng, 3.4 + own), "global": _view(rng, 2.1 + own), "local": _view(rng, 2.3 + own)}
    return found if bad else {**found, "personalised": _view(rng, 1.7 + own)}


def _means(metrics: list[dict[str, dict[str, float]]], view: str) -> dict[str, float]:
    names = sorted({name for entry in metrics for name in entry[view]})
    return {name: sum(entry[view][name] for entry in metrics) / len(metrics) for name in names}


def _module(rng: random.Random) -> dict[str, object]:
    spectrum = [rng.uniform(8, 10), rng.uniform(5, 7), *(rng.uniform(0.2, 0.6) / (1 + i / 3) for i in range(10))]
    return {"rank": 2, "spectrum": spectrum, "discarded_energy": rng.uniform(0.001, 0.06)}


def _cosines(rng: random.Random, ids: list[str], bad: list[str]) -> list[list[float]]:
    grid = [[1.0] * len(ids) for _ in ids]
    for i, first in enumerate(ids):
        for j, second in enumerate(ids[:i]):
            both = (first in bad) + (second in bad)
            grid[i][j] = grid[j][i] = max(-1.0, min(1.0, rng.gauss((0.58, 0.02, 0.2)[both], 0.07)))
    return grid


def _round(
    rng: random.Random,
    number: int,
    rounds: int,
    ids: list[str],
    bad: list[str],
    evidence: dict[str, dict[str, dict[str, float]]],
    weights: dict[str, float],
    quarantined: dict[str, str],
) -> dict[str, object]:
    stage = STAGES[min(len(STAGES) - 1, (number - 1) * len(STAGES) // rounds)]
    loss = 3.4 * 0.8**number
    return {
        "round": number,
        "stage": stage,
        "cohort": [*ids, *quarantined],
        "collaborative": [client for client in ids if client not in bad],
        "flagged": list(bad),
        "quarantined": dict(quarantined),
        "weights": weights,
        "train_loss": {c: loss + rng.gauss(0, 0.1) + (0.9 if c in bad else 0.0) for c in ids},
        "update_norm": {c: rng.uniform(0.8, 1.2) * (8 if c in bad and rng.random() < 0.3 else 1) for c in ids},
        "evidence": evidence,
        "diagnosis": {"identifiable": True},
        "n_iter": rng.randint(4, 12),
        "converged": True,
        "bytes_up": dict.fromkeys(ids, 393216),
        "bytes_down": dict.fromkeys(ids, 393216),
        "seconds": {
            "train": rng.uniform(4, 6),
            "aggregate": rng.uniform(0.3, 0.6),
            "score": rng.uniform(1, 2),
        },
        "metrics": {
            "global": {c: _view(rng, loss + 0.3) for c in ids},
            "personalised": {c: _view(rng, loss) for c in ids if c not in bad},
        },
    }
