"""FederatedTrainer: rounds of local training and aggregation around one model, as a `transformers.Trainer`."""
# SPDX-License-Identifier: Apache-2.0

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from transformers.trainer_utils import TrainOutput

from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.clients import named_clients, with_data_facts
from fedlora_hf.data.prepare import prepare_client, wording_facts, wording_of
from fedlora_hf.data.wording import save_tokenizer
from fedlora_hf.errors import ConfigError
from fedlora_hf.hub import write_card
from fedlora_hf.hub.publishing import Publisher
from fedlora_hf.record.lines import round_line, round_log
from fedlora_hf.rounds.federation import SERVER, Federation, Run, check_cohort
from fedlora_hf.rounds.local_transport import LocalTransport
from fedlora_hf.rounds.loop import RoundLoop
from fedlora_hf.rounds.output import ClientFolders
from fedlora_hf.rounds.store import RoundStore
from fedlora_hf.training.client_trainer import ClientTrainer
from fedlora_hf.update import ClientUpdate


class FederatedTrainer(ClientTrainer):
    """Fine-tune one model together with many clients, none of which shows its data to another.

    model: a causal LM or a sequence classifier, or a PeftModel that has its adapter already.
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
        model: nn.Module,
        args: FederatedConfig,
        client_datasets: Mapping[str, Any],
        *,
        server_dataset: Any = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        client_datasets, names = named_clients(client_datasets)
        super().__init__(model, args, client_datasets, **kwargs)
        if (server_dataset is None) != (args.server_dataset is None):
            raise ConfigError("server_dataset: the data and args.server_dataset go together; pass both or neither")
        tokenizer = self.processing_class
        server = None if server_dataset is None else prepare_client(SERVER, server_dataset, tokenizer, args)
        check_cohort(args, self.method, len(self.clients))
        self.publisher = Publisher(args, self.progress)
        self.store = RoundStore(f"{args.output_dir}/rounds", self.slot.config())
        self.federation = Federation(args, self.method, self.store, self.initial, self.rank)
        facts = with_data_facts(record or {}, names, wording_facts(args, tokenizer, self.clients.values()))
        # Looked up when it is called, so that a subclass's `train_client` counts.
        transport = LocalTransport(
            self, self.federation, lambda client, number: self.train_client(client, number), server, facts
        )
        self.loop = RoundLoop(self.federation, transport, self, self.publisher, self.progress)

    @property
    def run(self) -> Run:
        """Where the run stands: the last committed round, the global adapter, the record, the personal adapters."""
        return self.loop.run

    def train(  # type: ignore[override]  # no hyper-parameter trials, no ignored keys
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Run the rounds and write `output_dir`; go on from where `resume_from` (or `resume_from_checkpoint`) says."""
        began = time.perf_counter()
        resume = "last" if resume_from_checkpoint is True else resume_from_checkpoint or self.args.resume_from
        run = self.loop.train(resume)
        self.evaluate()
        with self.processes.all_or_none():
            self.save_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [loss for entry in run.record.rounds for loss in entry["train_loss"].values() if loss is not None]
        metrics = {"train_runtime": time.perf_counter() - began, "train_rounds": run.round}
        return TrainOutput(self.state.global_step, float(np.mean(losses)) if losses else 0.0, metrics)

    def train_client(self, client_id: str, number: int) -> ClientUpdate:
        """One client's local training in round `number`, from the state it starts that round with; its update."""
        start = self.federation.start(self.run, client_id)
        return self.train_round(client_id, start.state, start.frozen, number)

    # ---- what the loop tells, to Trainer's state and callbacks: a round is an epoch ----------------------------------

    @property
    def stopped(self) -> bool:
        """Whether a callback asked for the run to end."""
        return bool(self.control.should_training_stop)

    def ready(self, run: Run) -> None:
        """Trainer's state of a training that begins."""
        steps = sum(self.num_local_steps(data) for data in self.clients.values())
        self.state.global_step, self.state.log_history, self.control.should_training_stop = 0, [], False
        self.state.max_steps, self.state.num_train_epochs = self.loop.num_rounds * steps, self.loop.num_rounds
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def round_begins(self, number: int) -> None:
        self.state.epoch = number - 1
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)

    def round_ended(self, entry: Mapping[str, Any]) -> None:
        self.state.epoch = entry["round"]
        self.log(round_log(entry))
        self.progress.say(round_line(entry, self.loop.num_rounds))
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

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
        self.loop.evaluate()
        means = {
            f"{metric_key_prefix}_{kind}_{name}": value
            for kind, values in self.run.record.metrics["after"].items()
            for name, value in values.items()
        }
        self.log(dict(means))
        return means

    # ---- what is left behind -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the global adapter, run.json, the card and the report (and, in train(), the personal adapters)."""
        folder = output_dir or str(self.args.output_dir)
        if not self.is_world_process_zero():
            return
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
        **kwargs: Any,
    ) -> str | None:
        """Push `output_dir` as one commit: the global adapter, run.json, card and report; the personal adapters only
        when asked (`with_clients`), because they derive from private data. Private unless hub_private_repo=False.
        Returns the address of the commit."""
        if not self.is_world_process_zero():
            return None
        self.save_model()
        return self.publisher.push(commit_message, token=token, revision=revision, with_clients=with_clients)
