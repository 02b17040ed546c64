"""A collection of adapters measured on data of whoever combines them: each one's loss, and what it does to others'."""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from peft import LoraConfig

from fedlora_hf.adapter.slot import AdapterSlot, with_adapter
from fedlora_hf.data.collate import Collator
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.processes import Processes
from fedlora_hf.loading import described
from fedlora_hf.options.facts import at_least, check_number
from fedlora_hf.record.record import RunRecord
from fedlora_hf.record.standing import collaborative
from fedlora_hf.record.write import add_metrics
from fedlora_hf.rounds.judges import Functional
from fedlora_hf.rounds.judging import measured, split_of
from fedlora_hf.rounds.panel import Split, drawn, whole_panel
from fedlora_hf.training.scorer import Scorer
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate
from fedlora_hf.using.evaluating import Metrics, read
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.loaded import load
from fedlora_hf.util.progress import Progress

SAME_EXAMPLES = "all on the same examples"
WHOLE = "all examples"  # the one source of data that do not say whose they are


@dataclass(frozen=True)
class Measure:
    """What adapters are measured on. base: a folder or Hub id; dataset: whatever `fedlora train` reads, of which test
    examples are taken where it has them; judges: how many of its sources judge each update (0: none)."""

    base: str | None = None
    dataset: Any = None
    split: str | None = None
    max_eval_examples: int | None = None
    judges: int = 0
    batch_size: int = 8
    use_cpu: bool = False

    def check(self, method: str) -> None:
        """ConfigError for options that do not go together."""
        for name, value, least in (
            ("functional_judges", self.judges, 0),
            ("per_device_eval_batch_size", self.batch_size, 1),
            ("max_eval_examples", self.max_eval_examples, 1),
        ):
            check_number(name, value, int, at_least(least, "leave it out for the usual"))
        if self.dataset is None:
            named: dict[str, Any] = {
                "model_name_or_path": self.base,
                "dataset_split": self.split,
                "functional_judges": self.judges,
            }
            for name, given in {**named, "max_eval_examples": self.max_eval_examples}.items():
                if given:
                    raise ConfigError(f"{name}={given}: has no effect without data; pass --dataset, or leave it out")
        if self.judges and method != "clair":
            raise ConfigError(f"functional_judges={self.judges}: only clair counts what judges find; leave it out")

    def told(self) -> dict[str, Any]:
        """What was asked for, under the options' own names; None what was left out."""
        source = self.dataset[0] if isinstance(self.dataset, list) and len(self.dataset) == 1 else self.dataset
        names = {"model_name_or_path": self.base, "dataset": source, "dataset_split": self.split}
        return {**names, "max_eval_examples": self.max_eval_examples, "functional_judges": self.judges or None}

    def data(self) -> dict[str, Any]:
        """What the record says of the data."""
        source = self.told()["dataset"]
        local = not isinstance(source, str) or os.path.exists(source)
        return {"dataset": described(source), "local": local, "metrics": SAME_EXAMPLES}


@dataclass(frozen=True, eq=False)
class Bench:
    """The base with a place for these adapters, and examples. parts: {source: its examples}; whole: all of them."""

    scorer: Scorer
    parts: Mapping[str, datasets.Dataset]
    whole: datasets.Dataset

    def metrics(self, state: AdapterState | None) -> Metrics:
        """Of an adapter on all examples, see `training.metrics.held_out_metrics`; None: of the base alone."""
        return self.scorer.metrics(self.fitted(state), self.whole)

    def fitted(self, state: AdapterState | None) -> AdapterState:
        """The adapter with no change in modules that only others have."""
        blank = self.scorer.blank
        if state is None:
            return blank
        own = {name: state[name] if name in state else factors * 0.0 for name, factors in blank.items()}
        return AdapterState(own, state.extras)

    def judged(self, updates: Iterable[ClientUpdate], combined: Aggregate, judges: int, seed: int) -> Functional:
        """What each update does to the loss of `judges` + 1 of the data's sources, none of which judges an update of
        its own name. combined: of the same updates, without judges; a source that is no client of it counts whole."""
        fitted = [replace(u, state=self.fitted(u.state)) for u in updates if u.client_id in combined.influence]
        influence = {source: combined.influence.get(source, 1.0) for source in self.parts}
        panel = whole_panel(self._splits(), judges, len(fitted), 0.0, seed)
        mean = self.fitted(combined.state)
        found = measured(self.scorer, panel, self.parts, self.scorer.blank, mean, influence, fitted, Processes(), seed)
        # Nothing was trained here that judging could be dear beside.
        return replace(found, facts={name: fact for name, fact in found.facts.items() if name != "cost"})

    def panel(self, judges: int, seed: int) -> list[str]:
        """The sources that judge, as `judged` draws them."""
        return drawn(self._splits(), judges + 1, seed)

    def _splits(self) -> dict[str, Split]:
        return {source: split_of(rows) for source, rows in self.parts.items()}


def bench_of(run: Finished, wanted: Measure, updates: Sequence[ClientUpdate]) -> Bench:
    """Base, tokenizer and examples for the updates, which are sound, and of one shape where they share a module.

    run: stands for their collection: its folder is one of the adapters', whose tokenizer is used where it keeps one.
    """
    loaded = load(run, wanted.base, use_cpu=wanted.use_cpu, per_device_eval_batch_size=wanted.batch_size)
    held = read(run, loaded, wanted.told()["dataset"], split=wanted.split, examples=wanted.max_eval_examples)
    modules = sorted({module for update in updates for module in update.state})
    rank = max(factors.rank for update in updates for factors in update.state.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        modules_to_save=run.config.get("modules_to_save"),
        task_type=run.task_type,
    )
    model = with_adapter(loaded.model, config, 0).to(loaded.model.device)
    pad = loaded.tokenizer.pad_token_id
    collate = Collator(int(pad) if isinstance(pad, int) else 0)
    scorer = Scorer(model.eval(), AdapterSlot(model), collate, loaded.tokenizer, loaded.args, Processes())
    return Bench(scorer, _parts(held.tokens, held.sources), held.tokens)


def _parts(tokens: datasets.Dataset, sources: Sequence[str] | None) -> dict[str, datasets.Dataset]:
    if sources is None:
        return {WHOLE: tokens}
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(str(source), []).append(row)
    return {source: tokens.select(rows[source]) for source in sorted(rows)}


def record_metrics(
    record: RunRecord,
    bench: Bench,
    own: Mapping[str, AdapterState],
    merged: AdapterState,
    personal: Mapping[str, AdapterState],
    progress: Progress,
) -> None:
    """Put into the record what the base, every client's own adapter ("local"), the merged one ("global") and the
    personal ones make of all examples, of each client and as means over the collaborative ones.

    own, personal: {client: adapter}; a client that has no refined one keeps its own, which is not measured twice.
    """
    before, shared = bench.metrics(None), bench.metrics(merged)
    alone = {client: bench.metrics(own[client]) for client in progress.over(sorted(own), "measuring adapters")}
    last = {c: bench.metrics(personal[c]) if c in personal else alone[c] for c in collaborative(record) if c in own}
    add_metrics(record, "global", dict.fromkeys(alone, before), when="before")
    for view, found in (("local", alone), ("global", dict.fromkeys(alone, shared)), ("personalised", last)):
        add_metrics(record, view, found)
