r"""A fine-tuning script of one's own, as it is written for TRL's SFTTrainer, with the data of several clients.

Own datasets, an own LoraConfig and own options in Python: per-step curves in TensorBoard, an evaluation after every
round, early stopping, the best round as the result, and a push at the end. It goes on from where it was when it is
started again. Take it as a start for yours; `make_clients` is what to change.

    python trainers/python/own_script.py BASE_MODEL OUTPUT_DIR [--num_rounds N] [--push user/name]
"""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora_hf.cli import OneLineParser
from fedlora_hf.commands.launch import run


def make_clients() -> dict[str, Any]:
    """{client id: {"train", "validation", "test"}}: two desks that answer the same questions in their own words."""
    from datasets import Dataset

    def desk(greeting: str, first: int) -> dict[str, Any]:
        rows = [
            {"prompt": f"Ticket {number}: where is it?\n", "completion": f"{greeting}, {number} is on its way."}
            for number in range(first, first + 24)
        ]
        parts = {"train": rows[:16], "validation": rows[16:20], "test": rows[20:]}
        return {name: Dataset.from_list(part) for name, part in parts.items()}

    return {"london": desk("Good morning", 100), "leeds": desk("Ey up", 200), "york": desk("Hello", 300)}


def main(arguments: Sequence[str]) -> None:
    """Train, evaluate, stop early, keep the best round, show a personal adapter, push."""
    parser = OneLineParser(prog="own_script.py", add_help=False)
    parser.add_argument("base")
    parser.add_argument("output_dir")
    parser.add_argument("--num_rounds", type=int, default=4)
    parser.add_argument("--push")
    own = parser.parse_args(arguments)

    from peft import LoraConfig
    from transformers import EarlyStoppingCallback

    from fedlora_hf import FederatedConfig, FederatedTrainer

    args = FederatedConfig(
        output_dir=own.output_dir,
        num_rounds=own.num_rounds,
        local_steps=4,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        round_lr_scheduler="cosine",
        round_lr_min=1e-4,
        aggregation="product_mean",
        max_length=64,
        generation_examples=0,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        report_to="tensorboard",
        include_num_input_tokens_seen="non_padding",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_global_loss",
        save_total_limit=2,
        push_to_hub=own.push is not None,
        hub_model_id=own.push,
        hub_strategy="end",
    )
    trainer = FederatedTrainer(
        own.base,
        args,
        make_clients(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        compute_metrics=lambda found: {"answered": float((found.predictions == found.label_ids).mean())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    begun = (Path(own.output_dir) / "rounds").is_dir()
    trainer.train(resume_from_checkpoint=begun or None)
    print(f"best {trainer.state.best_metric:.3f} in {trainer.state.best_model_checkpoint}")
    with trainer.personal("leeds") as model:
        print(f"leeds answers with {type(model).__name__}, {sum(p.numel() for p in trainer.slot.parameters())} numbers")
    if own.push:
        print(trainer.push_to_hub())


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
