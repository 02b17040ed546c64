"""What CLAIR's evidence says in the attack table: do the scores separate, and do the thresholds lie in between?"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from fedlora_hf.aggregation import aggregate
from fedlora_hf.update import ClientUpdate
from scripts import PROJECT
from scripts.experiments.attack_report import Row, grid
from scripts.experiments.attacks import ATTACKS, Cohort, cells, cohort
from scripts.experiments.copying import RANK, REGIMES, Federation

KINDS = ("subspace", "direction", "scale")


def separation(sent: Cohort) -> list[Row]:
    """One row a kind of evidence: area under the ROC curve (1: every contaminated client scores above every benign
    one), the scores on both sides of the gap, how many thresholds are usable, how many clients are flagged by it."""
    updates = [ClientUpdate(name, state) for name, state in sent.updates.items()]
    found = aggregate(updates, "clair", target_rank=RANK)
    agreement = round(float(found.diagnosis["agreement"]), 4)
    rows: list[Row] = []
    for kind in KINDS:
        evidence = {name: kinds[kind] for name, kinds in found.evidence.items()}
        bad = [evidence[name].score for name in sent.bad]
        benign = [evidence[name].score for name in sent.benign]
        wins = [(b > g) + 0.5 * (b == g) for b in bad for g in benign]
        rows.append(
            {
                "kind": kind,
                "agreement": agreement,
                "auc": round(statistics.fmean(wins), 4) if wins else "",
                "highest_benign": round(max(benign), 4),
                "lowest_contaminated": round(min(bad), 4) if bad else "",
                "usable": sum(e.threshold is not None for e in evidence.values()),
                "contaminated_flagged": sum(evidence[name].flagged for name in sent.bad),
                "benign_flagged": sum(evidence[name].flagged for name in sent.benign),
            }
        )
    return rows


def summary(rows: Sequence[Row]) -> str:
    """Means over seeds, a line for each regime and cell; of every kind the separation and who is flagged by it."""
    lines = []
    keys = dict.fromkeys((row["regime"], row["attack"], row["contaminated"]) for row in rows)
    for regime, attack, count in keys:
        mine = [r for r in rows if (r["regime"], r["attack"], r["contaminated"]) == (regime, attack, count)]
        line = [str(regime), f"{attack}, {count}", f"{statistics.fmean(float(r['agreement']) for r in mine):.2f}"]
        for kind in KINDS:
            of_kind = [row for row in mine if row["kind"] == kind]
            areas = [float(row["auc"]) for row in of_kind if row["auc"] != ""]
            flagged = statistics.fmean(float(row["contaminated_flagged"]) for row in of_kind)
            line.append(f"{statistics.fmean(areas):.2f}, {flagged:.1f}" if areas else "-")
        lines.append(line)
    return grid(["", "contaminated", "agreement", *(f"{kind}: AUC, flagged" for kind in KINDS)], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--cache", type=Path, required=True, help="the cache of attacks.py")
    default = PROJECT / "docs" / "results" / "attacks"
    parser.add_argument("--output_dir", type=Path, default=default)
    args = parser.parse_args(arguments)
    rows: list[Row] = []
    for regime in REGIMES.values():
        for seed in range(args.seed, args.seed + args.seeds):
            federation = Federation(seed, regime, args.cache)
            for attack, count in cells(ATTACKS, (1, 4, 5)):
                key: Row = {"regime": regime.name, "seed": seed, "attack": attack, "contaminated": count}
                rows += [{**key, **row} for row in separation(cohort(federation, attack, count))]
    with open(args.output_dir / "evidence.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (args.output_dir / "evidence.md").write_text(
        f"# CLAIR's evidence in the attack table\n\nMeans over seeds.\n\n{summary(rows)}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
