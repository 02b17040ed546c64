"""Federated LoRA fine-tuning on the Hugging Face stack.

Importing this package is instant: a public name loads its module, and torch with it, when it is first used (PEP 562).

A run from Python, and the same run taken up again:

```python
from datasets import Dataset

from fedlora_hf import FederatedConfig, FederatedTrainer

clients = {
    name: Dataset.from_dict({"prompt": [f"{name} {n}:" for n in range(8)], "completion": ["yes", "no"] * 4})
    for name in ("ada", "bob", "eve")
}
args = FederatedConfig(output_dir="out", num_rounds=2, local_steps=2, use_cpu=True, generation_examples=0)
trainer = FederatedTrainer(model, args, clients, processing_class=tokenizer)  # both loaded as ever
trainer.train()
assert sorted(trainer.run.personalised) == ["ada", "bob", "eve"]
with trainer.personal("ada") as personal:
    personal.generate(**tokenizer("ada 1:", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2)

trainer = FederatedTrainer.from_run("out", clients, model=base_loaded_afresh, processing_class=tokenizer)
assert trainer.run.round == 2  # it stands where the run ended
```
"""
# SPDX-License-Identifier: Apache-2.0

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora_hf.launch.collecting import not_collecting
from fedlora_hf.launch.quiet import silence

__version__ = "0.1.0"

_HOME = {
    "FederatedConfig": "config",
    "FederatedTrainer": "trainer",
    "DirMagLoraConfig": "dirmag",
    "aggregate": "aggregation",
    "load_run": "hub",
    "register_method": "methods",
}
__all__ = ["DirMagLoraConfig", "FederatedConfig", "FederatedTrainer", "aggregate", "load_run", "register_method"]

if TYPE_CHECKING:
    from fedlora_hf.aggregation import aggregate
    from fedlora_hf.config import FederatedConfig
    from fedlora_hf.dirmag import DirMagLoraConfig
    from fedlora_hf.hub import load_run
    from fedlora_hf.methods import register_method
    from fedlora_hf.trainer import FederatedTrainer

silence()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with not_collecting():
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
