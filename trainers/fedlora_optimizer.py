r"""FedLoRA-Optimizer: direction/magnitude LoRA, trained for all and then for each (arXiv 2510.11274).

Federated rounds train the whole adapter; global rounds train A's direction alone, the shared knowledge; personal steps
train B's magnitude alone, the personal knowledge, out_features numbers a layer. Any aggregation method may stand in
between: with CLAIR, contaminated clients never reach the global stage. --global_rounds 0 leaves the global stage out,
--personal_steps 0 the local one; --initial_adapter FOLDER --num_rounds 0 runs the later stages again from an earlier
result; --server_dataset trains the global stage on data of the server's own. At the end this file says what each stage
moved, and what a client had to send, to be sent and to keep for it.

    python trainers/fedlora_optimizer.py --model_name_or_path meta-llama/Llama-2-7b-hf \
        --dataset databricks/databricks-dolly-15k --partition_by category --num_rounds 3 --local_steps 50 \
        --global_rounds 1 --personal_steps 20 --bf16 --output_dir out/fedlora_optimizer
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence

from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train` and the pipeline."""
    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.record.stage_costs import stage_costs
    from fedlora_hf.trainer import FederatedTrainer

    args = parse(["--aggregation", "dirmag_mean", *arguments, "--pipeline", "fedlora_optimizer"])
    job = prepare(args)
    trainer = FederatedTrainer.of(job)
    trainer.train()
    finish(trainer)
    for cost in stage_costs(trainer.run.record) if trainer.is_world_process_zero() else ():
        moved = ", ".join(f"{part} {amount:.2g}" for part, amount in cost.moved.items())
        up, down, stored = (f"{amount or 0:.0f}" for amount in (cost.up, cost.down, cost.stored))
        print(f"{cost.stage} ({cost.rounds}): a client sent {up} bytes, got {down}, keeps {stored}; moved {moved}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
