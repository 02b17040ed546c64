"""A client: builds the model, loads the adapter, takes its steps in a plain loop, sends the adapter back."""
# SPDX-License-Identifier: Apache-2.0

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from stock.model import build

torch.set_num_threads(1)  # as many actors as cores, each on one
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    run = context.run_config
    place, steps, batch = int(context.node_config["partition-id"]), int(run["steps"]), int(run["batch"])
    model = build(str(run["base"]), int(run["rank"]))
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    ids = load_file(str(run["data"]))[f"{place:03d}"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=float(run["rate"]))
    model.train()
    for step in range(steps):
        rows = ids[torch.arange(step * batch, (step + 1) * batch) % len(ids)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"loss": float(loss.detach()), "num-examples": steps * batch}),
        }
    )
    return Message(content, reply_to=message)
