"""A client that runs out of memory, of time, or of a personal adapter is quarantined; a full disk is not its fault."""
# SPDX-License-Identifier: Apache-2.0

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import TrainerCallback

from fedlora_hf import FederatedTrainer
from fedlora_hf.commands.launch import exit_code
from fedlora_hf.errors import ConfigError, RoundError

pytestmark = pytest.mark.usefixtures("bare_output")
SIZES = {"ada": 4, "bob": 6, "eve": 5}


class During(TrainerCallback):
    """Does `action` after the optimizer's `step`th step of a client whose gradients are `trainer`'s."""

    def __init__(self, client: str, action: Callable[[], None], step: int = 1) -> None:
        self.client, self.action, self.step, self.now, self.taken = client, action, step, "", 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken += 1
        if self.now == self.client and self.taken == self.step:
            self.action()


def run_with(folder: Path, callback: During | None = None, **changes: Any) -> FederatedTrainer:
    """Train; `callback` is told whose turn it is."""
    clients = models.token_clients(SIZES, held_out=2)
    trainer = models.federation(folder, clients, **changes, more={"callbacks": [callback]} if callback else {})
    train_client = trainer.train_client

    def told(client_id: str, number: int) -> Any:
        if callback:
            callback.now, callback.taken = client_id, 0
        return train_client(client_id, number)

    trainer.train_client = told  # type: ignore[method-assign]
    trainer.train()
    return trainer


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def others(folder: Path, clients: set[str]) -> dict[str, bytes]:
    """Weights in the rounds' client folders of `clients`."""
    files = models.weight_files(folder / "rounds")
    return {path: content for path, content in files.items() if Path(path).parent.name in clients}


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand advice")]
)
def test_a_client_out_of_memory_is_quarantined_and_the_next_is_not_touched(tmp_path: Path, error: Exception) -> None:
    trainer = run_with(tmp_path / "failing", During("bob", raising(error)), num_rounds=1)
    reason = trainer.run.record.quarantined["bob"]
    assert reason.startswith(f"training failed: {type(error).__name__}")
    assert "\n" not in reason
    run_with(tmp_path / "sound", num_rounds=1)
    found = others(tmp_path / "failing", {"ada", "eve"})
    assert len(found) == 2
    assert found == others(tmp_path / "sound", {"ada", "eve"})


def test_gradients_of_a_client_that_failed_in_the_middle_of_a_step_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises between the backward pass and the optimizer's step, when its gradients are there."""
    run_with(tmp_path / "sound", num_rounds=1)
    trainer = models.federation(tmp_path / "failing", models.token_clients(SIZES, held_out=2), num_rounds=1)
    clip, train_client, now = trainer.accelerator.clip_grad_norm_, trainer.train_client, []
    monkeypatch.setattr(trainer, "train_client", lambda c, n: (now.append(c), train_client(c, n))[1])

    def clipping(*args: Any, **kwargs: Any) -> Any:
        if now[-1] == "bob":
            assert any(p.grad is not None for p in trainer.model.parameters())
            raise torch.OutOfMemoryError("here")
        return clip(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clipping)
    trainer.train()
    assert list(trainer.run.record.quarantined) == ["bob"]
    assert trainer.optimizer is None
    assert trainer.accelerator._optimizers == []
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    found = others(tmp_path / "failing", {"ada", "eve"})
    assert found == others(tmp_path / "sound", {"ada", "eve"})


def test_a_client_that_takes_too_long_is_quarantined_with_the_reason(tmp_path: Path) -> None:
    run_with(tmp_path / "sound", num_rounds=1)
    slow = During("bob", lambda: time.sleep(1.1))
    trainer = run_with(tmp_path / "slow", slow, num_rounds=1, client_timeout=1.0)
    reason = trainer.run.record.rounds[0]["quarantined"]["bob"]
    assert reason.startswith("training failed: ClientTimeoutError: 1 of 2 steps took 1.")
    assert "client_timeout=1" in reason
    assert trainer.run.record.clients["bob"]["collaborative"] is False
    found = others(tmp_path / "slow", {"ada", "eve"})
    assert found == others(tmp_path / "sound", {"ada", "eve"})


def test_a_step_that_hangs_is_broken_off(tmp_path: Path) -> None:
    began = time.monotonic()
    trainer = run_with(tmp_path, During("bob", lambda: time.sleep(600)), num_rounds=1, client_timeout=1.0)
    assert time.monotonic() - began < 60
    reason = trainer.run.record.rounds[0]["quarantined"]["bob"]
    assert reason.startswith("training failed: ClientTimeoutError: step 1 of 2 has not ended 1 s after the first began")
    assert sorted(trainer.run.record.rounds[0]["weights"]) == ["ada", "eve"]


def test_the_personal_steps_have_no_limit_of_time(tmp_path: Path) -> None:
    class Slow(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if trainer.run.round:
                time.sleep(1.1)

    trainer = models.federation(
        tmp_path,
        models.token_clients({"ada": 4}),
        num_rounds=1,
        personal_steps=1,
        client_timeout=1.0,
        more={"callbacks": [Slow()]},
    )
    trainer.train()
    assert trainer.run.record.quarantined == {}
    assert trainer.run.record.clients["ada"]["personal"]["choice"].endswith("tuned")


def test_a_timeout_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client_timeout=-1"):
        models.federation(tmp_path, client_timeout=-1)


def test_a_client_whose_personal_adapter_fails_has_none_and_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = models.federation(tmp_path, models.token_clients(SIZES, held_out=2))
    personal = trainer.personal_adapter

    def failing(client_id: str, *args: Any) -> Any:
        if client_id == "bob":
            raise torch.OutOfMemoryError("at the end")
        return personal(client_id, *args)

    monkeypatch.setattr(trainer, "personal_adapter", failing)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == ["ada", "eve"]
    facts = {client: entry["personal"] for client, entry in trainer.run.record.clients.items()}
    assert facts["bob"] == {"failed": "personal adapter failed: OutOfMemoryError: at the end"}
    assert "choice" in facts["ada"]


def test_a_full_disk_stops_the_run_and_quarantines_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run_with(tmp_path / "sound")
    trainer = models.federation(tmp_path / "full", models.token_clients(SIZES, held_out=2))
    save = trainer.store.save

    def full(number: int, update: Any) -> Any:
        if (number, update.client_id) == (2, "bob"):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "full" / "x"))
        return save(number, update)

    monkeypatch.setattr(trainer.store, "save", full)
    assert exit_code(trainer.train) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fedlora: error: ")
    assert message.endswith("No space left on device; make room, then --resume_from last goes on")
    assert trainer.store.failure(2, "bob") is None
    run_with(tmp_path / "full", resume_from="last")
    assert models.weight_files(tmp_path / "full") == models.weight_files(tmp_path / "sound")


def test_any_other_error_of_ours_is_not_hidden() -> None:
    def broken() -> None:
        raise OSError(errno.ENOENT, "No such file", "x")

    with pytest.raises(OSError, match="No such file"):
        exit_code(broken)


def test_too_few_usable_updates_change_nothing(tmp_path: Path) -> None:
    """Nothing that was committed, no adapter, no record; and a mended client lets the round go on where it was."""
    run_with(tmp_path / "sound")
    run_with(tmp_path / "few", num_rounds=1)
    before = {str(path): path.read_bytes() for path in (tmp_path / "few").rglob("*") if path.is_file()}
    failing = During("bob", raising(RuntimeError("mend me")))
    with pytest.raises(RoundError, match="round 2: 2 usable updates, server_min_clients=3; nothing was changed"):
        run_with(tmp_path / "few", failing, server_min_clients=3, resume_from="last")
    assert {path: Path(path).read_bytes() for path in before} == before
    mended = run_with(tmp_path / "few", server_min_clients=3, resume_from="last")
    assert mended.run.record.quarantined == {}
    assert models.weight_files(tmp_path / "few") == models.weight_files(tmp_path / "sound")
