"""`fedlora train`: from flags or a YAML file to a finished run."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

from fedlora_hf.commands.summary import print_summary
from fedlora_hf.flags import parse
from fedlora_hf.loading import prepare
from fedlora_hf.trainer import FederatedTrainer


def train(arguments: Sequence[str]) -> FederatedTrainer:
    """Parse, load, train, write, push; the trainer, for whoever calls this from Python."""
    args = parse(arguments)
    trainer = FederatedTrainer.of(prepare(args))
    trainer.train()
    finish(trainer)
    return trainer


def finish(trainer: FederatedTrainer) -> None:
    """Print the summary of a run that is done, and push it where `push_to_hub` says so."""
    if trainer.is_world_process_zero():
        print_summary(trainer.run.record, trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
