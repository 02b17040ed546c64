"""One model, many clients' data, no federation yet: trains any client from any adapter, and scores any adapter."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.adapter.slot import AdapterSlot, set_frozen, slot_rank, with_adapter
from fedlora_hf.adapter.slot import peft_config as described
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.data.labels import head_labels
from fedlora_hf.data.packing import check_packing
from fedlora_hf.data.prepare import ClientData, prepare_client
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.launch.processes import Processes
from fedlora_hf.launch.quantisation import keep_trainable
from fedlora_hf.launch.schedule import shares
from fedlora_hf.launch.zero import plain_launch
from fedlora_hf.methods import method_named
from fedlora_hf.privacy import Privacy
from fedlora_hf.training.local import LocalTraining, local_batches, num_local_steps
from fedlora_hf.training.personal import Personal, best, candidates, given, with_kept, with_tuned
from fedlora_hf.training.scorer import Scorer
from fedlora_hf.training.sharding import is_sharded, prepared
from fedlora_hf.training.stages import Stage, StageName, personal_stage, round_stage
from fedlora_hf.update import AdapterState, ClientUpdate, fitted
from fedlora_hf.util.names import unfit_reason
from fedlora_hf.util.progress import Progress
from fedlora_hf.util.seeding import derive_seed

Metrics = dict[str, float]
# What Trainer.train() does and a client's own steps do not; better refused than silently without effect.
_UNUSED = ("neftune_noise_alpha", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval")


class ClientTrainer(Trainer):
    """A `transformers.Trainer` whose training data are many clients'; the layer under `FederatedTrainer`."""

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
        head = head_labels(getattr(model, "config", None))
        self.clients: dict[str, ClientData] = {
            client_id: prepare_client(client_id, client_datasets[client_id], processing_class, args, head)
            for client_id in sorted(client_datasets)
        }
        if args.packing:
            check_packing(model)
        if not isinstance(model, PeftModel):
            model = with_adapter(model, peft_config or described(args), args.seed)
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
        self.progress = Progress(enabled=not args.disable_tqdm and self.is_world_process_zero())
        together, sharded = args.client_parallel == "data", is_sharded(self.accelerator, args.zero)
        self.processes = Processes(self.accelerator, together=together, lockstep=sharded)
        self.slot = AdapterSlot(self.model)
        # Never wrapped: `processes` adds up what a wrapper would, so any part of the adapter can be trained next.
        self.model_wrapped = prepared(self.accelerator, self.slot, together, args.zero)
        if sharded and (self.compute_loss_func or not self.model_accepts_loss_kwargs):
            raise ConfigError("a sharded base, and a loss not divided by num_items_in_batch: use the model's own loss")
        if args.gradient_checkpointing:
            self._checkpoint_activations()
        if args.initial_adapter is not None:
            self.slot.write(fitted(read_adapter(args.initial_adapter)[0], slot_rank(self.slot)))
        keep_trainable(self.model)
        if self.processes.count > 1 and (odd := self.processes.differing(self.slot.checksum())) is not None:
            raise ConfigError(
                f"model: process {odd} was given another adapter than process 0; pass peft_config and let the trainer "
                "make it, or seed all processes alike"
            )
        self.initial = self.slot.read()
        self.method = method_named(args.aggregation)
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

    # ---- who does what -----------------------------------------------------------------------------------------------

    def assigned(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that this process evaluates; all, where processes work together."""
        costs = {client: len(self.clients[client].test or ()) for client in clients}
        number, count = (0, 1) if self.processes.together else (self.processes.number, self.processes.count)
        return shares(costs, count)[number]

    def claim(self, clients: Iterable[str]) -> Iterator[str]:
        """Those of the clients that this process trains: the longest first, each by whichever process is free next."""
        costs = {c: self.num_local_steps(self.clients[c]) * self.clients[c].train.mean_length for c in clients}
        return self.processes.taken(shares(costs, 1)[0])

    def num_local_steps(self, data: ClientData) -> int:
        """Local steps of a round on somebody's data."""
        return num_local_steps(self.args, len(data.train), self.processes.share[1])

    @property
    def rank(self) -> int:
        """The rank of the adapter in the model."""
        return slot_rank(self.slot)

    # ---- one client --------------------------------------------------------------------------------------------------

    def train_round(
        self, client_id: str, start: AdapterState, frozen: AdapterState | None, number: int
    ) -> ClientUpdate:
        """A client's part in round `number`: its local steps from `start`, and of what they give what leaves the client
        (all of it or, where the run asks for privacy, clipped and with noise).

        frozen: an adapter that stands frozen under the trained one, where the method restarts its rounds; None: none.
        """
        stage = round_stage(self.args, self.method.trains, number)
        seed = derive_seed(self.args.seed, "client", number, client_id)
        self.install(start, frozen)
        update = self.train_from(
            start, client_id, self.clients[client_id], stage, seed, timeout=self.args.client_timeout
        )
        return update if self.privacy is None else self.privacy.applied(update, start, stage.untrained, seed)

    def install(self, start: AdapterState, frozen: AdapterState | None = None) -> None:
        """Put an adapter into the model to train on, and what stands frozen under it."""
        set_frozen(self.model, frozen)
        self.slot.write(start)

    def train_from(
        self,
        start: AdapterState,
        name: str,
        data: ClientData,
        stage: Stage,
        seed: int,
        *,
        steps: int | None = None,
        timeout: float | None = None,
    ) -> ClientUpdate:
        """The update of `name` after a stage's local steps on its training split, from `start`, which is in the model.

        steps: default a round's. timeout: seconds they may take, see `LocalTraining`.
        """
        self.slot.train_only(stage.parts)
        share, even = self.processes.share, self.processes.lockstep
        batches = local_batches(data.train, self.data_collator, self.args, seed, share=share, even=even)
        mu = self.args.fedprox_mu if stage.name is StageName.FEDERATED else 0.0
        steps = self.num_local_steps(data) if steps is None else steps
        with _learning_rate(self.args, stage.learning_rate):
            result = LocalTraining(self, batches, steps, seed, proximal_mu=mu, timeout=timeout).run()
        if self.processes.together:
            self.processes.check_same(self.slot.checksum(), f"the adapter of {name!r} after its local steps")
        facts = {"train_loss": result.train_loss, "steps": result.steps}
        # A factor that was not trained is the start's to the bit, which an adapter kept in other parts (dirmag) is not.
        state = with_kept(self.slot.read(), start, stage.untrained)
        return ClientUpdate(name, state, data.train.num_examples, facts)

    def personal(
        self, client_id: str, global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None
    ) -> Personal:
        """A client's personal adapter. own: its last update; refined: what the method made for it."""
        data = self.clients[client_id]

        def loss(state: AdapterState) -> float:
            return self.scorer.metrics(state, data.validation)["loss"]

        if self.args.personalise == "method" or data.validation is None:
            # In the pipeline a client's personal steps start from what is broadcast, not from its own last update.
            found = given(global_state, None if self.args.pipeline != "none" else own, refined)
        else:
            found = best(candidates(global_state, own, refined, self.rank), loss)
        if not self.args.personal_steps:
            return found
        return with_tuned(found, lambda state: self._tuned(client_id, state), loss)

    def _tuned(self, client_id: str, state: AdapterState) -> AdapterState:
        """`state` after `personal_steps` further local steps of the client."""
        seed, start = derive_seed(self.args.seed, "personal", client_id), fitted(state, self.rank)
        self.install(start)
        stage, data = personal_stage(self.args), self.clients[client_id]
        return self.train_from(start, client_id, data, stage, seed, steps=self.args.personal_steps).state

    # ---- what a client's local steps need of the Trainer: all that they change of it is changed here -----------------

    @contextmanager
    def fresh_optimizer(self, steps: int) -> Iterator[tuple[Any, Any]]:
        """A new (optimizer, scheduler) over what is trainable now, for so many steps; none is left afterwards."""
        self.optimizer = self.lr_scheduler = None
        try:
            optimizer = self.create_optimizer()
            scheduler = self.create_scheduler(num_training_steps=steps, optimizer=optimizer)
            if self.accelerator.scaler is not None:
                self.optimizer = optimizer = self.accelerator.prepare_optimizer(optimizer)
            yield optimizer, scheduler
        finally:
            # The accelerator would otherwise collect every client's optimizer for as long as the process lives.
            self.accelerator._optimizers.clear()
            self.optimizer = self.lr_scheduler = None

    def step_batches(self, batches: Iterator[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """(this process's micro-batches of the next step, the number of items in the step, over all processes)."""
        device, processes = self.args.device, self.processes
        drawn: list[Any] = []

        def counts() -> Tensor:
            own = next(batches)
            drawn[:] = self.get_batch_samples(iter(own), len(own), device)
            return torch.tensor([len(own), float(drawn[1] or 0)], device=device, dtype=torch.float64)

        if not processes.together:
            counts()
            self.current_gradient_accumulation_steps = len(drawn[0])
            return drawn[0], drawn[1]
        number, items = processes.total(counts, torch.zeros(2, device=device, dtype=torch.float64))
        self.current_gradient_accumulation_steps = int(number)
        return drawn[0], None if drawn[1] is None else items.float()

    def backward(self, micro_batches: list[dict[str, Any]], num_items: Tensor | int | None) -> Tensor:
        """Forward and backward of a step's micro-batches on this process; the sum of their losses."""
        loss = torch.zeros((), device=self.args.device)
        for inputs in micro_batches:
            loss += self.training_step(self.model_wrapped, inputs, num_items)
        return loss

    def step_begins(self) -> None:
        """Tell the callbacks."""
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    def step_ended(self) -> None:
        """Count the step and tell the callbacks."""
        self.state.global_step += 1
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, but found once: a client's optimizer does not wait for a walk over all modules."""
        if self._decay_names is None:
            self._decay_names = super().get_decay_parameter_names(model)
        return self._decay_names

    def test_metrics(self, states: Mapping[str, AdapterState]) -> dict[str, Metrics]:
        """{client: metrics of its adapter on its test split}, each client evaluated by one process, or by all."""
        found: dict[str, Metrics] = {}
        with self.processes.all_or_none():
            for client_id in self.progress.over(self.assigned(states), "evaluating"):
                data, state = self.clients[client_id], states[client_id]
                if data.test is not None:
                    with self.processes.each_or_none():
                        found[client_id] = self.scorer.metrics(state, data.test)
                        found[client_id] |= self.scorer.answers(state, data.questions)
        return self.processes.gathered(found)


def _check_arguments(args: Any, client_datasets: Mapping[str, Any]) -> None:
    if not isinstance(args, FederatedConfig):
        raise ConfigError(f"args is a {type(args).__name__}: must be a FederatedConfig; import it from fedlora_hf")
    for name in _UNUSED:
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r}: has no effect on clients' local steps; leave it out")
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
