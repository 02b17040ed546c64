"""One model, many clients' data, no federation yet: trains any client from any adapter, and scores any adapter."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from fedlora_hf.adapter import slot as adapters
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.data.prepare import ClientData, prepare_client
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.launch.processes import Processes
from fedlora_hf.launch.quantisation import keep_trainable
from fedlora_hf.launch.schedule import shares
from fedlora_hf.launch.zero import plain_launch
from fedlora_hf.privacy import Privacy
from fedlora_hf.training import personal as personalise
from fedlora_hf.training.local import local_batches, num_local_steps, train_locally
from fedlora_hf.training.scorer import Scorer
from fedlora_hf.training.sharding import is_sharded, prepared
from fedlora_hf.training.stages import Stage, personal_stage
from fedlora_hf.update import AdapterState, ClientUpdate, fitted
from fedlora_hf.util.names import unfit_reason
from fedlora_hf.util.progress import Steps
from fedlora_hf.util.seeding import derive_seed

Metrics = dict[str, float]


class ClientTrainer(Trainer):
    """A `transformers.Trainer` whose training data are many clients'; the floor under `FederatedTrainer`."""

    args: FederatedConfig
    model: Any
    processing_class: Any
    _decay_names: list[str] | None = None

    def __init__(
        self,
        model: nn.Module,
        args: FederatedConfig,
        client_datasets: Mapping[str, Any],
        *,
        peft_config: PeftConfig | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_arguments(args, client_datasets)
        self.clients: dict[str, ClientData] = {
            client_id: prepare_client(client_id, client_datasets[client_id], processing_class, args)
            for client_id in sorted(client_datasets)
        }
        model = _with_adapter(model, peft_config, args)
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = Collator(pad if pad is not None else 0, 8 if torch.cuda.is_available() else 1)
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        if self.optimizer is not None:
            raise ConfigError("optimizers=(...): every client needs a fresh one; pass optimizer_cls_and_kwargs instead")
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.steps = Steps(enabled=not args.disable_tqdm and self.is_world_process_zero())
        together, sharded = args.client_parallel == "data", is_sharded(self.accelerator, args.zero)
        self.processes = Processes(self.accelerator, together=together, lockstep=sharded)
        self.slot = adapters.AdapterSlot(self.model, adapters.own_adapter(self.model))
        self.slot.check_owns_all()
        # Never wrapped: `processes` adds up what a wrapper would, so any part of the adapter can be trained next.
        self.model_wrapped = prepared(self.accelerator, self.slot, together, args.zero)
        if sharded and (self.compute_loss_func or not self.model_accepts_loss_kwargs):
            raise ConfigError("a sharded base, and a loss not divided by num_items_in_batch: use the model's own loss")
        if args.gradient_checkpointing:
            self._checkpoint_activations()
        if args.initial_adapter is not None:
            adapters.write_initial(self.slot, read_adapter(args.initial_adapter)[0], args.initial_adapter)
        keep_trainable(self.model)
        if self.processes.count > 1 and (odd := self.processes.differing(self.slot.checksum())) is not None:
            raise ConfigError(
                f"model: process {odd} was given another adapter than process 0; pass peft_config and let the trainer "
                "make it, or seed all processes alike"
            )
        self.initial = self.slot.read()
        self.privacy = Privacy.of(args)
        self.scorer = Scorer(
            self.model_wrapped, self.slot, self.data_collator, self.processing_class, args, self.processes
        )

    def create_accelerator_and_postprocess(self) -> None:
        with plain_launch(self.args):
            super().create_accelerator_and_postprocess()

    def _checkpoint_activations(self) -> None:
        """Switch checkpointing on, as Trainer.train() would: a client's steps do not pass through it."""
        base: Any = self.model.get_base_model()
        if hasattr(base, "activation_checkpointing_enable"):  # transformers < 5.23 knows the older name alone
            base.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        else:
            base.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)

    def mine(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that this process evaluates; all, where processes work together."""
        costs = {client: len(self.clients[client].test or ()) for client in clients}
        number, count = (0, 1) if self.processes.together else (self.processes.number, self.processes.count)
        return shares(costs, count)[number]

    def taken(self, clients: Iterable[str]) -> Iterator[str]:
        """Those of the clients that this process trains: the longest first, each by whichever process is free next."""
        costs = {client: self.num_steps(client) * self.clients[client].train.mean_length for client in clients}
        return self.processes.taken(shares(costs, 1)[0])

    def num_steps(self, client_id: str) -> int:
        return self.steps_for(self.clients[client_id])

    def steps_for(self, data: ClientData) -> int:
        """Local steps of a round on somebody's data."""
        return num_local_steps(self.args, len(data.train), self.processes.share[1])

    @property
    def rank(self) -> int:
        """The rank of the adapter in the model."""
        return adapters.slot_rank(self.slot)

    def trained(
        self,
        name: str,
        data: ClientData,
        start: AdapterState,
        stage: Stage,
        steps: int,
        seed: int,
        timeout: float | None = None,
    ) -> ClientUpdate:
        """The update after `steps` of a stage on the training split, from `start`, which is in the model already.

        timeout: seconds they may take, see `train_locally`.
        """
        self.slot.train_only(stage.parts)
        share, even = self.processes.share, self.processes.lockstep
        batches = local_batches(data.train, self.data_collator, self.args, seed, share=share, even=even)
        mu = self.args.fedprox_mu if stage.name == "federated" else 0.0
        with _learning_rate(self.args, stage.learning_rate):
            result = train_locally(
                self, batches, steps, seed=seed, processes=self.processes, proximal_mu=mu, timeout=timeout
            )
        if self.processes.together:
            self.processes.check_same(self.slot.checksum(), f"the adapter of {name!r} after its local steps")
        facts = {"train_loss": result.train_loss, "steps": result.steps}
        # A factor that was not trained is the start's to the bit, which an adapter kept in other parts (dirmag) is not.
        return ClientUpdate(
            name, personalise.with_kept(self.slot.read(), start, stage.untrained), len(data.train), facts
        )

    def personal(
        self, client_id: str, global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None
    ) -> tuple[str, AdapterState, dict[str, float]]:
        """(what was chosen, the adapter, {candidate: validation loss}): a client's personal adapter.

        own: its last update; refined: what the method made for it. See `personalise`.
        """
        data = self.clients[client_id]
        if self.args.personalise == "method" or data.validation is None:
            # In the pipeline a client's personal steps start from what is broadcast, not from its own last update.
            name, state = personalise.given(global_state, None if self.args.pipeline != "none" else own, refined)
            losses: dict[str, float] = {}
        else:
            offered = personalise.candidates(global_state, own, refined, self.rank)
            name, state, losses = personalise.best(offered, lambda s: self.scorer.metrics(s, data.validation)["loss"])
        if self.args.personal_steps:
            state_before, name_before = state, name
            name, state = f"{name}, tuned", self._tuned(client_id, state)
            if losses:
                losses[name] = self.scorer.metrics(state, data.validation)["loss"]
                if not losses[name] < losses[name_before]:
                    name, state = name_before, state_before
        return name, state, losses

    def _tuned(self, client_id: str, state: AdapterState) -> AdapterState:
        """`state` after `personal_steps` further local steps of the client."""
        seed, start = derive_seed(self.args.seed, "personal", client_id), fitted(state, adapters.slot_ranks(self.slot))
        adapters.set_carry(self.model, None)
        self.slot.write(start)
        steps = int(self.args.personal_steps or 0)
        return self.trained(client_id, self.clients[client_id], start, personal_stage(self.args), steps, seed).state

    def outgoing(self, update: ClientUpdate, start: AdapterState, stage: Stage, seed: int) -> ClientUpdate:
        """What of an update leaves the client: all of it or, where the run asks for privacy, clipped and with noise."""
        return update if self.privacy is None else self.privacy.applied(update, start, stage.untrained, seed)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, but found once: a client's optimizer does not wait for a walk over all modules."""
        if self._decay_names is None:
            self._decay_names = super().get_decay_parameter_names(model)
        return self._decay_names

    def test_metrics(self, states: Mapping[str, AdapterState]) -> dict[str, Metrics]:
        """{client: metrics of its adapter on its test split}, each client evaluated by one process, or by all."""
        found: dict[str, Metrics] = {}
        with self.processes.all_or_none():
            for client_id in self.steps.over(self.mine(states), "evaluating"):
                data, state = self.clients[client_id], states[client_id]
                if data.test is not None:
                    with self.processes.each_or_none():
                        found[client_id] = self.scorer.metrics(state, data.test)
                        found[client_id] |= self.scorer.answers(state, data.questions)
        return self.processes.gathered(found)


def _with_adapter(model: nn.Module, config: PeftConfig | None, args: FederatedConfig) -> PeftModel:
    """The model with the adapter to train: a new one, or the one it has."""
    if not isinstance(model, PeftModel):
        return adapters.with_adapter(model, config or adapters.peft_config(args), args.seed)
    if config is not None:
        raise ConfigError("peft_config: the model has an adapter already; pass one of the two")
    adapters.check_config(model.peft_config[adapters.own_adapter(model)], initialised=True)
    return model


def _check_arguments(args: Any, client_datasets: Mapping[str, Any]) -> None:
    if not isinstance(args, FederatedConfig):
        raise ConfigError(f"args is a {type(args).__name__}: must be a FederatedConfig; import it from fedlora_hf")
    if not client_datasets:
        raise DataError("0 clients: a federation needs at least one; pass client_datasets={id: Dataset}")
    for client_id in client_datasets:
        if reason := unfit_reason(client_id):
            raise ConfigError(reason)


@contextmanager
def _learning_rate(args: FederatedConfig, rate: float) -> Iterator[None]:
    """The optimizers made meanwhile have this learning rate."""
    usual, args.learning_rate = args.learning_rate, rate
    try:
        yield
    finally:
        args.learning_rate = usual
