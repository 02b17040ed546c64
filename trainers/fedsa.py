r"""FedSA-LoRA: A is shared, every client keeps a B of its own (Guo et al. 2025, arXiv 2410.01463).

A method for personal adapters: A carries what all tasks have in common, B what is a client's own, and no B ever leaves
its client. What matters at the end is each client's own adapter on its own test split beside the global one's (mean A,
mean B); this file prints the two and who gains. `--personal_steps N` tunes each personal adapter a little further.

    accelerate launch trainers/fedsa.py --model_name_or_path meta-llama/Llama-2-7b-hf --partition_by task \
        --dataset natural-instructions/tasks --num_rounds 10 --local_steps 20 --bf16 --output_dir out/fedsa
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence

from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train`, A shared and B kept."""
    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer

    # "method": the personal adapter is what the method says it is, (mean A, own B), and none that was chosen later.
    args = parse(["--personalise", "method", *arguments, "--aggregation", "fedsa"])
    job = prepare(args)
    trainer = FederatedTrainer.of(job)
    trainer.train()
    finish(trainer)
    if not trainer.is_world_process_zero():
        return
    scores = {client: facts["metrics"] for client, facts in trainer.run.record.clients.items()}
    scores = {client: found for client, found in scores.items() if {"global", "personalised"} <= set(found)}
    gains = {client: found["global"]["loss"] - found["personalised"]["loss"] for client, found in scores.items()}
    for client, gain in sorted(gains.items(), key=lambda item: -item[1]):
        print(f"{client}: test loss {scores[client]['global']['loss']:.3f} -> {gain:+.3f} lower with its own B")
    print(f"{sum(gain > 0 for gain in gains.values())} of {len(gains)} clients gain")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
