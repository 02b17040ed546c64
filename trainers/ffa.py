r"""FFA-LoRA: A stays as it was drawn, clients train B alone (Sun et al. 2024, arXiv 2403.12313).

With one A for all the mean of the B's is the exact mean of the updates, half of the adapter travels, and noise added
for privacy is not squared. Half of the parameters are trained, so it wants a larger learning rate than LoRA: where no
rate is given, this file takes twice the default. At the end it says what travelled.

    torchrun --nproc_per_node 2 trainers/ffa.py --model_name_or_path Qwen/Qwen2.5-7B --dataset dolly.jsonl \
        --partition_by dirichlet --num_clients 20 --num_rounds 10 --local_epochs 1 --bf16 --output_dir out/ffa
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence

from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train`, A frozen."""
    from fedlora_hf import FederatedConfig
    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer

    args = parse([*arguments, "--aggregation", "ffa"])
    if args.learning_rate == FederatedConfig.learning_rate:
        args.learning_rate *= 2
    job = prepare(args)
    trainer = FederatedTrainer.of(job)
    trainer.train()
    finish(trainer)
    if trainer.is_world_process_zero():
        sent = sum(sum(entry["bytes_up"].values()) for entry in trainer.run.record.rounds)
        updates = sum(len(entry["bytes_up"]) for entry in trainer.run.record.rounds)
        whole = updates * trainer.initial.nbytes()
        print(f"clients sent {sent / 2**20:.1f} MiB in {updates} updates; A and B together are {whole / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
