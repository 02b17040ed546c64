"""Local steps set the training mode once, and a callback that evaluates in between changes nothing about it."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import pytest
import torch
from models import federation
from torch import nn
from transformers import TrainerCallback


class Evaluates(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert model.training
        model.eval()
        assert not any(module.training for module in model.modules())


def test_after_an_evaluation_the_next_step_trains_again(tmp_path: Path) -> None:
    """With dropout, a step in evaluation mode would give another update."""
    dropout = {"lora_dropout": 0.3, "local_steps": 3}
    plain = federation(tmp_path / "plain", **dropout).train_client("ada", 1)
    looked_at = federation(tmp_path / "seen", more={"callbacks": [Evaluates()]}, **dropout).train_client("ada", 1)
    for module, factors in plain.state.items():
        assert torch.equal(factors.B, looked_at.state[module].B)


def test_the_mode_is_walked_once_and_the_model_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = federation(tmp_path, local_steps=5)
    walks: list[nn.Module] = []
    walk = type(trainer.model).train
    monkeypatch.setattr(type(trainer.model), "train", lambda self, mode=True: walks.append(self) or walk(self, mode))
    trainer.model.eval()
    walks.clear()
    trainer.train_client("ada", 1)
    assert len(walks) == 1
    assert "train" not in vars(trainer.model)
    assert all(module.training for module in trainer.model.modules())
