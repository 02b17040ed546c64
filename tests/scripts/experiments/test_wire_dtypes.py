"""The wire_dtypes experiment: what it reads of a record, and how its table adds up."""
# SPDX-License-Identifier: Apache-2.0

from types import ModuleType, SimpleNamespace

NAMES = ("wire_dtypes",)


def test_benign_clients_are_averaged_and_bytes_are_a_clients(scripts: dict[str, ModuleType]) -> None:
    found = {"loss": 2.0}
    clients = {
        "a": {"metrics": {"global": found, "personalised": {"loss": 1.0}}},
        "b": {"metrics": {"global": {"loss": 4.0}, "personalised": found}},
        "c-contaminated": {"metrics": {"global": {"loss": 99.0}}},
    }
    rounds = [{"bytes_up": {"a": 12000, "b": 12000}, "bytes_down": {"a": 1200}}]
    record = SimpleNamespace(clients=clients, rounds=rounds, flagged=["b", "c-contaminated"])
    row = scripts["wire_dtypes"].measured(record)
    assert row == {
        "bytes_up": 2.0,
        "bytes_down": 0.1,
        "global_loss": 3.0,
        "personalised_loss": 1.5,
        "found": 1,
        "flagged": 2,
    }


def test_losses_are_compared_with_float32_of_the_same_seed(scripts: dict[str, ModuleType]) -> None:
    rest = {"method": "fedavg", "bytes_up": "4", "bytes_down": "4", "found": "0"}
    losses = {("0", "float32"): "1.0", ("0", "int8"): "1.1", ("1", "float32"): "2.0", ("1", "int8"): "1.9"}
    rows = [{**rest, "seed": seed, "wire_dtype": dtype, "global_loss": loss} for (seed, dtype), loss in losses.items()]
    exact, rounded = scripts["wire_dtypes"].summary(rows)
    assert exact["against float32"] == "+0.0000 (+0.0000 to +0.0000)"
    assert rounded["against float32"] == "+0.0000 (-0.1000 to +0.1000)"
    assert rounded["seeds"] == 2
