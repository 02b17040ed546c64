"""Somebody else's ClientApp: PEFT, torch and Flower, and nothing of this package."""
# SPDX-License-Identifier: Apache-2.0

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

RANK, ALPHA, SIZE = 2, 4, 8
app = ClientApp()


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def build(rank: int = RANK) -> PeftModel:
    """The model with a fresh adapter, the same for everybody."""
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["first", "second"]))


def examples(place: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a client: what all of them could learn, with noise of its own."""
    shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + place)
    truth = torch.randn(SIZE, 3, generator=shared)
    x = torch.randn(16 + place, SIZE, generator=own)
    return x, x @ truth + 0.05 * torch.randn(len(x), 3, generator=own)


def loss_of(model: PeftModel, place: int) -> Tensor:
    x, y = examples(place)
    return nn.functional.mse_loss(model(x), y)


@app.train()
def train(message: Message, context: Context) -> Message:
    place = int(context.node_config["partition-id"])
    model = build(int(context.node_config.get("rank", RANK)))
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict(), ignore_mismatched_sizes=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        loss = loss_of(model, place)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"loss": float(loss.detach()), "num-examples": 16 + place})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    place, model = int(context.node_config["partition-id"]), build()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        metrics = MetricRecord({"loss": float(loss_of(model, place)), "num-examples": 16 + place})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
