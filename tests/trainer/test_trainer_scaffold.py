"""SCAFFOLD: against the paper's algorithm with plain SGD, written out; its state on disk; what it is refused with."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sample_updates import same_bits

from fedlora_hf.errors import ConfigError
from fedlora_hf.training.control import next_server

pytestmark = pytest.mark.usefixtures("bare_output")
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.2, "local_steps": 3}


def run(folder: Path, **changes: Any) -> Any:
    settings = {"aggregation": "fedavg", "keep_rounds": 0, "num_rounds": 3, "scaffold": True, **PLAIN, **changes}
    trainer = models.federation(folder, **settings)
    trainer.train()
    return trainer


def flat(state: Any) -> torch.Tensor:
    return torch.cat([t.flatten().double() for m in sorted(state) for t in (state[m].A, state[m].B)])


def variate(found: dict[str, torch.Tensor], trainer: Any) -> torch.Tensor:
    """A control variate in the order of `flat`."""
    parts = []
    for module in sorted(trainer.initial):
        for factor in ("lora_A", "lora_B"):
            name = next(n for n in found if f"{module}.{factor}" in n)
            parts.append(found[name].flatten().double())
    return torch.cat(parts)


def test_with_sgd_it_is_the_paper_s_option_two(tmp_path: Path) -> None:
    """c_k <- c_k - c + (x - y) / (K eta); c <- c + mean over all clients of what theirs changed by."""
    trainer = run(tmp_path)
    clients = ("ada", "bob", "eve")
    c, own = 0.0, dict.fromkeys(clients, 0.0)
    start = trainer.initial
    for number in (1, 2, 3):
        before = dict(own)
        for client in clients:
            moved = flat(start) - flat(trainer.store.update(number, client).state)
            own[client] = own[client] - c + moved / (3 * 0.2)
            found = variate(trainer.store.control(number, client), trainer)
            torch.testing.assert_close(found, own[client], atol=2e-5, rtol=1e-3)
        c = c + sum(own[client] - before[client] for client in clients) / 3
        remembered = trainer.federation._remembered(number, "scaffold/")
        torch.testing.assert_close(variate(remembered, trainer), c, atol=2e-5, rtol=1e-3)
        start = trainer.store.state(number)


def test_the_first_round_is_fedavg_s_to_the_bit_and_the_second_is_not(tmp_path: Path) -> None:
    plain, corrected = run(tmp_path / "plain", scaffold=False), run(tmp_path / "scaffold")
    assert same_bits(plain.store.state(1), corrected.store.state(1))
    assert not same_bits(plain.store.state(2), corrected.store.state(2))


def test_a_client_alone_is_not_corrected(tmp_path: Path) -> None:
    """Its own variate is the server's."""
    one = models.token_clients({"ada": 5})
    trainers = []
    for scaffold in (False, True):
        settings = {"aggregation": "fedavg", "num_rounds": 3, "scaffold": scaffold, **PLAIN}
        trainers.append(models.federation(tmp_path / str(scaffold), one, **settings))
        trainers[-1].train()
    torch.testing.assert_close(flat(trainers[0].run.state), flat(trainers[1].run.state), atol=1e-7, rtol=1e-6)


def test_who_sat_a_round_out_keeps_its_variate_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    options = {"clients_per_round": 2, "num_rounds": 4, "keep_rounds": 2, "optim": "adamw_torch"}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "parts", **{**options, "num_rounds": 2})
    resumed = run(tmp_path / "parts", **options, resume_from="last")
    assert same_bits(whole.run.state, resumed.run.state)
    for name, tensor in whole.store.memory(4).items():
        assert torch.equal(tensor, resumed.store.memory(4)[name])


def test_ffa_s_frozen_factor_has_no_variate(tmp_path: Path) -> None:
    trainer = run(tmp_path, aggregation="ffa", num_rounds=2)
    assert all("lora_B" in name for name in trainer.store.control(2, "ada"))
    assert all(torch.equal(f.A, trainer.initial[m].A) for m, f in trainer.run.state.items())


def test_the_server_s_variate_is_the_mean_of_all_clients(tmp_path: Path) -> None:
    one, two = {"w": torch.tensor([3.0])}, {"w": torch.tensor([6.0])}
    assert next_server({}, [({}, one), ({}, two)], 3) == {"w": torch.tensor([3.0])}
    assert next_server({"w": torch.tensor([3.0])}, [(one, two)], 3) == {"w": torch.tensor([4.0])}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": "product_mean"}, "scaffold with aggregation 'product_mean'"),
        ({"aggregation": "rolora"}, "scaffold with aggregation 'rolora'"),
        ({"aggregation": "fedsa"}, "scaffold with aggregation 'fedsa'"),
        ({"adapter": "dirmag"}, "scaffold with adapter dirmag"),
        ({"dp_clip": 1.0}, "scaffold beside dp_clip"),
    ],
)
def test_what_it_does_not_go_with(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        models.federation(tmp_path, **{"aggregation": "fedavg", "scaffold": True, **changes})
