"""Screening: which updates are used, and why the others are not, in one line each."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from sample_updates import cohort, dense, relative

from fedlora_hf.aggregation import aggregate
from fedlora_hf.aggregation.screening import screen
from fedlora_hf.errors import AdapterError, UpdateError
from fedlora_hf.update import AdapterState, ClientUpdate, LoraFactors, Outline

Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"


def changed(client: ClientUpdate, module: str, factors: object) -> ClientUpdate:
    return replace(client, state=AdapterState({**client.state, module: factors}, client.state.extras))  # type: ignore[dict-item]


def cast(kind: torch.dtype) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda c: changed(c, Q, LoraFactors(c.state[Q].A.to(kind), c.state[Q].B, 2.0))


def with_extras(client: ClientUpdate, **extras: torch.Tensor) -> ClientUpdate:
    return replace(client, state=AdapterState(client.state, {name.replace("_", "."): t for name, t in extras.items()}))


def scaled(scale: float) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda c: changed(c, Q, LoraFactors(c.state[Q].A, c.state[Q].B, scale))


def filled(value: float) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda c: changed(c, Q, LoraFactors(c.state[Q].A.index_fill(0, torch.tensor(1), value), c.state[Q].B, 2.0))


CASES: dict[str, tuple[Callable[[ClientUpdate], ClientUpdate], str]] = {
    "nan": (filled(float("nan")), f"{Q}: A is not finite"),
    "inf": (filled(float("-inf")), f"{Q}: A is not finite"),
    "huge": (filled(-3e7), "has an entry of size 3e+07, above 1e+06"),
    "int8": (cast(torch.int8), "has dtype torch.int8"),
    "complex": (cast(torch.complex64), "has dtype torch.complex64"),
    "sparse": (lambda c: changed(c, Q, LoraFactors(c.state[Q].A.to_sparse(), c.state[Q].B, 2.0)), "not a dense tensor"),
    "meta": (lambda c: changed(c, Q, c.state[Q].to("meta")), "not a dense tensor"),
    "scale nan": (scaled(float("nan")), "scale nan"),
    "scale 0": (scaled(0.0), "scale 0.0"),
    "scale huge": (scaled(1e9), "scale 1000000000.0"),
    "scale tiny": (scaled(5e-324), "scale 5e-324"),
    "product": (
        lambda c: changed(c, Q, LoraFactors(torch.full((4, 20), 3e4), torch.full((24, 4), 3e4), 2.0)),
        "|scale| |B| |A| = 1.58e+11, above 1e+08",
    ),
    "many large": (
        lambda c: changed(c, Q, LoraFactors(torch.full((4, 20), 9e5), torch.zeros(24, 4), 2.0)),
        "A has norm 8.05e+06, above 1e+06",
    ),
    "scale times B": (
        lambda c: changed(c, Q, LoraFactors(torch.zeros(4, 20), torch.ones(24, 4), 1e6)),
        "scale * B has norm 9.8e+06, above 1e+06",
    ),
    "side": (
        lambda c: changed(c, Q, LoraFactors(torch.zeros(1, 2**22 + 1), torch.zeros(24, 1))),
        "no layer has a side above 4194304",
    ),
    "rank 0": (
        lambda c: changed(c, Q, LoraFactors(torch.zeros(0, 20), torch.zeros(24, 0))),
        "is empty, of shape (0, 20)",
    ),
    "rank absurd": (lambda c: changed(c, Q, c.state[Q].padded(45)), "rank 45 is above out + in = 44"),
    "not factors": (lambda c: changed(c, Q, torch.zeros(2)), "is Tensor, not LoraFactors"),
    "shape": (
        lambda c: changed(c, Q, LoraFactors(torch.zeros(4, 21), torch.zeros(24, 4))),
        "is (24, 21), must be (24, 20)",
    ),
    "missing": (lambda c: replace(c, state=AdapterState({Q: c.state[Q]}, c.state.extras)), f"1 missing, {V} for one"),
    "extra": (lambda c: changed(c, "lm_head", c.state[Q]), "1 too many, lm_head for one"),
    "empty": (lambda c: replace(c, state=AdapterState({})), "no LoRA modules"),
    "head missing": (lambda c: with_extras(c), "1 missing, score.weight for one"),
    "head shape": (lambda c: with_extras(c, score_weight=torch.zeros(2, 6)), "score.weight is (2, 6), must be (3, 6)"),
    "head nan": (lambda c: with_extras(c, score_weight=torch.full((3, 6), torch.nan)), "score.weight: is not finite"),
    "examples 0": (lambda c: replace(c, num_examples=0), "num_examples=0"),
    "examples -1": (lambda c: replace(c, num_examples=-1), "num_examples=-1"),
    "examples many": (lambda c: replace(c, num_examples=2**60), "num_examples="),
    "examples 1.5": (lambda c: replace(c, num_examples=1.5), "num_examples=1.5"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_quarantined_with_a_reason_of_one_line(case: str) -> None:
    spoil, said = CASES[case]
    clients = cohort(5)
    found = screen([*clients[:2], spoil(clients[2]), *clients[3:]])
    assert list(found.quarantined) == ["client2"]
    assert said in found.quarantined["client2"]
    assert "\n" not in found.quarantined["client2"]
    assert [update.client_id for update in found.usable] == ["client0", "client1", "client3", "client4"]
    assert found.modules == (Q, V)
    assert all(list(update.state.extras) == ["score.weight"] for update in found.usable)
    assert found.left_out == ()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_is_welcome(kind: torch.dtype) -> None:
    clients = cohort(3)
    assert screen([cast(kind)(client) for client in clients]).quarantined == {}


@pytest.mark.parametrize("client_id", ["../evil", "", "a/b", "con", "x" * 200, 7, ["a"]])
def test_a_name_unfit_as_a_folder_is_quarantined(client_id: str) -> None:
    clients = cohort(3)
    found = screen([*clients, replace(clients[0], client_id=client_id)])
    assert list(found.quarantined) == [str(client_id)]
    assert "client id" in found.quarantined[str(client_id)]


def test_a_repeated_id_is_an_error() -> None:
    with pytest.raises(UpdateError, match="'client0' comes twice"):
        screen([*cohort(2), cohort(1)[0]])


class Unreadable(Mapping[str, LoraFactors]):
    """Stands for a client's folder with a broken file."""

    def __init__(self, state: Mapping[str, LoraFactors], error: Exception) -> None:
        self.state, self.error, self.reads = state, error, 0

    def __getitem__(self, module: str) -> LoraFactors:
        if module == V:
            raise self.error
        return self.state[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.parametrize(
    "error",
    [
        AdapterError("adapter_model.safetensors: not a safetensors file"),
        UpdateError("A (2, 3) and B (4, 5)"),
        OSError("No such file"),
        ValueError("header too large\nsecond line"),
        KeyError("lora_A"),
        RuntimeError(),
    ],
)
def test_a_client_that_cannot_be_read_is_quarantined(error: Exception) -> None:
    clients = cohort(4)
    broken = replace(clients[1], state=AdapterState(Unreadable(clients[1].state, error)))
    result = aggregate([clients[0], broken, *clients[2:]], "product_mean")
    reason = result.quarantined["client1"]
    assert reason.startswith("cannot be read: ")
    assert reason != "cannot be read: "
    assert "\n" not in reason


class Counting(Mapping[str, LoraFactors]):
    """A state on disk that counts how often each module is read."""

    def __init__(self, state: Mapping[str, LoraFactors]) -> None:
        self.state, self.reads = state, dict.fromkeys(state, 0)

    def __getitem__(self, module: str) -> LoraFactors:
        self.reads[module] += 1
        return self.state[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_the_door_reads_each_module_once() -> None:
    sources = [Counting(client.state) for client in cohort(3)]
    screen([ClientUpdate(f"c{k}", AdapterState(source), 1) for k, source in enumerate(sources)])
    assert all(set(source.reads.values()) == {1} for source in sources)


def test_the_reference_decides_the_modules_where_there_is_one() -> None:
    clients = cohort(4, heads=False)
    reference = AdapterState({Q: clients[0].state[Q]})
    small = replace(clients[3], state=reference)
    found = screen([*clients[:3], small], reference)
    assert [update.client_id for update in found.usable] == ["client3"]
    assert sorted(found.quarantined) == ["client0", "client1", "client2"]


def test_a_tie_between_module_sets_is_settled_the_same_way_in_any_order() -> None:
    clients = cohort(4, heads=False)
    small = [replace(client, state=AdapterState({Q: client.state[Q]})) for client in clients[:2]]
    one, two = screen([*small, *clients[2:]]), screen([*clients[2:], *small])
    assert [update.client_id for update in one.usable] == ["client2", "client3"]
    assert one.quarantined == two.quarantined


def test_common_modules_are_aggregated_and_the_rest_is_named() -> None:
    clients = cohort(4)
    clients[1] = replace(clients[1], state=AdapterState({Q: clients[1].state[Q]}))
    result = aggregate(clients, "product_mean", partial_modules="common", target_rank=20)
    assert result.quarantined == {}
    assert list(result.state) == [Q]
    assert result.diagnosis["modules_left_out"] == [V, "score.weight"]
    only_q = [replace(client, state=AdapterState({Q: client.state[Q]})) for client in clients]
    expected = aggregate(only_q, "product_mean", target_rank=20)
    assert relative(dense(result.state), dense(expected.state)) < 1e-6
    assert "modules_left_out" not in expected.diagnosis


def test_common_modules_still_need_one_shape() -> None:
    clients = cohort(4)
    clients[2] = CASES["shape"][0](clients[2])
    result = aggregate(clients, "fedavg", partial_modules="common")
    assert list(result.quarantined) == ["client2"]
    assert list(result.state) == [Q, V]


def test_an_unsound_client_does_not_narrow_what_is_common() -> None:
    clients = cohort(4)
    lone = replace(clients[2], state=AdapterState({Q: LoraFactors(torch.full((2, 20), torch.nan), torch.zeros(24, 2))}))
    result = aggregate([*clients[:2], lone, clients[3]], "fedavg", partial_modules="common")
    assert list(result.quarantined) == ["client2"]
    assert list(result.state) == [Q, V]


def test_nothing_in_common_is_an_error() -> None:
    one, two = cohort(2, heads=False)
    updates = [replace(c, state=AdapterState({m: c.state[m]})) for c, m in ((one, Q), (two, V))]
    with pytest.raises(UpdateError, match="0 modules that all clients have"):
        aggregate(updates, "fedavg", partial_modules="common")


def test_common_with_a_reference_stays_inside_it() -> None:
    clients = cohort(3, heads=False)
    reference = AdapterState({Q: clients[0].state[Q]})
    result = aggregate(clients, "fedavg", reference=reference, partial_modules="common")
    assert list(result.state) == [Q]
    assert result.diagnosis["modules_left_out"] == [V]


def test_the_scale_of_the_start_is_what_an_update_is_written_with() -> None:
    clients = cohort(4, scales=(0.01,))
    wild = changed(clients[1], Q, LoraFactors(torch.zeros(4, 20), torch.full((24, 4), 9e4), 1.0))
    start = clients[3].state
    assert screen([clients[0], wild, *clients[2:]]).quarantined == {}
    assert "above 10000" in screen([clients[0], wild, *clients[2:]], start).quarantined["client1"]


def test_a_large_update_is_its_sender_s_fault_only_beyond_what_the_round_began_with() -> None:
    clients = cohort(3)
    large = LoraFactors(torch.full((4, 20), 3e4), torch.full((24, 4), 3e4), 2.0)
    start = AdapterState({**clients[0].state, Q: large}, clients[0].state.extras)
    going_on = [changed(client, Q, large) for client in clients]
    assert sorted(screen(going_on).quarantined) == ["client0", "client1", "client2"]
    assert screen(going_on, start).quarantined == {}
    beyond = changed(clients[0], Q, LoraFactors(large.A * 11, large.B, 2.0))
    assert list(screen([beyond, *going_on[1:]], start).quarantined) == ["client0"]


def test_the_norms_of_half_precision_are_taken_in_float64() -> None:
    full = torch.full((4, 20), 60000.0, dtype=torch.float16)  # whose norm is beyond float16
    client = changed(cohort(1)[0], Q, LoraFactors(full, torch.full((24, 4), 1e-4), 2.0))
    assert screen([client]).quarantined == {}


@pytest.mark.parametrize(("ranks", "reason"), [((4, 4, 4, 129), "rank 129 is above 128"), ((32, 20, 32, 130), "")])
def test_one_client_s_rank_costs_nobody_else(ranks: tuple[int, ...], reason: str) -> None:
    shape = (150, 160)
    clients = [
        ClientUpdate(f"c{k}", AdapterState({"m": LoraFactors(torch.ones(r, shape[1]), torch.ones(shape[0], r) * 0.01)}))
        for k, r in enumerate(ranks)
    ]
    quarantined = screen(clients).quarantined
    assert list(quarantined) == (["c3"] if reason else [])
    assert reason in quarantined.get("c3", "")
    if reason:  # who starts from such a rank may keep it
        assert screen(clients, clients[3].state).quarantined == {}


def outlined(client: ClientUpdate, reads: dict[str, int]) -> ClientUpdate:
    """The client as if on disk: shapes are known before any value is read, and the reads are counted."""
    source = Counting(client.state)
    source.reads = reads
    reads |= dict.fromkeys(client.state, 0)
    shapes = {m: f.shape for m, f in client.state.items()} | {n: tuple(t.shape) for n, t in client.state.extras.items()}
    outline = Outline(shapes, {m: f.rank for m, f in client.state.items()})
    return replace(client, state=AdapterState(source, client.state.extras, outline))


def test_values_are_read_once_and_only_where_the_header_promises_what_is_wanted() -> None:
    clients = cohort(5, heads=False)
    clients[2] = changed(clients[2], Q, LoraFactors(torch.zeros(4, 21), torch.zeros(24, 4)))
    clients[3] = changed(clients[3], Q, clients[3].state[Q].padded(200 - 156))
    reads: list[dict[str, int]] = [{} for _ in clients]
    found = screen([outlined(client, read) for client, read in zip(clients, reads, strict=True)])
    assert list(found.quarantined) == ["client2"]
    assert [set(read.values()) for read in reads] == [{1}, {1}, {0}, {1}, {1}]


def test_whose_values_are_unsound_has_no_vote_on_the_shapes() -> None:
    clients = cohort(5, heads=False)
    other = LoraFactors(torch.full((4, 20), torch.nan), torch.zeros(30, 4))
    spoilt = [changed(client, Q, other) for client in clients[:3]]
    reads: list[dict[str, int]] = [{} for _ in clients]
    mixed = [outlined(client, read) for client, read in zip([*spoilt, *clients[3:]], reads, strict=True)]
    found = screen(mixed)
    assert [update.client_id for update in found.usable] == ["client3", "client4"]
    assert all("not finite" in reason for reason in found.quarantined.values())
    assert found == screen([*spoilt, *clients[3:]])._replace(usable=found.usable)


def test_a_file_that_changes_between_header_and_values_is_not_used() -> None:
    clients = cohort(3, heads=False)
    changing = outlined(clients[0], {})
    changing.state._factors.state = {**clients[0].state, Q: clients[0].state[Q].padded(6)}  # type: ignore[attr-defined]
    found = screen([changing, *clients[1:]])
    assert found.quarantined == {"client0": "its file has changed while it was read"}
