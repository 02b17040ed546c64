"""The metrics of a user's own `compute_metrics`, on one client's split."""
# SPDX-License-Identifier: Apache-2.0

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify
from transformers.trainer_utils import denumpify_detensorize

if TYPE_CHECKING:
    from transformers import Trainer


def computed_metrics(trainer: "Trainer", dataset: Any) -> dict[str, float]:
    """What `trainer.compute_metrics` makes of the adapter in the model on a tokenised split; {} without one.

    Predictions are as Trainer gives them: logits, or what `preprocess_logits_for_metrics` makes of them, joined over
    the batches and padded with -100; with include_for_metrics also the inputs and the losses.
    """
    args, compute = trainer.args, trainer.compute_metrics
    if compute is None or args.prediction_loss_only or not len(dataset):
        return {}
    model, wanted = trainer.model_wrapped, set(args.include_for_metrics)
    # A loader without a generator of its own draws from the global one, even when it shuffles nothing.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
        generator=torch.Generator(),
    )
    joined: dict[str, Any] = {}
    was_training = model.training
    model.eval()
    for batch in loader:
        for name, value in _of_batch(trainer, batch).items():
            own = nested_detach(value)
            own = own.cpu() if isinstance(own, torch.Tensor) else own
            joined[name] = own if name not in joined else nested_concat(joined[name], own, padding_index=-100)
    model.train(was_training)
    found = nested_numpify(joined)
    more = {name: found[name] for name, asked in (("inputs", "inputs"), ("losses", "loss")) if asked in wanted}
    computed = compute(EvalPrediction(predictions=found.get("logits"), label_ids=found.get("labels"), **more))
    return {name.removeprefix("eval_"): float(value) for name, value in denumpify_detensorize(computed).items()}


def _of_batch(trainer: "Trainer", batch: dict[str, Any]) -> dict[str, Any]:
    inputs = batch.get(getattr(trainer.model, "main_input_name", "input_ids"))
    loss, logits, labels = trainer.prediction_step(trainer.model_wrapped, batch, False)
    if trainer.preprocess_logits_for_metrics is not None and logits is not None:
        logits = trainer.preprocess_logits_for_metrics(logits, cast(Any, labels))
    rows = labels.shape[0] if isinstance(labels, torch.Tensor) else 1
    losses = None if loss is None else loss.reshape(1).repeat(rows)
    parts = {"logits": logits, "labels": labels, "inputs": inputs, "losses": losses}
    return {name: value for name, value in parts.items() if value is not None}
