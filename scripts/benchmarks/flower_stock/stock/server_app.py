"""The server: Flower's own FedAvg, which only notes when its rounds begin and end."""
# SPDX-License-Identifier: Apache-2.0

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from stock.model import build

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg; `seconds`: of each round, from its first message to the aggregate."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []
        self._began = 0.0

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        self._began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().aggregate_train(*args, **kwargs)
        self.seconds.append(time.perf_counter() - self._began)
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config
    clients = int(run["clients"])
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    start = ArrayRecord(get_peft_model_state_dict(build(str(run["base"]), int(run["rank"]))))
    strategy.start(grid=grid, initial_arrays=start, num_rounds=int(run["rounds"]))
    Path(str(run["out"])).write_text(json.dumps(strategy.seconds), encoding="utf-8")
