"""DirMagLinear by itself: a linear map in two parts that others may treat as an nn.Linear."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlora_hf.dirmag import DirMagLinear, write_factor
from fedlora_hf.errors import AdapterError


def factor(n: int = 6, k: int = 4, axis: str = "row") -> DirMagLinear:
    """One whose parts are far from canonical, as training leaves them."""
    torch.manual_seed(0)
    made = DirMagLinear(torch.randn(n, k), axis, 0, ("direction", "magnitude"))
    with torch.no_grad():
        made.direction.mul_(1.3)
        made.magnitude[0, 0] *= -1
    return made


@pytest.mark.parametrize("axis", ["row", "column"])
def test_it_is_the_linear_map_of_its_folded_weight(axis):
    ours = factor(axis=axis)
    x = torch.randn(3, 4)
    assert torch.equal(ours(x), F.linear(x, ours.weight))
    state = ours.state_dict()
    assert list(state) == ["weight"]
    plain = nn.Linear(4, 6, bias=False)
    plain.load_state_dict(state)
    assert torch.equal(plain(x), ours(x))


def test_a_zero_weight_has_gradients_in_its_magnitudes():
    ours = DirMagLinear(torch.zeros(5, 3), "row", seed=4, trainable=("direction", "magnitude"))
    assert (ours.weight == 0).all()
    ours(torch.ones(1, 3)).sum().backward()
    assert (ours.magnitude.grad != 0).all()
    assert (ours.direction.grad == 0).all()


def test_the_lent_weight_is_differentiable():
    ours = factor()
    ours.weight.square().sum().backward()
    torch.testing.assert_close(ours.magnitude.grad, 2 * ours.magnitude.detach())
    torch.testing.assert_close(ours.direction.grad, torch.zeros(6, 4), atol=1e-6, rtol=0)


NEW = torch.arange(24.0).reshape(6, 4) - 7


WRITES = {
    "data.copy_": lambda f: f.weight.data.copy_(NEW),
    "data =": lambda f: setattr(f.weight, "data", NEW.clone()),
    "held data =": lambda f: [setattr(held, "data", held.data * 0 + NEW) for held in [f.weight]],
    "data[:k].copy_": lambda f: (f.weight.data[:2].copy_(NEW[:2]), f.weight.data[2:].copy_(NEW[2:])),
    "data[:, :k] =": lambda f: [
        (d.__setitem__((slice(None), c), NEW[:, c]), None)[1] for d in [f.weight.data] for c in range(4)
    ],
    "copy_": lambda f: f.weight.copy_(NEW),
    "detach.copy_": lambda f: f.weight.detach().copy_(NEW),
    "T.copy_": lambda f: f.weight.T.copy_(NEW.T),
    "unbind": lambda f: [row.copy_(new) for row, new in zip(f.weight.unbind(0), NEW, strict=True)],
    "out=": lambda f: torch.add(NEW, 0, out=f.weight.detach()),
    "init": lambda f: nn.init.zeros_(f.weight).add_(NEW),
    "foreach": lambda f: torch._foreach_copy_([f.weight], [NEW]),
    "= Parameter": lambda f: setattr(f, "weight", nn.Parameter(NEW.clone())),
    "write_factor": lambda f: write_factor(f, NEW),
    "load_state_dict": lambda f: f.load_state_dict({"weight": NEW}),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_way_to_write_the_weight_reaches_the_parts(write, mode):
    ours = factor()
    magnitude, direction = ours.magnitude, ours.direction
    with mode():
        write(ours)
    torch.testing.assert_close(ours.weight.detach(), NEW)
    assert ours.magnitude is magnitude
    assert ours.direction is direction
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(6))


def test_reading_changes_nothing():
    ours = factor()
    before = {name: (p.detach().clone(), p._version) for name, p in ours.named_parameters()}
    weight = ours.weight
    total = torch.zeros(6, 4)
    total.add_(weight.detach())
    _ = (
        weight * 2,
        weight.data + 1,
        weight.T,
        weight[:2],
        weight.norm(),
        weight.dtype,
        repr(weight),
        weight.clone().zero_(),
    )
    assert type(weight * 2) is torch.Tensor
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter._version == before[name][1]


def test_a_weight_of_another_shape_is_refused():
    ours = factor()
    with pytest.raises(AdapterError, match=r"weight \(8, 4\): this direction/magnitude factor is \(6, 4\)"):
        ours.weight.data = torch.zeros(8, 4)
    with pytest.raises(RuntimeError, match=r"weight \(8, 4\)"):
        ours.load_state_dict({"weight": torch.zeros(8, 4)})
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(ours.weight, torch.zeros(8, 4))
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})
    with pytest.raises(AdapterError, match=r"the factor is \(2, 3\)"):
        write_factor(nn.Linear(3, 2, bias=False), torch.zeros(2, 4))


def test_bfloat16_parts_are_split_in_float32():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = DirMagLinear(weight, "row", 0, ())
    assert ours.magnitude.dtype == ours.direction.dtype == ours.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ours.weight.detach(), weight, rtol=2e-2, atol=0)
