"""How good an adapter is on one client's held-out examples: loss, perplexity, token accuracy, accuracy."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fedlora_hf.training.batches import right_sized
from fedlora_hf.training.heads import answered_logits

if TYPE_CHECKING:
    from fedlora_hf.launch.processes import Processes

IGNORED = -100


def held_out_metrics(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    task: str,
    batch_size: int,
    processes: "Processes | None" = None,
) -> dict[str, float]:
    """Metrics of `model` on `dataset`, each a mean over the whole of it, whatever the batches.

    causal_lm: "loss" (nats per answer token), "perplexity" = exp(loss), "token_accuracy". sequence_classification:
    "loss" (nats per example), "accuracy". Both: "num_items", tokens or examples. {} for an empty dataset.
    batch_size: examples of the greatest length at a time; see `batches.right_sized`.
    processes: those that work together share out the batches, and all of them get the metrics of the whole.
    """
    rows = row_scores(model, dataset, collate, task=task, batch_size=batch_size, processes=processes)
    # Examples are added up in the order of the data set, whichever batches and processes they were in.
    nats, correct, items = rows.sum(0).tolist()
    if not items:
        return {}
    loss = nats / items
    if task != "causal_lm":
        return {"loss": loss, "accuracy": correct / items, "num_items": items}
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": correct / items,
        "num_items": items,
    }


def row_scores(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    task: str,
    batch_size: int,
    processes: "Processes | None" = None,
) -> Tensor:
    """(R, 3) float64 on the CPU, of every row: summed loss in nats, how many items are right, and how many there are;
    items are answer tokens ("causal_lm") or the row itself ("sequence_classification"). See `held_out_metrics`."""
    score = _causal_scores if task == "causal_lm" else _class_scores
    device = next(model.parameters()).device
    own, idle = _share(right_sized(dataset, batch_size), processes)
    # A loader without a generator of its own draws from the global one, even when it shuffles nothing.
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=own, collate_fn=collate, generator=torch.Generator())
    like = torch.zeros(3 * len(dataset), dtype=torch.float64, device=device)

    def scored() -> Tensor:
        rows = torch.zeros_like(like).view(-1, 3)
        for number, batch in enumerate(loader):
            scores = score(model, {name: tensor.to(device) for name, tensor in batch.items()})
            if number < len(own) - idle:
                rows[torch.tensor(own[number], device=device)] = scores
        return rows.view(-1)

    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = scored() if processes is None else processes.total(scored, like)
    model.train(was_training)
    return found.view(-1, 3).cpu()


def loss_by_owner(rows: Tensor, owners: Sequence[str]) -> dict[str, float]:
    """{owner: loss over its rows}; rows: (R, 2 or more), summed nats first and the number of items last, see
    `row_scores`. NaN for an owner without items."""
    sums: dict[str, list[float]] = {owner: [0.0, 0.0] for owner in owners}
    for owner, row in zip(owners, rows.tolist(), strict=True):
        sums[owner][0] += row[0]
        sums[owner][1] += row[-1]
    return {owner: nats / items if items else math.nan for owner, (nats, items) in sums.items()}


def _share(batches: list[list[int]], processes: "Processes | None") -> tuple[list[list[int]], int]:
    """(the batches of this process, how many at the end only keep it in step with the others and do not count)."""
    if processes is None:
        return batches, 0
    number, count = processes.share
    own = batches[number::count]
    idle = -(-len(batches) // count) - len(own) if processes.lockstep else 0
    return own + batches[:idle], idle


def _causal_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(summed negative log-likelihood, correct tokens, tokens) of each example's answer, (batch, 3); position i
    predicts token i + 1."""
    labels = batch.pop("labels")[:, 1:]
    answered = labels != IGNORED
    nats, correct = _scores(answered_logits(model, batch, answered), labels[answered])
    tokens = torch.zeros((3, *answered.shape), dtype=torch.float64, device=nats.device)
    tokens[:, answered] = torch.stack([nats, correct, torch.ones_like(nats)])
    return tokens.sum(-1).T


def _class_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    nats, correct = _scores(model(**batch).logits, labels)
    return torch.stack([nats, correct, torch.ones_like(nats)], -1)


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, whether the likeliest is right) of each row, in float64."""
    nats = cross_entropy(logits.float(), labels, reduction="none")
    return nats.double(), (logits.argmax(-1) == labels).double()


def generate_answers(
    model: Any, prompts: Sequence[list[int]], tokenizer: Any, *, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Greedy answers to tokenised prompts, in their order; left-padded in batches of like lengths, and cut at the
    end-of-sequence token."""
    answers: dict[int, str] = {}
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = [prompts[place] for place in places]
        width = len(rows[0])
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.no_grad():
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        answers |= zip(places, texts, strict=True)
    model.train(was_training)
    return [answers[place] for place in range(len(prompts))]


def mean_metrics(per_client: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over clients of every metric all of them have; perplexity is exp of the mean loss."""
    rows = [row for row in per_client if row]
    if not rows:
        return {}
    shared = [name for name in rows[0] if name != "num_items" and all(name in row for row in rows)]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in shared}
    if "perplexity" in means:
        means["perplexity"] = math.exp(means["loss"]) if means["loss"] < 700 else math.inf
    return means
