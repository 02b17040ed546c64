"""FederatedTrainer: rounds of local training and aggregation around one model, as a `transformers.Trainer`."""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.trainer_utils import TrainOutput

from fedlora_hf.adapter import slot as adapters
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.prepare import prepare_client
from fedlora_hf.errors import ConfigError, RecordError, RoundError
from fedlora_hf.hub import fetch_run, parse_source, write_card
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.methods import method_named
from fedlora_hf.record import write as bookkeeping
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds import output
from fedlora_hf.rounds.federation import SERVER, Federation, Run, check_cohort
from fedlora_hf.rounds.judges import functional_evidence
from fedlora_hf.rounds.store import RoundStore, unlike
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.local import failure_reason, free_memory
from fedlora_hf.training.stages import personal_stage, total_rounds
from fedlora_hf.update import AdapterState, ClientUpdate
from fedlora_hf.util.disk import sweep
from fedlora_hf.util.seeding import derive_seed

Metrics = dict[str, float]


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
        check_cohort(args, self.method, len(self.clients))
        self.publisher = Publisher(args, self.steps)
        self.store = RoundStore(f"{args.output_dir}/rounds", self.slot.config())
        self.federation = Federation(args, self.method, self.store, self.initial, self.rank)
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
        with self.processes.all_or_none():
            self.save_model()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        entries = self.run.record.rounds
        losses = [loss for entry in entries for loss in entry["train_loss"].values() if loss is not None]
        metrics = {"train_runtime": time.perf_counter() - began, "train_rounds": self.run.round}
        return TrainOutput(self.state.global_step, float(np.mean(losses)) if losses else 0.0, metrics)

    def _begin(self, resume: str | None) -> None:
        """Stand at the start of a new run, or after the committed round that `resume` names."""
        if resume is not None and resume.startswith("hub:"):
            resume = self._fetch(resume)
        self.run = Run(0, self.initial, self._opening())
        with self.processes.all_or_none():
            number, damage = (None, None) if resume is None else self.store.resumed(resume)
            # Before the first round is committed, its open folder tells which run it is of.
            earlier = self.store.record(number) if number else self.store.begun(1) if number == 0 else None
            if earlier is not None:
                bookkeeping.check_same_run(earlier, self.run.record)
        if damage is not None:
            self.steps.say(f"going on from round {number}, the last that is whole: {damage}")
        with self.processes.all_or_none():
            if self.processes.first:
                self._clear(number, new=earlier is None)
        if number and earlier is not None:
            state = self.store.state(number)
            if reason := unlike(state, self.initial):
                raise RecordError(f"{self.store.folder / str(number)}: {reason}; its adapter is not of this model")
            self.run = Run(number, state, earlier)

    def _clear(self, number: int | None, *, new: bool) -> None:
        """Remove from the output folder what the run that starts, or goes on after round `number`, has no use for."""
        if number is None:
            output.check_overwrite(self.args.output_dir, self.store)
        if new:
            self.store.clear()
            self.store.begin(1, self.run.record)
        self.store.forget_after(number or 0)
        sweep(Path(str(self.args.output_dir)))

    def _fetch(self, source: str) -> str:
        """Take a run from the Hub as the last committed round of this output folder; the round's number."""
        with self.processes.all_or_none():
            place = parse_source(source)
            folder = fetch_run(str(place.repo_id), place.revision, token=self.args.hub_token)
            record = RunRecord.load(folder)
        if self.method.keeps or self.method.restarts:
            raise ConfigError(
                f"resume_from={source!r}: {self.method.name} goes on from what clients keep for themselves, which is "
                "not on the Hub; resume from the output folder"
            )
        with self.processes.all_or_none():
            if self.processes.first:
                output.check_overwrite(self.args.output_dir, self.store)
                self.store.clear()
                self.store.adopt(len(record.rounds), read_adapter(folder)[0], record)
        return str(len(record.rounds))

    def _opening(self) -> RunRecord:
        examples = {client: data.train.num_examples for client, data in self.clients.items()}
        adapter = adapters.slot_facts(self.slot, self.args.adapter)
        return bookkeeping.opening(self.args, self.method, self._facts, examples, adapter)

    def _round(self, number: int) -> None:
        """One round: train the cohort, look at the updates, aggregate, commit."""
        args, began = self.args, time.perf_counter()
        stage, cohort = self.federation.stage(number), self.cohort(number)
        self.state.epoch = number - 1
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        with self.processes.all_or_none():
            for client_id in self.steps.over(self.taken(cohort), f"round {number}/{self.num_rounds}"):
                with self.processes.each_or_none():
                    self._train_into_store(client_id, number)
        with self.processes.all_or_none():
            if stage.on_server and (self.processes.first or self.processes.together):
                self._train_server(number)
            elif self.processes.first or self.processes.together:
                self._judge_by_others(number, cohort)
            if self.processes.first and not stage.on_server:
                self.federation.close(
                    self.run,
                    number,
                    cohort,
                    seconds=time.perf_counter() - began,
                    message_bytes=self.slot.message_bytes([p for p in stage.parts if p not in self.method.keeps]),
                    facts=self.federation.stage_facts(number, cohort, self.slot.message_bytes),
                )
        self.run = Run(number, self.store.state(number), self.store.record(number))
        entry = self.run.record.rounds[-1]
        if args.evaluate_rounds:
            per_client = self.test_metrics(dict.fromkeys(self.clients, self.run.state))
            entry["metrics"] = {"global": bookkeeping.mean_over_collaborative(self.run.record, per_client)}
        self.state.epoch = number
        self.log(bookkeeping.round_log(entry))
        self.steps.say(bookkeeping.round_line(entry, self.num_rounds))
        with self.processes.all_or_none():
            if self.processes.first and args.evaluate_rounds:
                self.store.amend(number, self.run.record)
            if self.processes.first and self.publisher.pushes_rounds:
                output.write_run(args.output_dir, self.run.state, self.store.config, self.run.record, report=False)
                self.publisher.round(number)
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)

    def cohort(self, number: int) -> list[str]:
        """The clients of a round, sorted: all, or `clients_per_round` drawn from (seed, round); none on the server."""
        return self.federation.cohort(number, self.clients)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, those of the global stage included."""
        return total_rounds(self.args)

    # ---- one client --------------------------------------------------------------------------------------------------

    def _train_into_store(self, client_id: str, number: int) -> None:
        """Train a client unless an earlier, interrupted run already did; a client that fails is noted, not fatal."""
        if self.processes.agreed(self.store.finished(number, client_id) is not None):
            return
        try:
            update = self.train_client(client_id, number)
            if self.processes.writes:
                self.store.save(number, update)
        except RoundError:  # the processes differ: not this client's failure
            raise
        except Exception as error:  # whatever a client raises is its own failure; the round goes on without it
            reason = failure_reason("training", error)
        else:
            return
        # Out of the handler, so that the error no longer holds the client's tensors.
        free_memory()
        if self.processes.writes:
            self.store.fail(number, client_id, reason)

    def train_client(self, client_id: str, number: int) -> ClientUpdate:
        """One client's local training in a round, from the state the round starts with; its update."""
        data, seed = self.clients[client_id], derive_seed(self.args.seed, "client", number, client_id)
        start = self._install_start(client_id)
        stage, limit = self.federation.stage(number), self.args.client_timeout
        update = self.trained(client_id, data, start, stage, self.num_steps(client_id), seed, timeout=limit)
        return self.outgoing(update, start, stage, seed)

    def _train_server(self, number: int) -> None:
        """A round of the global stage on the server's own data: its result is the new global adapter."""
        assert self.server is not None
        began, run, stage = time.perf_counter(), self.run, self.federation.stage(number)
        seed = derive_seed(self.args.seed, SERVER, number)
        adapters.set_carry(self.model, None)
        self.slot.write(run.state)
        update = self.trained(SERVER, self.server, run.state, stage, self.steps_for(self.server), seed)
        if not self.processes.first:
            return
        # The server sends what it trained to all, and gets nothing from anybody.
        sent = dict.fromkeys(self.clients, self.slot.message_bytes(stage.parts))
        facts = {"bytes_down": sent, **self.federation.stage_facts(number, [], self.slot.message_bytes)}
        self.federation.close_on_server(run, number, update, seconds=time.perf_counter() - began, facts=facts)

    def _install_start(self, client_id: str) -> AdapterState:
        """Put the state a client starts a round from into the model."""
        start = self.federation.start(self.run, client_id)
        if self.method.restarts:
            adapters.set_carry(self.model, start.carry)
        self.slot.write(start.state)
        return start.state

    def last_update(self, client_id: str) -> ClientUpdate | None:
        """The client's update of the last round it took part in, read from disk; None if there is none."""
        return self.federation.last_update(self.run.record, client_id)

    # ---- the server --------------------------------------------------------------------------------------------------

    def _judge_by_others(self, number: int, cohort: list[str]) -> None:
        """Take functional evidence on the open round's updates, where it is asked for, and leave it beside them."""
        if not self.args.functional_judges or self.store.functional(number):
            return
        updates = [self.store.update(number, client) for client in cohort if not self.store.failure(number, client)]
        # Whoever is flagged already is no judge of others.
        trusted = [client for client in cohort if client not in self.run.record.flagged]
        validation = {client: self.clients[client].validation for client in trusted}
        seed = derive_seed(self.args.seed, "functional", number)
        found = functional_evidence(
            self.scorer,
            self.run.state,
            updates,
            {client: split for client, split in validation.items() if split is not None},
            judges=self.args.functional_judges,
            seed=seed,
        )
        if self.processes.first:
            self.store.note_functional(number, found.evidence)

    # ---- personal adapters -------------------------------------------------------------------------------------------

    def _personalise(self) -> None:
        """Give every collaborative client its personal adapter, as a folder of its own."""
        run = self.run
        folders = output.ClientFolders(self.args.output_dir, self.store.config)
        with self.processes.all_or_none():
            if self.processes.first:
                folders.begin()
        cohort = self.cohort(run.round) if run.round else []
        trained = self.federation.has_updates(run.round, cohort)
        refined = self.federation.combined(run.record, run.round, cohort).personalised if trained else {}
        chosen: dict[str, dict[str, Any]] = {}
        members = bookkeeping.collaborative(run.record)
        with self.processes.all_or_none():
            for client_id in self.steps.over(self.taken(members), "personal adapter"):
                with self.processes.each_or_none():
                    chosen[client_id] = self._personal_into(folders, client_id, refined.get(client_id))
        for client_id, facts in self.processes.gathered(chosen).items():
            run.record.clients[client_id]["personal"] = facts
        with self.processes.all_or_none():
            if self.processes.first:
                folders.publish()
        run.personalised = folders.read(members)

    def _personal_into(
        self, folders: output.ClientFolders, client_id: str, refined: AdapterState | None
    ) -> dict[str, Any]:
        """Write a client's personal adapter; what was chosen and why, or why there is none."""
        own = self.federation.own(self.run.record, client_id)
        try:
            name, state, losses = self.personal(client_id, self.run.state, own, refined)
        except RoundError:  # the processes differ: not this client's failure
            raise
        except Exception as error:  # its own failure: it has no personal adapter, the others do
            return {"failed": failure_reason("personal adapter", error)}
        if self.processes.writes:
            folders.write(client_id, state)
        return {"choice": name, "validation_loss": losses, **self._personal_facts(name, state)}

    def _personal_facts(self, choice: str, state: AdapterState) -> dict[str, Any]:
        """For a client's entry in the record: what it trained for itself, what that moved, and the bytes to keep."""
        part_bytes = self.slot.message_bytes(personal_stage(self.args).parts)
        return self.federation.personal_facts(self.run, choice, state, part_bytes)

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
        bookkeeping.add_metrics(self.run.record, kind, self.test_metrics(states), when)

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
