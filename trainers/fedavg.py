r"""FedAvg on LoRA: every client trains A and B, the server means the factors (McMahan et al. 2017, arXiv 1602.05629).

The reference that other methods are compared with. Its mean is not exact: mean(B) mean(A) is not mean(B A). At the end
this file says by how much, from the updates of the last round. `--fedprox_mu 0.01` adds FedProx's pull to the round's
start, `--clients_per_round 4` draws a cohort for each round.

    python trainers/fedavg.py --model_name_or_path meta-llama/Llama-2-7b-hf --dataset databricks/databricks-dolly-15k \
        --partition_by category --num_rounds 10 --local_steps 50 --clients_per_round 4 --bf16 --output_dir out/fedavg
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora_hf.commands.launch import run

if TYPE_CHECKING:
    from fedlora_hf import FederatedTrainer


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train` and FedAvg."""
    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer

    args = parse([*arguments, "--aggregation", "fedavg"])
    job = prepare(args)
    trainer = FederatedTrainer.of(job)
    trainer.train()
    finish(trainer)
    if trainer.is_world_process_zero() and trainer.run.round:
        print(f"mean(B) mean(A) misses the mean of the clients' updates by {averaging_error(trainer):.2%} of its norm")


def averaging_error(trainer: "FederatedTrainer") -> float:
    """|W_fedavg - W_mean| / |W_mean| over all modules, for the updates of the last round."""
    from fedlora_hf import aggregate

    number = trainer.run.round
    updates = [trainer.store.update(number, client) for client in trainer.run.record.rounds[-1]["collaborative"]]
    rank = len(updates) * trainer.rank
    exact = aggregate(updates, "product_mean", weight_by=trainer.args.weight_by, target_rank=rank).state
    missed = [(trainer.run.state[module] - exact[module]).norm() ** 2 for module in exact]
    return float((sum(missed) / max(exact.norm() ** 2, 1e-300)) ** 0.5)


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
