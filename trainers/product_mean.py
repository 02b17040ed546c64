r"""The exact mean: clients train A and B, the server means the products B A and re-factors them to the rank of the run.

What the factors' mean only approximates (trainers/fedavg.py) is exact here up to the rank: what does not fit is
discarded, and its share of the energy is in the record for every module. Where much is discarded, the clients have
learned more directions than `--lora_r` holds; this file lists the worst modules and stops the run early, when
`--patience N` rounds have brought no lower training loss.

    python trainers/product_mean.py --model_name_or_path deepseek-ai/deepseek-llm-7b-base --partition_by task \
        --dataset natural-instructions/tasks --num_rounds 20 --local_steps 20 --lora_r 32 --bf16 --output_dir out/mean
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from typing import Any

from fedlora_hf.cli import OneLineParser
from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train` and the exact mean."""
    parser = OneLineParser(prog="product_mean.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--patience", type=int, default=0)
    own, rest = parser.parse_known_args(arguments)

    from transformers import TrainerCallback

    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer

    class Patience(TrainerCallback):
        """Ends the run when so many rounds in a row brought no lower training loss. A round is an epoch to Trainer."""

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds = [entry for entry in state.log_history if "round" in entry]
            losses = [entry.get("round_loss", entry.get("loss")) for entry in rounds]
            losses = [loss for loss in losses if loss is not None]
            best = losses.index(min(losses)) if losses else 0
            control.should_training_stop |= 0 < own.patience <= len(losses) - 1 - best

    args = parse([*rest, "--aggregation", "product_mean"])
    trainer = FederatedTrainer.of(prepare(args), callbacks=[Patience()])
    trainer.train()
    finish(trainer)
    modules = trainer.run.record.modules
    for name in sorted(modules, key=lambda name: -modules[name]["discarded_energy"])[:5]:
        if trainer.is_world_process_zero():
            print(
                f"{name}: rank {modules[name]['rank']} discards {modules[name]['discarded_energy']:.2%} of the energy"
            )


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
