"""One client's optimizer steps: what becomes of its gradients once they are there, by whatever pass they came."""
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedlora_hf.training.control import Controls, Correction
from fedlora_hf.training.moments import moments_of, restore

if TYPE_CHECKING:
    from fedlora_hf.training.client_trainer import ClientTrainer


class ClientSteps:
    """The parameters that are trainable in the trainer's model when this is made, and all that moves them.

    proximal_mu, controls: see `LocalTraining`.
    """

    def __init__(self, trainer: "ClientTrainer", proximal_mu: float, controls: Controls | None) -> None:
        self.trainer, self.proximal_mu = trainer, proximal_mu
        self.named = named = [(name, p) for name, p in trainer.model_wrapped.named_parameters() if p.requires_grad]
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self.correction = None if controls is None else Correction(controls, named)
        self.start = [parameter.detach().clone() for parameter in self.parameters] if proximal_mu else []
        self.optimizer: Any = None
        self.scheduler: Any = None

    def begin(self, steps: int, moments: bytes = b"") -> None:
        """Make the optimizer, and the schedule over so many steps. moments: state that the optimizer goes on with."""
        self.optimizer, self.scheduler = self.trainer.new_optimizer(steps, self.named)
        self.trainer.use_optimizer(self.optimizer, self.scheduler)
        if moments:
            restore(self.optimizer, moments)

    def take(self, loss: Tensor) -> None:
        """One step on the gradients that are there, of a loss that is told to the log."""
        trainer, args = self.trainer, self.trainer.args
        if self.correction is not None:
            self.correction.apply()
        for parameter, origin in zip(self.parameters, self.start, strict=bool(self.start)):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self.proximal_mu)
        norm = None
        if args.max_grad_norm and args.max_grad_norm > 0:
            norm = trainer.accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        trainer.tell("on_pre_optimizer_step")
        self.optimizer.step()
        trainer.tell("on_optimizer_step")
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        trainer.step_ended(loss, norm, rate)

    def moments(self) -> bytes:
        """The optimizer's state, for a client's next round."""
        return moments_of(self.optimizer)

    def control(self, steps: int) -> dict[str, Tensor]:
        """The client's next control variate after so many steps, of SCAFFOLD; {} without it."""
        return {} if self.correction is None else self.correction.variate(steps)

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
