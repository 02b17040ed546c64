"""One model, many clients' data, no federation yet: trains any client from any adapter, and scores any adapter."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from fedlora_hf.adapter.base import adapted, checkpoint_activations
from fedlora_hf.adapter.base_fingerprint import base_sha256
from fedlora_hf.adapter.files import read_adapter
from fedlora_hf.adapter.slot import (
    AdapterSlot,
    own_adapter,
    set_frozen,
    slot_rank,
    slot_ranks,
    write_initial,
)
from fedlora_hf.aggregation.update_attacks import KINDS as UPDATE_ATTACKS
from fedlora_hf.aggregation.update_attacks import attacked
from fedlora_hf.config import FederatedConfig
from fedlora_hf.data.collate import Collator
from fedlora_hf.data.labels import head_labels
from fedlora_hf.data.packing import check_packing
from fedlora_hf.data.prepare import ClientData, prepare_clients
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.processes import Processes
from fedlora_hf.launch.quantisation import keep_trainable
from fedlora_hf.launch.schedule import shares
from fedlora_hf.launch.zero import plain_launch, without_deepspeed
from fedlora_hf.methods import method_named
from fedlora_hf.privacy import Privacy
from fedlora_hf.training.checks import check_construction, check_tokens, told_in_one_line
from fedlora_hf.training.control import Controls
from fedlora_hf.training.local import LocalResult, LocalTraining, local_batches, num_local_steps
from fedlora_hf.training.lockstep_checks import check_lockstep
from fedlora_hf.training.personal import Choice, Offer, Personal, Source, best, candidates, given, with_kept, with_tuned
from fedlora_hf.training.scorer import Scorer
from fedlora_hf.training.scores import Metrics, Scores
from fedlora_hf.training.sharding import is_sharded, prepared
from fedlora_hf.training.side_scores import losses_of_each
from fedlora_hf.training.stages import Stage, StageName, personal_stage, round_stage
from fedlora_hf.training.step_log import StepLog
from fedlora_hf.training.step_trainer import StepTrainer
from fedlora_hf.training.tested import tested
from fedlora_hf.update import AdapterState, ClientUpdate, fitted
from fedlora_hf.util.progress import Progress
from fedlora_hf.util.seeding import derive_seed


class ClientTrainer(StepTrainer):
    """A `transformers.Trainer` whose training data are many clients'; the layer under `FederatedTrainer`."""

    args: FederatedConfig
    model: Any
    processing_class: Any
    moments = b""  # of the optimizer of the client that trained last, where they are kept

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
        check_construction(args, client_datasets, kwargs)
        head = head_labels(getattr(model, "config", None))
        self.clients: dict[str, ClientData] = prepare_clients(client_datasets, processing_class, args, head)
        if args.packing:
            check_packing(model)
        check_tokens(model, self.clients)
        model = adapted(model, peft_config, args)
        data_collator = data_collator or _collator(processing_class)
        given = kwargs.pop("eval_dataset", None)
        # Trainer wants one where rounds are evaluated; clients have test splits of their own.
        more = {**kwargs, "eval_dataset": {} if given is None else given}
        with told_in_one_line(), without_deepspeed(args.zero):
            super().__init__(
                model=model, args=args, data_collator=data_collator, processing_class=processing_class, **more
            )
        self.eval_dataset = given
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.progress = Progress(enabled=not args.disable_tqdm and self.is_world_process_zero())
        together, sharded = args.client_parallel == "data", is_sharded(self.accelerator, args.zero)
        self.processes = Processes(self.accelerator, together=together, lockstep=sharded)
        self.slot = AdapterSlot(self.model, own_adapter(self.model))
        self.slot.check_owns_all()
        self.base_sha256 = base_sha256(self.model, {id(parameter) for parameter in self.slot.parameters()})
        # Never wrapped: `processes` adds up what a wrapper would, so any part of the adapter can be trained next.
        self.model_wrapped = prepared(self.accelerator, self.slot, together, args.zero)
        if sharded and (self.compute_loss_func or not self.model_accepts_loss_kwargs):
            raise ConfigError("a sharded base, and a loss not divided by num_items_in_batch: use the model's own loss")
        if args.gradient_checkpointing:
            checkpoint_activations(self.model, args)
        if args.initial_adapter is not None:
            write_initial(self.slot, read_adapter(args.initial_adapter)[0], args.initial_adapter)
        keep_trainable(self.model)
        check_lockstep(self)
        if args.torch_compile:
            self.model.compile(backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        self.step_log = StepLog(args.logging_nan_inf_filter)
        # Whether local steps end when a callback asks for it: in the rounds, and not in the personal steps after them.
        self.obeys_stop = False
        self._check_same_adapter()
        self.initial = self.slot.read()
        self.method = method_named(args.aggregation)
        self.privacy = Privacy.of(args)
        self.scores = Scores()
        tokenizer = self.processing_class
        self.scorer = Scorer(self.model_wrapped, self.slot, self.data_collator, tokenizer, args, self.processes)

    def _check_same_adapter(self) -> None:
        if self.processes.count > 1 and (odd := self.processes.differing(self.slot.checksum())) is not None:
            raise ConfigError(
                f"model: process {odd} was given another adapter than process 0; pass peft_config and let the trainer "
                "make it, or seed all processes alike"
            )

    def create_accelerator_and_postprocess(self) -> None:
        with plain_launch(self.args):
            super().create_accelerator_and_postprocess()

    # ---- who does what -----------------------------------------------------------------------------------------------

    def assigned(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that this process evaluates; all, where processes work together."""
        costs = {client: len(self.clients[client].test or ()) for client in clients}
        number, count = (0, 1) if self.processes.together else (self.processes.number, self.processes.count)
        return shares(costs, count)[number]

    def claim(self, clients: Iterable[str]) -> Iterator[str]:
        """Those of the clients that this process trains: the longest first, each by whichever process is free next."""
        return self.processes.taken(self._longest_first(clients))

    def claim_groups(self, clients: Iterable[str]) -> Iterator[list[str]]:
        """The same in groups of `clients_at_once`, which are the same however many processes there are."""
        ordered, size = self._longest_first(clients), self.args.clients_at_once
        return self.processes.taken([ordered[first : first + size] for first in range(0, len(ordered), size)])

    def _longest_first(self, clients: Iterable[str]) -> list[str]:
        costs = {c: self.num_local_steps(self.clients[c]) * self.clients[c].train.mean_length for c in clients}
        return shares(costs, 1)[0]

    def num_local_steps(self, data: ClientData) -> int:
        """Local steps of a round on somebody's data."""
        return num_local_steps(self.args, len(data.train), self.processes.share[1])

    @property
    def rank(self) -> int:
        """The rank of the adapter in the model."""
        return slot_rank(self.slot)

    # ---- one client --------------------------------------------------------------------------------------------------

    def train_round(
        self,
        client_id: str,
        start: AdapterState,
        frozen: AdapterState | None,
        number: int,
        controls: Controls | None = None,
        moments: bytes = b"",
    ) -> ClientUpdate:
        """A client's part in round `number`: its local steps from `start`, and of what they give what leaves the client
        (all of it or, where the run asks for privacy, clipped and with noise).

        frozen: an adapter that stands frozen under the trained one, where the method restarts its rounds; None: none.
        controls: SCAFFOLD's, which the update then has the next of; None: none.
        moments: state that its optimizer goes on with.
        """
        stage = round_stage(self.args, self.method.trained(number), number)
        seed = derive_seed(self.args.seed, "client", number, client_id)
        self.install(start, frozen)
        update = self.train_from(
            start,
            client_id,
            self.clients[client_id],
            stage,
            seed,
            order=self.order_seed("client", number, client_id),
            controls=controls,
            timeout=self.args.client_timeout,
            moments=moments,
        )
        return self.leaving(update, start, stage, seed)

    def leaving(self, update: ClientUpdate, start: AdapterState, stage: Stage, seed: int) -> ClientUpdate:
        """What of a client's update leaves it: spoilt where a rehearsal says so; clipped, with noise, for privacy."""
        contaminated = self.args.contaminated.get(update.client_id)
        if contaminated is not None and contaminated.kind in UPDATE_ATTACKS:
            update = replace(update, state=attacked(contaminated, update.state, start, seed, stage.untrained))
        return update if self.privacy is None else self.privacy.applied(update, start, stage.untrained, seed)

    def order_seed(self, *purpose: int | str) -> int:
        """Seed of the order of examples for a purpose: data_seed's, where that is given, else the run's."""
        base = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return derive_seed(base, *purpose)

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
        order: int | None = None,
        steps: int | None = None,
        controls: Controls | None = None,
        timeout: float | None = None,
        moments: bytes = b"",
    ) -> ClientUpdate:
        """The update of `name` after a stage's local steps on its training split, from `start`, which is in the model.

        order: seed of the order of examples, default `seed`. steps: default a round's.
        timeout, moments: see `LocalTraining`.
        """
        self.slot.train_only(stage.parts)
        self.client_in_training = name
        batches = self.batches_of(data, seed if order is None else order)
        steps = self.num_local_steps(data) if steps is None else steps
        with learning_rate(self.args, stage.learning_rate):
            result = LocalTraining(self, batches, steps, seed, self.pull(stage), controls, timeout, moments).run()
        if self.processes.together:
            self.processes.check_same(self.slot.checksum(), f"the adapter of {name!r} after its local steps")
        return update_of(name, data, start, stage, self.slot.read(), result)

    def batches_of(self, data: ClientData, order: int) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of one step after the other, on somebody's training split, in the order of this seed."""
        share, even = self.processes.share, self.processes.lockstep
        return local_batches(data.train, self.data_collator, self.args, order, share=share, even=even)

    def pull(self, stage: Stage) -> float:
        """The weight of the proximal term in a stage's local steps."""
        pull = {StageName.FEDERATED: self.args.fedprox_mu, StageName.PERSONAL: self.args.personal_proximal_mu}
        return pull.get(stage.name, 0.0)

    def personal_adapter(
        self, client_id: str, global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None
    ) -> Personal:
        """A client's personal adapter. own: its last update; refined: what the method made for it."""
        found, base = self.chosen(client_id, global_state, own, refined)
        if not self.args.personal_steps:
            return found
        return with_tuned(found, base, lambda state: self.tuned(client_id, state), self.validation_loss(client_id))

    def chosen(
        self, client_id: str, global_state: AdapterState, own: AdapterState | None, refined: AdapterState | None
    ) -> tuple[Personal, Personal]:
        """(what the client has without steps of its own, what those steps start from)."""
        validation = self.clients[client_id].validation
        if self.args.personalise == "method" or validation is None:
            # In the pipeline a client's personal steps start from what is broadcast, not from its own last update.
            found = given(global_state, None if self.args.pipeline != "none" else own, refined)
        else:
            offered = candidates(global_state, own, refined, self.rank)
            found = self._best(offered, self.validation_loss(client_id), validation)
        # Ditto's personal model is held to the global one, so it starts there too, whatever was chosen.
        return found, Personal(Choice(Source.GLOBAL), global_state) if self.args.personal_proximal_mu else found

    def validation_loss(self, client_id: str) -> Callable[[AdapterState], float]:
        """The loss of any adapter on a client's validation split, each scored once."""
        split = self.clients[client_id].validation

        def loss(state: AdapterState) -> float:
            metrics = self.scores.once(
                state, client_id, "validation", lambda: self.scorer.metrics(state, split), (split,)
            )
            return metrics["loss"]

        return loss

    def _best(self, offered: Iterable[Offer], loss: Callable[[AdapterState], float], validation: Any) -> Personal:
        """The best by validation loss: computed and scored one after the other or, for several at once, together."""
        if self.args.clients_at_once > 1:
            offered = list(offered)
            losses = iter(losses_of_each(self.scorer, [state for _, state in offered], validation))
            self.scores.taken += len(offered)
            return best(offered, lambda state: next(losses))
        return best(offered, loss)

    def tuned(self, client_id: str, state: AdapterState) -> AdapterState:
        """`state` after `personal_steps` further local steps of the client."""
        seed, start = derive_seed(self.args.seed, "personal", client_id), fitted(state, slot_ranks(self.slot))
        self.install(start)
        stage, data = personal_stage(self.args), self.clients[client_id]
        order, steps = self.order_seed("personal", client_id), self.args.personal_steps
        return self.train_from(start, client_id, data, stage, seed, order=order, steps=steps).state

    # ---- scores -----------------------------------------------------------------------------------------------------

    def test_metrics(self, states: Mapping[str, AdapterState]) -> dict[str, Metrics]:
        """{client: metrics of its adapter on its test split}, each client evaluated by one process, or by all; what was
        scored before is not scored again."""
        return tested(self, states)


def _collator(tokenizer: Any) -> Collator:
    pad = getattr(tokenizer, "pad_token_id", None)
    return Collator(pad if pad is not None else 0, 8 if torch.cuda.is_available() else 1)


def update_of(
    name: str, data: ClientData, start: AdapterState, stage: Stage, state: AdapterState, result: LocalResult
) -> ClientUpdate:
    """The update that a stage's local steps on `data` came to. state: the adapter after them."""
    facts = {"train_loss": result.train_loss, "steps": result.steps}
    # A factor that was not trained is the start's to the bit, which an adapter kept in other parts (dirmag) is not.
    state = with_kept(state, start, stage.untrained)
    return ClientUpdate(name, state, data.train.num_examples, facts, result.control)


@contextmanager
def learning_rate(args: FederatedConfig, rate: float) -> Iterator[None]:
    """The optimizers made meanwhile have this learning rate."""
    usual, args.learning_rate = args.learning_rate, rate
    try:
        yield
    finally:
        args.learning_rate = usual
