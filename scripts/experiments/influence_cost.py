"""(i) Influence: what it costs where nobody is contaminated, family by family of synthetic cohorts.

    python -m scripts.experiments.influence_cost

Distortion: the sine of the angle between the weighted mean and the plain one, so what a change of length leaves out.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedlora_hf.numerics.clair import Clair
from scripts.experiments.cohorts import generator
from scripts.experiments.families import HELD_OUT, TUNING, WEAK
from scripts.experiments.tables import arguments, write_csv

FAMILIES = TUNING | HELD_OUT | WEAK


def cost(cohort: Mapping[str, Sequence[Tensor]]) -> tuple[float, list[float]]:
    """(distortion, what is left of each client's influence) of one clean cohort."""
    found = Clair(refine="none").fit(cohort)
    inner = own = plain = 0.0
    for module, rows in cohort.items():
        mean, weighted = sum(rows) / len(rows), found.matrix(None, module)
        inner += float((mean * weighted).sum())
        own, plain = own + float(weighted.square().sum()), plain + float(mean.square().sum())
    cosine = min(inner / (own * plain) ** 0.5, 1.0)
    return (1 - cosine**2) ** 0.5, list(found.influence.values())


def main() -> None:
    args = arguments("influence", __doc__ or "")
    rows = []
    for name, family in FAMILIES.items():
        for K in (8, 20):
            seeds = range(args.seed, args.seed + args.seeds)
            found = [cost(family(K, generator("influence", name, K, seed))) for seed in seeds]
            kept = [value for _, values in found for value in values]
            row: dict[str, str | int | float] = {"family": name, "K": K, "cohorts": len(found)}
            row |= {"distortion": round(sum(distortion for distortion, _ in found) / len(found), 4)}
            row |= {"kept": round(sum(kept) / len(kept), 4), "least kept": round(min(kept), 4)}
            rows.append(row | {"below a tenth %": round(100 * sum(value < 0.1 for value in kept) / len(kept), 2)})
            if args.quick:
                break
    write_csv(args.output_dir / "cost.csv", rows)


if __name__ == "__main__":
    main()
