"""Names that users bring from TRL, transformers 4 and elsewhere: understood as ours, or answered with ours."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable
from difflib import get_close_matches

# Flags that mean exactly what one of ours means.
ALIASES = {
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dtype": "model_dtype",
    "torch_dtype": "model_dtype",
    "lora_target_modules": "target_modules",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "lora_rank": "lora_r",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share
    "no_cuda": "use_cpu",
}
# Names that mean something else here, or nothing, and what to say instead.
HINTS = {
    "epochs": "say --local_epochs (passes of a client over its own data in a round) and --num_rounds",
    "num_epochs": "say --local_epochs (passes of a client over its own data in a round) and --num_rounds",
    "steps": "say --local_steps (optimizer steps of a client in a round)",
    "rounds": "say --num_rounds",
    "clients": "say --num_clients",
    "rank": "say --lora_r",
    "alpha": "say --lora_alpha, or --dirichlet_alpha for the data",
    "batch_size": "say --per_device_train_batch_size",
    "lr": "say --learning_rate",
    "group_by_length": "say --train_sampling_strategy group_by_length",
    "use_peft": "an adapter is always trained; leave it out",
    "lora_task_type": "say --task causal_lm or sequence_classification",
    "lora_modules_to_save": "pass peft_config=LoraConfig(modules_to_save=...) to FederatedTrainer in Python",
    "use_dora": "DoRA's magnitudes are no LoRA factors; say --adapter dirmag, or leave it out",
    "dataset_text_field": "say --text_column (classification); a causal LM reads prompt and completion, or messages",
    "trust_remote_code": "no code of a repository is run; leave it out",
    "attn_implementation": "load the model in Python and pass it to FederatedTrainer",
    "save_safetensors": "adapters are always safetensors; leave it out",
    "overwrite_output_dir": "a finished run may be run again; leave it out",
    "fp16_opt_level": "say --fp16",
    "wire_dtype": "nothing travels here; it is a key of a Flower run (docs/deployment.md), leave it out",
    "tokenizer": "pass processing_class= in Python; the command line takes the base model's",
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say for a name that is none of `known`: what it is called here, or what it looks like; "" for neither."""
    if name in ALIASES:
        return f"say {ALIASES[name]}"
    if name in HINTS:
        return HINTS[name]
    close = get_close_matches(name, list(known), 1, 0.75)
    return f"did you mean {close[0]}?" if close else ""
