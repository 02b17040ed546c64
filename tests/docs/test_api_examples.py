"""The examples in the docstrings run as they stand on the API's pages, on a tiny model, one after the other."""
# SPDX-License-Identifier: Apache-2.0

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import tiny_llama, tiny_tokenizer

import fedlora_hf
from fedlora_hf import aggregation, update
from fedlora_hf.methods import own

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# In the order of their needs: a run is made, then read.
DOCUMENTED = {
    "FederatedConfig": fedlora_hf.FederatedConfig,
    "FederatedTrainer": fedlora_hf,  # on the first page, with from_run
    "load_run": fedlora_hf.load_run,
    "aggregate": aggregation,  # on the page of its package
    "DirMagLoraConfig": fedlora_hf.DirMagLoraConfig,
    "register_method": fedlora_hf.register_method,
    "LoraFactors": update.LoraFactors,
}


def examples(thing: Any) -> list[str]:
    return BLOCK.findall(inspect.getdoc(thing) or "")


@pytest.fixture
def own_methods() -> Iterator[None]:
    before = dict(own._registered)
    yield
    own._registered.clear()
    own._registered.update(before)


def test_every_public_name_has_an_example() -> None:
    assert set(fedlora_hf.__all__) <= set(DOCUMENTED)
    assert {name: len(examples(thing)) for name, thing in DOCUMENTED.items()} == dict.fromkeys(DOCUMENTED, 1)


@pytest.mark.usefixtures("bare_output", "own_methods")
@pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    names: dict[str, Any] = {"tokenizer": tokenizer}
    for name, thing in DOCUMENTED.items():
        names["model"], names["base_loaded_afresh"] = (tiny_llama(vocab_size=len(tokenizer)) for _ in range(2))
        for text in examples(thing):
            exec(compile(text, f"the example of {name}", "exec"), names)
