r"""Robust means, and a drill: median, trimmed_mean, multikrum or geometric_median with some clients spoiled on purpose.

The rules work on the products B A (Yin et al. 2018, arXiv 1803.01498; Blanchard et al. 2017, arXiv 1703.02757; RFA,
Pillutla et al. 2022, arXiv 1912.13445). They bound what a few clients can do, and name nobody. `--spoil N` gives N
clients, drawn from the seed, random answers to train on (`--spoil_kind` for others of `fedlora_hf.data.contaminate`),
their test splits staying sound; at the end this file says what weight they had and how the sound clients fare. Run it
with `--aggregation fedavg` as well to see what the rule is worth.

    python trainers/robust.py --aggregation multikrum --aggregation_options num_contaminated=2 --spoil 2 \
        --model_name_or_path Qwen/Qwen2.5-7B --dataset dolly.jsonl --num_rounds 5 --bf16 --output_dir out/robust
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence

from fedlora_hf.cli import OneLineParser
from fedlora_hf.commands.launch import run


def main(arguments: Sequence[str]) -> None:
    """Train with the flags of `fedlora train`, geometric_median where no rule is named."""
    parser = OneLineParser(prog="robust.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--spoil", type=int, default=0)
    parser.add_argument("--spoil_kind", default="random_outputs")
    own, rest = parser.parse_known_args(arguments)

    import numpy as np

    from fedlora_hf.commands.train import finish
    from fedlora_hf.data.contaminate import contaminate
    from fedlora_hf.errors import ConfigError
    from fedlora_hf.flags import parse
    from fedlora_hf.loading import prepare
    from fedlora_hf.trainer import FederatedTrainer
    from fedlora_hf.util.seeding import derive_seed

    args = parse(["--aggregation", "geometric_median", *rest])
    job = prepare(args)
    if not 0 <= own.spoil <= len(job.clients):
        raise ConfigError(f"--spoil {own.spoil}: must be between 0 and the {len(job.clients)} clients; change it")
    rng = np.random.default_rng(derive_seed(args.seed, "spoil"))
    spoiled = sorted(rng.choice(sorted(job.clients), own.spoil, replace=False).tolist())
    for client in spoiled:
        seed = derive_seed(args.seed, "spoil", client)
        job.clients[client]["train"] = contaminate(job.clients[client]["train"], own.spoil_kind, seed)
    job.facts["data"]["contaminated"] = spoiled
    trainer = FederatedTrainer.of(job)
    trainer.train()
    finish(trainer)
    if not trainer.is_world_process_zero():
        return
    clients = trainer.run.record.clients
    for client in spoiled:
        print(f"{client}: spoiled, weight {clients[client]['weight']:.3f}; an even share is {1 / len(clients):.3f}")
    found = [facts["metrics"].get("global", {}).get("loss") for name, facts in clients.items() if name not in spoiled]
    losses = [loss for loss in found if loss is not None]
    if losses:
        print(f"global adapter on the sound clients: test loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
