"""One model, many clients' data, no federation yet: trains any client from any adapter, and scores any adapter."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from fedlora_hf import adapters, personalise
from fedlora_hf.client import ClientData, local_batches, num_local_steps, prepare_client, train_locally
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.errors import ConfigError, DataError
from fedlora_hf.files import read_adapter
from fedlora_hf.names import unfit_reason
from fedlora_hf.progress import Steps
from fedlora_hf.schedule import shares
from fedlora_hf.scorer import Scorer
from fedlora_hf.stages import Stage
from fedlora_hf.update import AdapterState, ClientUpdate, fitted

Metrics = dict[str, float]
# What Trainer.train() does and a client's own steps do not; better refused than silently without effect.
_UNUSED = ("neftune_noise_alpha", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval")


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
        if not isinstance(model, PeftModel):
            model = adapters.with_adapter(model, peft_config or adapters.peft_config(args), args.seed)
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
        # Clients, not batches, are shared out over the processes: the model is prepared for mixed precision only.
        self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        if args.gradient_checkpointing:
            self._checkpoint_activations()
        self.slot = adapters.AdapterSlot(self.model)
        if args.initial_adapter is not None:
            self.slot.write(fitted(read_adapter(args.initial_adapter)[0], adapters.slot_rank(self.slot)))
        self.initial = self.slot.read()
        self.scorer = Scorer(self.model_wrapped, self.slot, self.data_collator, self.processing_class, args)

    def _checkpoint_activations(self) -> None:
        """Switch checkpointing on, as Trainer.train() would: a client's steps do not pass through it."""
        base: Any = self.model.get_base_model()
        if hasattr(base, "activation_checkpointing_enable"):  # transformers < 5.23 knows the older name alone
            base.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        else:
            base.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)

    def mine(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that this process works for."""
        costs = {client: self.num_steps(client) for client in clients}
        return shares(costs, self.accelerator.num_processes)[self.accelerator.process_index]

    def num_steps(self, client_id: str) -> int:
        return num_local_steps(self.args, len(self.clients[client_id].train))

    @property
    def rank(self) -> int:
        """The rank of the adapter in the model."""
        return adapters.slot_rank(self.slot)

    def trained(
        self, name: str, data: ClientData, start: AdapterState, stage: Stage, steps: int, seed: int
    ) -> ClientUpdate:
        """The update after `steps` of a stage on the training split, from `start`, which is in the model already."""
        self.slot.train_only(stage.parts)
        batches = local_batches(data.train, self.data_collator, self.args, seed)
        mu = self.args.fedprox_mu if stage.name == "federated" else 0.0
        with _learning_rate(self.args, stage.learning_rate):
            result = train_locally(self, batches, steps, seed=seed, proximal_mu=mu)
        facts = {"train_loss": result.train_loss, "steps": result.steps}
        # A factor that was not trained is the start's to the bit, which an adapter kept in other parts (dirmag) is not.
        return ClientUpdate(
            name, personalise.with_kept(self.slot.read(), start, stage.untrained), len(data.train), facts
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, but found once: a client's optimizer does not wait for a walk over all modules."""
        if self._decay_names is None:
            self._decay_names = super().get_decay_parameter_names(model)
        return self._decay_names

    def test_metrics(self, states: Mapping[str, AdapterState]) -> dict[str, Metrics]:
        """{client: metrics of its adapter on its test split}, each client evaluated by one process."""
        found: dict[str, Metrics] = {}
        for client_id in self.steps.over(self.mine(states), "evaluating"):
            data, state = self.clients[client_id], states[client_id]
            if data.test is not None:
                found[client_id] = self.scorer.metrics(state, data.test) | self.scorer.answers(state, data.questions)
        return self.gathered(found)

    def gathered(self, found: dict[str, Any]) -> dict[str, Any]:
        """Every process's {client: value} as one, sorted, on every process."""
        parts = gather_object([found]) if self.accelerator.num_processes > 1 else [found]
        return dict(sorted(item for part in parts for item in part.items()))


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
