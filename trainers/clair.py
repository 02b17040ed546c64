r"""CLAIR: contaminated clients found by what they do not share, the others' updates refined (arXiv 2605.21217).

Clients whose updates lie outside the subspace that the majority shares are flagged and left out of the mean; for the
others the shared part is kept and the rest averaged. Its options (`fedlora methods clair` lists them) go in as
--aggregation_options rank=2 side=input. After every round this file says who is flagged; `--settled N`
ends the run when the verdict has stood still for N rounds. The evidence of each client stands at the end.

    python trainers/clair.py --model_name_or_path meta-llama/Llama-2-7b-hf --dataset databricks/databricks-dolly-15k \
        --partition_by category --num_rounds 10 --local_steps 50 --bf16 --output_dir out/clair --settled 3
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from typing import Any

from fedlora_hf.cli import OneLineParser
from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train` and CLAIR."""
    parser = OneLineParser(prog="clair.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--settled", type=int, default=0)
    own, rest = parser.parse_known_args(arguments)

    from transformers import TrainerCallback

    from fedlora_hf.commands.train import finish
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer

    class Verdict(TrainerCallback):
        """Looks at who is flagged after every round, which is an epoch to Trainer."""

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            flagged = [entry["flagged"] for entry in trainer.run.record.rounds]
            if state.is_world_process_zero:
                print(f"round {len(flagged)}: flagged {', '.join(flagged[-1]) or 'nobody'}")
            last = flagged[-own.settled :]
            control.should_training_stop |= 0 < own.settled == len(last) and all(who == last[0] for who in last)

    args = parse([*rest, "--aggregation", "clair"])
    trainer = FederatedTrainer.of(prepare(args), callbacks=[Verdict()])
    trainer.train()
    finish(trainer)
    for client, facts in trainer.run.record.clients.items() if trainer.is_world_process_zero() else ():
        kinds = [
            f"{kind} {item['score']:.2f} of {item['threshold']:.2f}"
            for kind, item in facts["evidence"].items()
            if item["score"] is not None and item["threshold"] is not None
        ]
        print(f"{client}: {', '.join(kinds) or 'no evidence could be taken'}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
