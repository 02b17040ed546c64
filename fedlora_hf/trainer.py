"""FederatedTrainer: rounds of local training and aggregation around one model, as a `transformers.Trainer`."""
# SPDX-License-Identifier: Apache-2.0

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from torch import nn
from transformers.trainer_utils import TrainOutput

from fedlora_hf.adapter.base import base_by_name, base_facts
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import named_clients, with_data_facts
from fedlora_hf.data.labels import with_labels
from fedlora_hf.data.prepare import prepare_client, wording_facts, wording_of
from fedlora_hf.data.wording import save_tokenizer
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.hub import write_card
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.loading import Job, args_of_run, facts_of_run, prepare_again
from fedlora_hf.record.answers import save_answers
from fedlora_hf.record.record import RunRecord
from fedlora_hf.rounds.answers import sample_answers
from fedlora_hf.rounds.federation import SERVER, Federation, Run
from fedlora_hf.rounds.groups import read_groups
from fedlora_hf.rounds.limits import check_cohort
from fedlora_hf.rounds.local_transport import LocalTransport
from fedlora_hf.rounds.loop import RoundLoop
from fedlora_hf.rounds.output import ClientFolders, check_untrained, has_finished_run
from fedlora_hf.rounds.store import RoundStore, unlike
from fedlora_hf.rounds.watching import TrainerWatcher
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.training.together import Entry, Told, train_round_together
from fedlora_hf.update import ClientUpdate
from fedlora_hf.util.rehearsal import check_clients
from fedlora_hf.util.say import say


class FederatedTrainer(ClientTrainer):
    """Fine-tune one model together with many clients, none of which shows its data to another.

    model: a causal LM or a sequence classifier, a PeftModel that has its adapter already, or a folder or Hub id of a
        base, which is loaded as the options say, with its tokenizer unless processing_class is given.
    args: every option of the run.
    client_datasets: {client: Dataset, or {"train", "validation", "test"} of Datasets}, as `data.clients.make_clients`
        gives them, already tokenised (input_ids, labels), or in any schema that `fedlora train` reads; a path, a Hub id
        or a stream too (see `prepare_client`). A name that cannot be a folder's stays the client's name; its id is
        derived, and said.
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
        model: nn.Module | str,
        args: FederatedConfig,
        client_datasets: Mapping[str, Any],
        *,
        server_dataset: Any = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(client_datasets, Mapping):
            client_datasets, names = named_clients(client_datasets)
        if isinstance(model, str):
            args, base = base_by_name(model, args, client_datasets)
            model = base.model
            if kwargs.get("processing_class") is None:
                kwargs["processing_class"] = base.tokenizer
        super().__init__(model, args, client_datasets, **kwargs)
        self._check_own_training()
        if (server_dataset is None) != (args.server_dataset is None):
            raise ConfigError("server_dataset: the data and args.server_dataset go together; pass both or neither")
        tokenizer = self.processing_class
        server = None if server_dataset is None else prepare_client(SERVER, server_dataset, tokenizer, args)
        self._server = server
        check_cohort(args, self.method, len(self.clients))
        if (args.clients_per_round or 0) > len(self.clients):
            say(f"clients_per_round={args.clients_per_round}: there are {len(self.clients)}; all take part in each")
        check_clients(args.contaminated, self.clients)
        self.publisher = Publisher(args, self.progress)
        self.store = RoundStore(f"{args.output_dir}/rounds", self.slot.config())
        self.federation = Federation(args, self.method, self.store, self.initial, self.rank)
        known = {"model": base_facts(args, self.model.get_base_model()), "data": self._data_facts(), **(record or {})}
        known = with_labels(known, self.model, args.task)
        facts = with_data_facts(known, names, wording_facts(args, tokenizer, self.clients.values()))
        # Looked up when it is called, so that a subclass's `train_client` counts.
        transport = LocalTransport(
            self,
            self.federation,
            lambda client, number: self.train_client(client, number),
            lambda clients, number, told: self.train_clients(clients, number, told),
            server,
            facts,
        )
        self.watcher = TrainerWatcher(self, self._steps_of, self._score_dataset)
        self.loop = RoundLoop(self.federation, transport, self.watcher, self.publisher, self.progress)
        self.watcher.loop = self.loop

    def _data_facts(self) -> dict[str, Any]:
        """What the record says of data that came from Python."""
        examples = sum(data.train.num_examples for data in self.clients.values())
        return {"num_clients": len(self.clients), "num_examples": examples}

    @classmethod
    def of(cls, job: Job, **kwargs: Any) -> Self:
        """The trainer of what `loading.prepare` loaded; further arguments are the constructor's."""
        return cls(
            job.model,
            job.args,
            job.clients,
            processing_class=job.tokenizer,
            server_dataset=job.server,
            record=job.facts,
            **kwargs,
        )

    @classmethod
    def from_run(
        cls,
        folder: str | os.PathLike[str],
        client_datasets: Mapping[str, Any] | None = None,
        *,
        model: nn.Module | None = None,
        changes: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """The trainer of a finished run, standing where that ended: its adapters, its record, its options.

        `evaluate()` measures it again and `train()` goes on (with `changes={"num_rounds": ...}`, for more rounds); base
        model, tokenizer and data are loaded as the run's options name them.
        client_datasets, model: for a run from Python, whose record names no files; further arguments are the
        constructor's. changes: options over the recorded ones; what a resumed run may not change is refused by train().
        Raises RecordError for a folder without a run, ConfigError for what the record does not name.
        """
        record = RunRecord.load(folder)
        args = args_of_run(record, folder, changes or {})
        if model is None or client_datasets is None:
            job = prepare_again(args, record, client_datasets)
            args, model, client_datasets = job.args, model or job.model, job.clients
            kwargs = {"processing_class": job.tokenizer, "server_dataset": job.server, "record": job.facts, **kwargs}
        trainer = cls(model, args, client_datasets, **{"record": facts_of_run(record), **kwargs})
        trainer._stand_after(record)
        return trainer

    def _stand_after(self, record: RunRecord) -> None:
        """Take up the state in which a run has left its output folder."""
        state, _ = read_adapter(str(self.args.output_dir))
        if reason := unlike(state, self.federation.initial):
            raise RecordError(f"{self.args.output_dir}: {reason}; its adapter is not of this model")
        folders = ClientFolders(str(self.args.output_dir), self.store.config)
        personal, groups = folders.read(sorted(record.clients)), read_groups(str(self.args.output_dir))
        self.loop.run = Run(len(record.rounds), state, record, personal, groups)

    @property
    def run(self) -> Run:
        """Where the run stands: the last committed round, the global adapter, the record, the personal adapters."""
        return self.loop.run

    def train(  # type: ignore[override]  # no hyper-parameter trials, no ignored keys
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Run the rounds and write `output_dir`; go on from where `resume_from` (or `resume_from_checkpoint`) says."""
        if kwargs:
            raise ConfigError(f"train({sorted(kwargs)[0]}=...): has no meaning for a federation; leave it out")
        began = time.perf_counter()
        resume = "last" if resume_from_checkpoint is True else resume_from_checkpoint or self.args.resume_from
        with self.loop.writing():
            run = self.loop.train(resume)
            self.evaluate()
            most = self.args.report_answers
            answers = sample_answers(self, run, most) if most else []
            with self.processes.all_or_none():
                if self.is_world_process_zero():
                    save_answers(str(self.args.output_dir), answers)
                self.save_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [loss for entry in run.record.rounds for loss in entry["train_loss"].values() if loss is not None]
        metrics = {"train_runtime": time.perf_counter() - began, "train_rounds": run.round}
        return TrainOutput(self.state.global_step, float(np.mean(losses)) if losses else 0.0, metrics)

    def train_client(self, client_id: str, number: int) -> ClientUpdate:
        """One client's local training in round `number`, from the state it starts that round with; its update."""
        start = self.federation.start(self.run, client_id)
        moments = self.federation.moments(self.run.record, client_id) if self.args.keep_optimizer else b""
        controls = self.federation.controls(self.run, client_id)
        return self.train_round(client_id, start.state, start.frozen, number, controls, moments)

    def _check_own_training(self) -> None:
        own, count = type(self), self.args.clients_at_once
        mixed = own.train_client is not FederatedTrainer.train_client
        if count > 1 and mixed and own.train_clients is FederatedTrainer.train_clients:
            raise ConfigError(
                f"clients_at_once={count}: {own.__name__}.train_client is a subclass's own, for one client; give it a "
                "train_clients too, or leave clients_at_once out"
            )

    def train_clients(self, client_ids: Sequence[str], number: int, told: Told) -> None:
        """The same of several clients, in lockstep; see `train_round_together`."""
        entries = []
        for client_id in client_ids:
            try:
                start = self.federation.start(self.run, client_id)
                moments = self.federation.moments(self.run.record, client_id) if self.args.keep_optimizer else b""
                controls = self.federation.controls(self.run, client_id)
            except Exception as error:  # what is left of its last round cannot be read: its own failure
                told(client_id, error, b"")
            else:
                entries.append(Entry(client_id, start.state, start.frozen, controls, moments))
        if entries:
            train_round_together(self, entries, number, told)

    def _steps_of(self, number: int) -> int:
        """Optimizer steps of all who train in a round; too few of them, and Trainer would end the run early."""
        on_server = self.federation.stage(number).on_server
        server = self._server if on_server or self.federation.method.needs_server else None
        steps = 0 if server is None else self.num_local_steps(server)
        if on_server:
            return steps
        cohort = self.federation.cohort(number, self.clients)
        return steps + sum(self.num_local_steps(self.clients[client]) for client in cohort)

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
            return super().evaluate(self._tokenised(eval_dataset), ignore_keys, metric_key_prefix)
        self.loop.evaluate()
        means = {
            f"{metric_key_prefix}_{kind}_{name}": value
            for kind, values in self.run.record.metrics["after"].items()
            for name, value in values.items()
        }
        self.scorer.install(self.run.state)
        means |= self._score_dataset(metric_key_prefix)
        self.log(dict(means))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predictions of the global adapter; of a personal one inside `with trainer.personal(client_id)`."""
        return super().predict(self._tokenised(test_dataset), *args, **kwargs)

    @contextmanager
    def personal(self, client_id: str) -> Iterator[Any]:
        """Inside, the model (which is given) holds the client's personal adapter; afterwards the global one again."""
        if client_id not in self.run.personalised:
            known = ", ".join(sorted(self.run.personalised)) or "nobody yet: train first"
            raise ConfigError(f"client {client_id!r}: has no personal adapter; those who have one: {known}")
        self.scorer.install(self.run.personalised[client_id])
        try:
            yield self.model
        finally:
            self.scorer.install(self.run.state)

    def _score_dataset(self, prefix: str = "eval") -> dict[str, float]:
        """Metrics of the global adapter on `eval_dataset`, where the trainer was given one, without telling anybody."""
        if self.eval_dataset is None:
            return {}
        self.scorer.install(self.run.state)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        found: dict[str, float] = {}
        for name, dataset in several.items():
            loader = self.get_eval_dataloader(self._tokenised(dataset))
            only_loss = None if self.compute_metrics is not None else True
            title = f"{prefix}_{name}" if name else prefix
            found |= self.evaluation_loop(loader, "Evaluation", only_loss, metric_key_prefix=title).metrics or {}
        return found

    def _tokenised(self, dataset: Any) -> Any:
        """Text made ready for the model as clients' data are; token ids, and names of datasets, as they are."""
        if isinstance(dataset, dict):
            return {name: self._tokenised(part) for name, part in dataset.items()}
        if isinstance(dataset, str) or "input_ids" in getattr(dataset, "column_names", ["input_ids"]):
            return dataset
        splits = {"train": dataset.select([0]), "validation": dataset}
        return prepare_client("eval_dataset", splits, self.processing_class, self.args).validation

    # ---- what is left behind -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the global adapter, run.json, the card and the report (and, in train(), the personal adapters)."""
        folder = output_dir or str(self.args.output_dir)
        if not self.is_world_process_zero():
            return
        if not self.watcher.began and not self.run.round:
            check_untrained(folder)
        self.loop.write(folder)
        save_tokenizer(self.processing_class, wording_of(self.args, self.processing_class), folder)
        if folder != self.args.output_dir:
            folders = ClientFolders(folder, self.store.config)
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
        with_client_facts: bool = False,
        **kwargs: Any,
    ) -> str | None:
        """Push `output_dir` as one commit: the global adapter, the public part of run.json, and the card. Only when
        asked, because they derive from private data: the personal adapters (`with_clients`), and what the record says
        of each client with the report that shows it (`with_client_facts`). Private unless hub_private_repo=False.
        Returns the address of the commit."""
        if not self.is_world_process_zero():
            return None
        if self.watcher.began or self.run.round or not has_finished_run(str(self.args.output_dir)):
            self.save_model()
        return self.publisher.push(
            commit_message,
            token=token,
            revision=revision,
            with_clients=with_clients,
            with_client_facts=with_client_facts,
        )
