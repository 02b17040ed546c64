"""FederatedTrainer: rounds of local training and aggregation around one model, as a `transformers.Trainer`."""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from torch import nn
from transformers.trainer_utils import TrainOutput

from fedlora_hf import adapters, bookkeeping, output, personalise
from fedlora_hf.aggregation import aggregate, method_named
from fedlora_hf.aggregation.method import Method
from fedlora_hf.aggregation.parts import mean_of_trained
from fedlora_hf.client import num_local_steps, prepare_client
from fedlora_hf.client_trainer import ClientTrainer
from fedlora_hf.config import FederatedConfig
from fedlora_hf.errors import ConfigError, RoundError
from fedlora_hf.files import read_adapter
from fedlora_hf.functional import functional_evidence
from fedlora_hf.hub import fetch_run, parse_source, write_card
from fedlora_hf.publishing import Publisher
from fedlora_hf.record import RunRecord
from fedlora_hf.rounds import RoundStore
from fedlora_hf.seeding import derive_seed
from fedlora_hf.stages import Stage, personal_stage, round_stage, total_rounds
from fedlora_hf.update import AdapterState, Aggregate, ClientUpdate, compressed, fitted, state_sum

Metrics = dict[str, float]
SERVER = "server"


@dataclass
class Run:
    """Where a run stands: the last committed round, the global adapter after it, the record, the personal adapters."""

    round: int
    state: AdapterState
    record: RunRecord
    personalised: dict[str, AdapterState] = field(default_factory=dict)


class FederatedTrainer(ClientTrainer):
    """Fine-tune one model together with many clients, none of which shows its data to another.

    model: a causal LM or a sequence classifier, or a PeftModel that has its adapter already.
    args: every option of the run.
    client_datasets: {client id: Dataset, or {"train", "validation", "test"} of Datasets}, as
        `data.clients.make_clients` gives them, or already tokenised (input_ids, labels).
    peft_config: the adapter; default made from `args` (adapter, lora_r, lora_alpha, target_modules ...).
    processing_class: the tokenizer; needed for text, and for ROUGE-L.
    server_dataset: data of the server's own, for the global stage of a pipeline (args.server_dataset says so).
    record: facts for the run record that only the caller knows (dataset, command).
    Further keyword arguments are Trainer's (callbacks, compute_loss_func, optimizer_cls_and_kwargs ...).

    There is one model in memory; adapters are swapped in and out of it, and clients' updates live in
    `output_dir/rounds`. `train()` runs the rounds, `evaluate()` scores the global adapter and the personal ones,
    `save_model()` writes them as stock PEFT folders. Under torchrun or accelerate, processes train different clients
    of a round; the result does not depend on how many there are.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FederatedConfig,
        client_datasets: Mapping[str, Any],
        *,
        server_dataset: Any = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, client_datasets, **kwargs)
        if (server_dataset is None) != (args.server_dataset is None):
            raise ConfigError("server_dataset: the data and args.server_dataset go together; pass both or neither")
        tokenizer = self.processing_class
        self.server = None if server_dataset is None else prepare_client(SERVER, server_dataset, tokenizer, args)
        self.method = method_named(args.aggregation)
        _check_cohort(args, self.method, len(self.clients))
        self.publisher = Publisher(args)
        self.store = RoundStore(f"{args.output_dir}/rounds", self.slot.config())
        self._facts = dict(record or {})
        self.run = Run(0, self.initial, self._opening())

    # ---- the run -----------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]  # no hyper-parameter trials, no ignored keys
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Run the rounds and write `output_dir`; go on from where `resume_from` (or `resume_from_checkpoint`) says."""
        args, began = self.args, time.perf_counter()
        self._begin("last" if resume_from_checkpoint is True else resume_from_checkpoint or args.resume_from)
        self.state.global_step, self.state.log_history, self.control.should_training_stop = 0, [], False
        self.state.max_steps = self.num_rounds * sum(self.num_steps(client) for client in self.clients)
        self.state.num_train_epochs = self.num_rounds
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if not self.run.round:
            self._score("global", dict.fromkeys(self.clients, self.initial), when="before")
        while self.run.round < self.num_rounds and not self.control.should_training_stop:
            self._round(self.run.round + 1)
        self._personalise()
        self.evaluate()
        self.save_model()
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        losses = [loss for entry in self.run.record.rounds for loss in entry["train_loss"].values()]
        metrics = {"train_runtime": time.perf_counter() - began, "train_rounds": self.run.round}
        return TrainOutput(self.state.global_step, float(np.mean(losses)) if losses else 0.0, metrics)

    def _begin(self, resume: str | None) -> None:
        """Stand at the start of a new run, or after the committed round that `resume` names."""
        if resume is not None and resume.startswith("hub:"):
            resume = self._fetch(resume)
        committed = self.store.committed()
        if resume not in (None, "last") and not (resume.isdigit() and int(resume) in committed):
            have = ", ".join(map(str, committed)) or "none"
            raise ConfigError(f"resume_from={resume!r}: must be 'last' or a committed round ({have}); see rounds/")
        self.run = Run(0, self.initial, self._opening())
        number = None if resume is None else int(resume) if resume != "last" else max(committed, default=0)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if number is None:
                bookkeeping.check_overwrite(self.args.output_dir, self.store)
                self.store.clear()
            else:
                self.store.forget_after(number)
        self.accelerator.wait_for_everyone()
        if number:
            earlier = self.store.record(number)
            bookkeeping.check_same_run(earlier, self.run.record)
            self.run = Run(number, self.store.state(number), earlier)

    def _fetch(self, source: str) -> str:
        """Take a run from the Hub as the last committed round of this output folder; the round's number."""
        place = parse_source(source)
        folder = fetch_run(str(place.repo_id), place.revision, token=self.args.hub_token)
        record = RunRecord.load(folder)
        if self.method.keeps or self.method.restarts:
            raise ConfigError(
                f"resume_from={source!r}: {self.method.name} goes on from what clients keep for themselves, which is "
                "not on the Hub; resume from the output folder"
            )
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            bookkeeping.check_overwrite(self.args.output_dir, self.store)
            self.store.clear()
            self.store.adopt(len(record.rounds), read_adapter(folder)[0], record)
        self.accelerator.wait_for_everyone()
        return str(len(record.rounds))

    def _opening(self) -> RunRecord:
        size = sum(parameter.numel() for parameter in self.slot.parameters())
        config: Any = self.model.peft_config[self.slot.name]
        adapter = {
            "kind": self.args.adapter,
            "r": self.rank,
            "alpha": config.lora_alpha,
            "rslora": config.use_rslora,
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in self.slot.layers}),
            "parameters": size,
        }
        examples = {client: len(data.train) for client, data in self.clients.items()}
        return bookkeeping.opening(self.args, self.method, self._facts, examples, adapter)

    def _round(self, number: int) -> None:
        """One round: train the cohort, look at the updates, aggregate, commit."""
        args, began = self.args, time.perf_counter()
        stage, cohort = self._stage(number), self.cohort(number)
        self.state.epoch = number - 1
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        for client_id in self.steps.over(self.mine(cohort), f"round {number}/{self.num_rounds}"):
            self._train_into_store(client_id, number)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if stage.on_server:
                self._train_server(number)
            else:
                self._judge_by_others(number, cohort)
                self._close(number, cohort, trained=time.perf_counter() - began)
        self.accelerator.wait_for_everyone()
        self.run = Run(number, self.store.state(number), self.store.record(number))
        entry = self.run.record.rounds[-1]
        if args.evaluate_rounds:
            per_client = self.test_metrics(dict.fromkeys(self.clients, self.run.state))
            entry["metrics"] = {"global": bookkeeping.mean_over_collaborative(self.run.record, per_client)}
            if self.is_world_process_zero():
                self.store.amend(number, self.run.record)
        self.state.epoch = number
        self.log(bookkeeping.round_log(entry))
        self.steps.say(bookkeeping.round_line(entry, self.num_rounds))
        if self.publisher.pushes_rounds and self.is_world_process_zero():
            output.write_run(args.output_dir, self.run.state, self.store.config, self.run.record, report=False)
            self.publisher.round(number)
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)

    def cohort(self, number: int) -> list[str]:
        """The clients of a round, sorted: all, or `clients_per_round` drawn from (seed, round); none on the server."""
        ids = [] if self._stage(number).on_server else list(self.clients)
        if self.args.clients_per_round is None or self.args.clients_per_round >= len(ids):
            return ids
        rng = np.random.default_rng(derive_seed(self.args.seed, "cohort", number))
        return sorted(rng.choice(ids, self.args.clients_per_round, replace=False).tolist())

    def _stage(self, number: int) -> Stage:
        return round_stage(self.args, self.method.trains, number)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, those of the global stage included."""
        return total_rounds(self.args)

    # ---- one client --------------------------------------------------------------------------------------------------

    def _train_into_store(self, client_id: str, number: int) -> None:
        """Train a client unless an earlier, interrupted run already did; a client that fails is noted, not fatal."""
        if self.store.finished(number, client_id) is not None:
            return
        try:
            self.store.save(number, self.train_client(client_id, number))
        except Exception as error:  # whatever a client raises is its own failure; the round goes on without it
            reason = str(error).strip().splitlines()
            self.store.fail(number, client_id, f"training failed: {type(error).__name__}: {(reason or [''])[0][:300]}")

    def train_client(self, client_id: str, number: int) -> ClientUpdate:
        """One client's local training in a round, from the state the round starts with; its update."""
        data, seed = self.clients[client_id], derive_seed(self.args.seed, "client", number, client_id)
        start = self._install_start(client_id)
        return self.trained(client_id, data, start, self._stage(number), self.num_steps(client_id), seed)

    def _train_server(self, number: int) -> None:
        """A round of the global stage on the server's own data: its result is the new global adapter."""
        assert self.server is not None
        began, run, stage = time.perf_counter(), self.run, self._stage(number)
        seed = derive_seed(self.args.seed, SERVER, number)
        adapters.set_carry(self.model, None)
        self.slot.write(run.state)
        steps = num_local_steps(self.args, len(self.server.train))
        update = self.trained(SERVER, self.server, run.state, stage, steps, seed)
        seconds = {"train": time.perf_counter() - began}
        combined = Aggregate(update.state, modules=run.record.modules, diagnosis=run.record.diagnosis)
        bookkeeping.add_round(run.record, number, [], [update], combined, {}, run.state, seconds, stage=stage.name)
        self.store.begin(number)
        self.store.commit(number, update.state, run.record)

    def _install_start(self, client_id: str) -> AdapterState:
        """Put the state a client starts a round from into the model, and leave trainable what the method trains."""
        start = self.run.state
        if self.method.restarts:
            adapters.set_carry(self.model, start if self.run.round else None)
            start = AdapterState(self.initial, start.extras)  # a head has no sum to stand on: it goes on from the mean
        elif self.method.keeps and (own := self.last_update(client_id)) is not None:
            start = personalise.with_kept(start, own.state, self.method.keeps)
        self.slot.write(start)
        return start

    def last_update(self, client_id: str) -> ClientUpdate | None:
        """The client's update of the last round it took part in, read from disk; None if there is none."""
        number = bookkeeping.last_rounds(self.run.record).get(client_id)
        return None if number is None else self.store.kept(number, client_id)

    # ---- the server --------------------------------------------------------------------------------------------------

    def _combined(self, number: int) -> Aggregate:
        """The aggregate of a round's updates: a pure function of what the store holds, open round or committed."""
        cohort = self.cohort(number)
        updates = [self.store.update(number, client) for client in cohort if not self.store.failure(number, client)]
        if not updates:
            reason = self.store.failure(number, cohort[0])
            raise RoundError(f"round {number}: all {len(cohort)} clients failed; {cohort[0]!r} with: {reason}")
        start = self.store.state(number - 1) if number > 1 else None
        return aggregate(
            updates,
            self.args.aggregation,
            weight_by=self.args.weight_by,
            target_rank=None if self.method.restarts else self.rank,
            reference=None if self.method.restarts else start,
            past=bookkeeping.past_rounds(self.run.record, number, self.store.functional(number)),
            **cast(dict[str, Any], self.args.aggregation_options),
        )

    def _judge_by_others(self, number: int, cohort: list[str]) -> None:
        """Take functional evidence on the open round's updates, where it is asked for, and leave it beside them."""
        if not self.args.functional_judges or self.store.functional(number):
            return
        updates = [self.store.update(number, client) for client in cohort if not self.store.failure(number, client)]
        validation = {client: self.clients[client].validation for client in cohort}
        seed = derive_seed(self.args.seed, "functional", number)
        found = functional_evidence(
            self.scorer,
            self.run.state,
            updates,
            {client: split for client, split in validation.items() if split is not None},
            judges=self.args.functional_judges,
            seed=seed,
        )
        self.store.note_functional(number, found.evidence)

    def _close(self, number: int, cohort: list[str], trained: float) -> None:
        """Aggregate the open round and commit it; nothing is changed when too few updates can be used."""
        began, run, stage = time.perf_counter(), self.run, self._stage(number)
        combined = self._combined(number)
        failures = {client: reason for client in cohort if (reason := self.store.failure(number, client))}
        quarantined = dict(sorted({**failures, **combined.quarantined}.items()))
        usable = [self.store.update(number, client) for client in cohort if client not in quarantined]
        if len(usable) < self.args.server_min_clients:
            raise RoundError(
                f"round {number}: {len(usable)} usable updates, server_min_clients={self.args.server_min_clients}; "
                "nothing was changed; lower server_min_clients, or mend the clients and pass --resume_from last"
            )
        state, start = combined.state, run.state
        if stage.name == "global" and self.method.weighted:
            means = mean_of_trained(usable, combined.weights, start, stage.parts)
            state = AdapterState(means, combined.state.extras)
            combined = replace(combined, state=state)
        if self.method.restarts:
            start = self.initial
            if run.round:
                state = compressed(state_sum(run.state, combined.state))
        seconds = {"train": trained, "aggregate": time.perf_counter() - began}
        size = self.slot.message_bytes([part for part in stage.parts if part not in self.method.keeps])
        bookkeeping.add_round(
            run.record,
            number,
            cohort,
            usable,
            combined,
            quarantined,
            start,
            seconds,
            stage=stage.name,
            message_bytes=size,
            functional=self.store.functional(number),
        )
        self.store.commit(number, state, run.record)
        needed = bookkeeping.needed_updates(run.record, self.args.keep_rounds)
        # What a client learned stands on the global adapter of the round before, where rounds restart.
        bases = {n - 1 for n, _ in needed} if self.method.restarts else set()
        self.store.prune(self.args.keep_rounds, needed, bases)

    # ---- personal adapters -------------------------------------------------------------------------------------------

    def _personalise(self) -> None:
        """Give every collaborative client its personal adapter, as a folder of its own."""
        run = self.run
        folders = output.ClientFolders(self.args.output_dir, self.store.config)
        if self.is_world_process_zero():
            folders.begin()
        self.accelerator.wait_for_everyone()
        refined = self._combined(run.round).personalised if self._has_updates(run.round) else {}
        chosen = {}
        members = bookkeeping.collaborative(run.record)
        for client_id in self.steps.over(self.mine(members), "personal adapter"):
            name, state, losses = self._personal(client_id, refined.get(client_id))
            folders.write(client_id, state)
            chosen[client_id] = {"choice": name, "validation_loss": losses}
        for client_id, facts in self.gathered(chosen).items():
            run.record.clients[client_id]["personal"] = facts
        if self.is_world_process_zero():
            folders.publish()
        self.accelerator.wait_for_everyone()
        run.personalised = folders.read(members)

    def _has_updates(self, number: int) -> bool:
        """Whether a round left clients' updates here: not before the first, on the server, or on the Hub."""
        cohort = self.cohort(number) if number else ()
        return any(self.store.kept(number, client) is not None for client in cohort)

    def _personal(self, client_id: str, refined: AdapterState | None) -> tuple[str, AdapterState, dict[str, float]]:
        """(what was chosen, the adapter, {candidate: validation loss}) of one client."""
        data, own = self.clients[client_id], self._own(client_id)
        if self.args.personalise == "method" or data.validation is None:
            # In the pipeline a client's personal steps start from what is broadcast, not from its own last update.
            name, state = personalise.given(self.run.state, None if self.args.pipeline != "none" else own, refined)
            losses: dict[str, float] = {}
        else:
            offered = personalise.candidates(self.run.state, own, refined, self.rank)
            name, state, losses = personalise.best(offered, lambda s: self.scorer.metrics(s, data.validation)["loss"])
        if self.args.personal_steps:
            state_before, name_before = state, name
            name, state = f"{name}, tuned", self._tuned(client_id, state)
            if losses:
                losses[name] = self.scorer.metrics(state, data.validation)["loss"]
                if not losses[name] < losses[name_before]:
                    name, state = name_before, state_before
        return name, state, losses

    def _own(self, client_id: str) -> AdapterState | None:
        """A client's own whole adapter, as it left its last round; with what it stood on, where rounds restart."""
        last = self.last_update(client_id)
        if last is None:
            return None
        number = bookkeeping.last_rounds(self.run.record)[client_id]
        if not self.method.restarts or number == 1:
            return last.state
        return state_sum(self.store.state(number - 1), last.state)

    def _tuned(self, client_id: str, state: AdapterState) -> AdapterState:
        """`state` after `personal_steps` further local steps of the client."""
        seed, start = derive_seed(self.args.seed, "personal", client_id), fitted(state, self.rank)
        adapters.set_carry(self.model, None)
        self.slot.write(start)
        steps = int(self.args.personal_steps or 0)
        return self.trained(client_id, self.clients[client_id], start, personal_stage(self.args), steps, seed).state

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the global adapter on every client's test split, and each personal adapter on its own client's.

        Means over the collaborative clients, as `eval_global_loss`, `eval_personalised_loss` ... With an
        `eval_dataset`, what Trainer does: the loss of the global adapter on it.
        """
        if eval_dataset is not None:
            self.scorer.install(self.run.state)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._score("global", dict.fromkeys(self.clients, self.run.state))
        self._score("personalised", self.run.personalised)
        means = {
            f"{metric_key_prefix}_{kind}_{name}": value
            for kind, values in self.run.record.metrics["after"].items()
            for name, value in values.items()
        }
        self.log(dict(means))
        return means

    def _score(self, kind: str, states: Mapping[str, AdapterState], when: str = "after") -> None:
        """Evaluate adapters on their clients' test splits and put the metrics into the record."""
        record = self.run.record
        per_client = self.test_metrics(states)
        for client_id, metrics in per_client.items():
            record.clients[client_id]["metrics"]["before" if when == "before" else kind] = metrics
        record.metrics.setdefault(when, {})[kind] = bookkeeping.mean_over_collaborative(record, per_client)
        if when == "after" and "before" in record.metrics:
            # Of the same clients as the means after: who collaborates was not known before the rounds.
            first = {client: facts["metrics"].get("before", {}) for client, facts in record.clients.items()}
            record.metrics["before"]["global"] = bookkeeping.mean_over_collaborative(record, first)

    # ---- what is left behind -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the global adapter, run.json, the card and the report (and, in train(), the personal adapters)."""
        folder = output_dir or self.args.output_dir
        if not self.is_world_process_zero():
            return
        output.write_run(folder, self.run.state, self.store.config, self.run.record)
        if folder != self.args.output_dir:
            folders = output.ClientFolders(folder, self.store.config)
            folders.begin()
            for client_id, state in self.run.personalised.items():
                folders.write(client_id, state)
            folders.publish()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md from the run record (Trainer's arguments are not needed: the record knows)."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first push makes the repository, private unless hub_private_repo is False."""

    def push_to_hub(  # type: ignore[override]  # the address of the commit, and clients only when asked
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *,
        with_clients: bool = False,
        **kwargs: Any,
    ) -> str | None:
        """Push `output_dir` as one commit: the global adapter, run.json, card and report; the personal adapters only
        when asked (`with_clients`), because they derive from private data. Private unless hub_private_repo=False.
        Returns the address of the commit."""
        if not self.is_world_process_zero():
            return None
        self.save_model()
        return self.publisher.push(commit_message, token=token, revision=revision, with_clients=with_clients)


def _check_cohort(args: FederatedConfig, method: Method, clients: int) -> None:
    size = min(clients, args.clients_per_round or clients)
    if size < method.least_clients:
        raise ConfigError(
            f"{size} clients a round: {method.name} needs at least {method.least_clients}; add clients or choose "
            "--aggregation product_mean"
        )
