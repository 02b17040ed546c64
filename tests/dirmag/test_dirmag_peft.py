"""Direction/magnitude adapters in a PEFT model: identity, phases, several adapters, merging, and PEFT's own writers."""
# SPDX-License-Identifier: Apache-2.0

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from fedlora_hf.dirmag import (
    PARTS,
    DirectionPhaseConfig,
    DirMagLoraConfig,
    MagnitudePhaseConfig,
    Size,
    is_dirmag,
    load_native_state,
    native_state,
    part_sizes,
    phase_size,
    set_trainable_parts,
    write_factor,
)
from fedlora_hf.errors import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def q_proj(model):
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def trainable(model) -> set[str]:
    return {name.split("lora_")[1].replace(".default", "") for name, p in model.named_parameters() if p.requires_grad}


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def test_the_start_is_the_identity_and_every_part_trains(base, fresh, tokens):
    assert torch.equal(logits(fresh, tokens), logits(base(), tokens))
    assert is_dirmag(fresh)
    assert trainable(fresh) == set(PARTS)
    assert (q_proj(fresh).lora_B["default"].magnitude == 0).all()


def test_directions_at_the_start_are_the_same_on_every_client(base, fresh, options):
    model = base()
    torch.manual_seed(123)
    torch.rand(7)
    other = get_peft_model(model, DirMagLoraConfig(**options))
    assert torch.equal(q_proj(other).lora_B["default"].direction, q_proj(fresh).lora_B["default"].direction)
    reseeded = get_peft_model(base(), DirMagLoraConfig(**options, direction_seed=1))
    assert not torch.equal(q_proj(reseeded).lora_B["default"].direction, q_proj(fresh).lora_B["default"].direction)
    v_proj = fresh.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    assert not torch.equal(v_proj.lora_B["default"].direction, q_proj(fresh).lora_B["default"].direction)


def test_gradients_are_those_of_plain_lora_carried_to_the_parts(base, trained, tokens, options):
    plain = get_peft_model(base(), LoraConfig(**options))
    for name in ("lora_A", "lora_B"):
        for ours, theirs in zip(_factors(trained, name), _factors(plain, name), strict=True):
            write_factor(theirs, ours.weight.detach())
    for model in (trained, plain):
        model(tokens, labels=tokens).loss.backward()
    for name in ("lora_A", "lora_B"):
        for ours, theirs in zip(_factors(trained, name), _factors(plain, name), strict=True):
            upstream, length = theirs.weight.grad, ours.direction.norm(dim=1, keepdim=True)
            unit = (ours.direction / length).detach()
            along = (upstream * unit).sum(1, keepdim=True)
            torch.testing.assert_close(ours.magnitude.grad, along)
            expected = (ours.magnitude / length * (upstream - along * unit)).detach()
            torch.testing.assert_close(ours.direction.grad, expected, rtol=1e-5, atol=1e-7)


def _factors(model, name):
    return [getattr(m, name)["default"] for m in model.modules() if hasattr(m, name)]


def test_folding_is_exact_after_sixty_steps(fresh, tokens, fit):
    fit(fresh, tokens, steps=60)
    factors = _factors(fresh, "lora_A") + _factors(fresh, "lora_B")
    assert any((factor.magnitude < 0).any() for factor in factors)
    assert max(float((factor.direction.detach().norm(dim=1) - 1).abs().max()) for factor in factors) > 1e-3
    for factor in factors:
        folded = factor.weight.detach().clone()
        m, d = factor.magnitude.detach().double(), factor.direction.detach().double()
        torch.testing.assert_close(folded.double(), m * d / d.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)
        factor.write(folded)
        assert (factor.magnitude >= 0).all()
        torch.testing.assert_close(factor.weight.detach(), folded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [["A.direction"], ["B.magnitude"], ["A.magnitude", "B.direction"], list(PARTS)])
def test_a_phase_trains_its_parts_and_nothing_else(trained, tokens, fit, parts):
    set_trainable_parts(trained, parts)
    assert trainable(trained) == set(parts)
    before = native_state(trained)
    fit(trained, tokens, steps=2)
    changed = {
        key.split("lora_")[1] for key, value in native_state(trained).items() if not torch.equal(value, before[key])
    }
    assert changed == set(parts)
    with trained.disable_adapter():
        pass
    trained.set_adapter("default")
    assert trainable(trained) == set(parts)
    assert trained.peft_config["default"].trainable_parts == tuple(part for part in PARTS if part in parts)


def test_switching_drops_the_gradients_of_what_is_frozen(trained, tokens):
    trained(tokens, labels=tokens).loss.backward()
    set_trainable_parts(trained, ["B.magnitude"])
    factor = q_proj(trained).lora_A["default"]
    assert factor.direction.grad is None
    assert factor.magnitude.grad is None
    assert q_proj(trained).lora_B["default"].magnitude.grad is not None


def test_phase_configs_are_names_for_their_parts(base, options):
    assert trainable(get_peft_model(base(), DirectionPhaseConfig(**options))) == {"A.direction"}
    assert trainable(get_peft_model(base(), MagnitudePhaseConfig(**options))) == {"B.magnitude"}


def test_sizes_count_what_a_phase_sends(fresh, base, options):
    # Four modules of 32 x 32 with r = 4, in float32.
    assert part_sizes(fresh) == {
        "A.direction": Size(4 * 128, 4 * 512),
        "A.magnitude": Size(4 * 4, 4 * 16),
        "B.direction": Size(4 * 128, 4 * 512),
        "B.magnitude": Size(4 * 32, 4 * 128),
    }
    assert phase_size(fresh, ["B.magnitude"]) == Size(128, 512)
    assert phase_size(fresh, PARTS).numbers == sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    columns = get_peft_model(base(), DirMagLoraConfig(**options, axis_a="column", axis_b="column"))
    assert part_sizes(columns)["A.magnitude"].numbers == 4 * 32
    assert part_sizes(columns)["B.magnitude"].numbers == 4 * 4


def test_several_adapters_of_both_kinds_live_on_one_base(base, trained, tokens, options, fit):
    expected = logits(trained, tokens)
    trained.add_adapter("phase", MagnitudePhaseConfig(**options))
    trained.add_adapter("plain", LoraConfig(**options))
    assert [is_dirmag(trained, name) for name in ("default", "phase", "plain", "absent")] == [True, True, False, False]
    assert trainable(trained) == set(PARTS)
    torch.testing.assert_close(logits(trained, tokens), expected, rtol=0, atol=0)
    trained.set_adapter("phase")
    assert {name.split(".")[-1] for name, p in trained.named_parameters() if p.requires_grad} == {"magnitude"}
    assert torch.equal(logits(trained, tokens), logits(base(), tokens))
    trained.set_adapter("plain")
    assert type(q_proj(trained).lora_A["plain"]) is nn.Linear
    fit(trained, tokens, steps=2)
    trained.eval()
    mixed = logits(trained, torch.cat([tokens[:1]] * 3), adapter_names=["default", "plain", "__base__"])
    for row, name in enumerate(["default", "plain"]):
        trained.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(trained, tokens[:1])[0])
    torch.testing.assert_close(mixed[2], logits(base(), tokens[:1])[0])
    trained.delete_adapter("phase")
    assert not is_dirmag(trained, "phase")


def test_an_adapter_added_after_a_plain_one_is_split_too(base, tokens, options, fit):
    model = get_peft_model(base(), LoraConfig(**options))
    fit(model, tokens, steps=2)
    expected = logits(model, tokens)
    model.add_adapter("split", DirMagLoraConfig(**options))
    assert is_dirmag(model, "split")
    assert not is_dirmag(model)
    assert torch.equal(logits(model, tokens), expected)
    model.set_adapter("split")
    assert torch.equal(logits(model, tokens), logits(base(), tokens))


def test_disable_merge_unmerge_and_unload(base, trained, tokens):
    expected = logits(trained, tokens)
    with trained.disable_adapter():
        assert torch.equal(logits(trained, tokens), logits(base(), tokens))
    trained.merge_adapter()
    torch.testing.assert_close(logits(trained, tokens), expected, rtol=1e-5, atol=1e-5)
    trained.unmerge_adapter()
    torch.testing.assert_close(logits(trained, tokens), expected, rtol=1e-5, atol=1e-5)
    merged = trained.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_deepcopy_and_pickle_keep_the_kind(trained, tokens):
    pickled = io.BytesIO()
    torch.save(trained, pickled)
    pickled.seek(0)
    for model in (copy.deepcopy(trained), torch.load(pickled, weights_only=False)):
        assert is_dirmag(model)
        assert torch.equal(logits(model, tokens), logits(trained, tokens))
        nn.init.zeros_(q_proj(model).lora_B["default"].weight)
        assert (q_proj(trained).lora_B["default"].magnitude != 0).any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(trained, tokens, reentrant):
    trained(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    trained.zero_grad()
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    trained.enable_input_require_grads()
    calls = []
    q_proj(trained).lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    trained.train()(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2  # forward, and again in backward
    assert len(expected) == 16
    for name, parameter in trained.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_a_bfloat16_base_trains_float32_parts(base, tokens, options, fit):
    model = get_peft_model(base(torch.bfloat16), DirMagLoraConfig(**options))
    first = float(model(tokens, labels=tokens).loss.detach())
    fit(model, tokens)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert float(model(tokens, labels=tokens).loss.detach()) < first
    kept = get_peft_model(base(torch.bfloat16), DirMagLoraConfig(**options), autocast_adapter_dtype=False)
    fit(kept, tokens, steps=2)
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(kept, tokens).isfinite().all()


def test_add_weighted_adapter_and_hotswap_write_into_the_parts(base, trained, tokens, options, fit, tmp_path):
    expected = logits(trained, tokens)
    trained.save_pretrained(tmp_path)
    other = get_peft_model(base(), DirMagLoraConfig(**options))
    hotswap_adapter(other, str(tmp_path), "default", torch_device="cpu")
    assert is_dirmag(other)
    torch.testing.assert_close(logits(other, tokens), expected, rtol=1e-5, atol=1e-6)
    for kind in ("cat", "svd", "linear"):
        trained.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        trained.set_adapter(kind)
        assert is_dirmag(trained, kind)
        torch.testing.assert_close(logits(trained, tokens), expected, rtol=1e-5, atol=1e-5)
    larger = get_peft_model(base(), LoraConfig(r=6, target_modules=options["target_modules"], lora_alpha=8))
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(AdapterError, match=r"weight \(6, 32\): this direction/magnitude factor is \(4, 32\)"):
        hotswap_adapter(other, str(tmp_path / "larger"), "default", torch_device="cpu")


def test_a_resume_through_the_native_parts_is_exact(base, tokens, options, fit, tmp_path):
    def start():
        return get_peft_model(base(), DirMagLoraConfig(**options))

    whole = start()
    fit(whole, tokens, steps=20, lr=3e-2)
    half = start()
    optimizer = fit(half, tokens, steps=10, lr=3e-2)
    saved = {"parts": native_state(half), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "resume.pt")
    half.save_pretrained(tmp_path)
    ends = []
    for native in (True, False):
        saved = torch.load(tmp_path / "resume.pt")
        resumed = start()
        resumed.load_adapter(tmp_path, "default", is_trainable=True)
        if native:
            load_native_state(resumed, saved["parts"])
        optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], 3e-2)
        optimizer.load_state_dict(saved["optimizer"])
        fit(resumed, tokens, steps=10, optimizer=optimizer)
        ends.append(native_state(resumed))
    for key, value in native_state(whole).items():
        assert torch.equal(ends[0][key], value)
    # The folded weights alone do not do: that is what the native parts are for.
    assert any(not torch.allclose(ends[1][key], value, atol=1e-3) for key, value in native_state(whole).items())


def test_native_state_has_no_adapter_name_and_is_checked(trained, tokens, options):
    state = native_state(trained)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.direction" in state
    expected = logits(trained, tokens)
    trained.add_adapter("copy", DirMagLoraConfig(**options))
    load_native_state(trained, state, "copy")
    trained.set_adapter("copy")
    assert torch.equal(logits(trained, tokens), expected)
    key = next(iter(state))
    short = {name: value for name, value in state.items() if name != key}
    for wrong in (short, {**state, "else.direction": state[key]}, {**state, key: state[key][:1, :1]}):
        with pytest.raises(AdapterError, match="native state: "):
            load_native_state(trained, wrong)


def test_what_cannot_be_split_is_refused_in_one_line(base, options):
    plain = get_peft_model(base(), LoraConfig(**options))
    for call in (part_sizes, native_state, lambda model: set_trainable_parts(model, ["B.magnitude"])):
        with pytest.raises(AdapterError, match="adapter 'default': is not, or not in every module"):
            call(plain)
    with pytest.raises(AdapterError, match=r"embed_tokens \(Embedding\): direction/magnitude LoRA needs plain linear"):
        get_peft_model(base(), DirMagLoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="use_dora=True: not combinable"):
        DirMagLoraConfig(use_dora=True)
    for value in ("B.magnitude", ["C.direction"], []):
        with pytest.raises(ConfigError, match=r"trainable_parts .*: must be a list of at least one of A.direction"):
            DirMagLoraConfig(trainable_parts=value)
    with pytest.raises(ConfigError, match="axis_b='rows': must be 'row' or 'column'"):
        DirMagLoraConfig(axis_b="rows")
    with pytest.raises(ConfigError, match=r"direction_seed=0.5: must be a whole number"):
        DirMagLoraConfig(direction_seed=0.5)


def test_the_weight_is_whole_again_after_a_forward_that_failed(trained):
    layer = q_proj(trained)
    expected = layer.lora_A["default"].weight.detach().clone()
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 5))
    assert torch.equal(layer.lora_A["default"].weight, expected)
    layer(torch.randn(3, 32))
    assert torch.equal(layer.lora_A["default"].weight, expected)


def test_a_compiler_traces_the_layer_without_a_break(trained):
    layer = q_proj(trained)
    x = torch.randn(3, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_plain_lora_is_left_as_it_was(base, options):
    layer = q_proj(get_peft_model(base(), LoraConfig(**options)))
    assert type(layer).__module__ == "peft.tuners.lora.layer"
