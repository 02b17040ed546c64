"""What becomes of every field of PEFT's LoraConfig: it travels with the adapter, or is refused with the remedy.

A federation resets, sends, screens, averages and saves what an adapter's slot owns: the factors A and B of linear
layers, and the tensors of modules that are trained whole. A field that makes PEFT train something else, or change the
base, would do so in one client and be lost or leak into the next. Nothing here imports PEFT, so that an
adapter_config.json that was read is held to the same rules as a config in Python.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_hf.errors import one_line

Fate = Literal["travels", "no effect", "refused"]


@dataclass(frozen=True)
class Rule:
    """fate: "travels" (followed, and in the saved config), "no effect" (says nothing of the weights) or "refused".

    accepted: values of a refused field that ask for nothing. why: what it would do; remedy: what to do instead.
    after_training: whether an adapter that is trained already cannot be used with it either.
    """

    fate: Fate
    accepted: tuple[Any, ...] = ()
    why: str = ""
    remedy: str = "leave it out"
    after_training: bool = True


def _refused(why: str, remedy: str = "leave it out", *accepted: Any, after_training: bool = True) -> Rule:
    return Rule("refused", (None, False, *accepted), why, remedy, after_training)


_TRAVELS = Rule("travels")
_NO_EFFECT = Rule("no effect")
_FACTORS = "its trained tensors are more than the factors A and B"
_PLAIN = "use plain LoRA"
FIELDS: Mapping[str, Rule] = {
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "peft_type"), _TRAVELS),
    **dict.fromkeys(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"), _TRAVELS),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), _TRAVELS),
    **dict.fromkeys(("modules_to_save", "fan_in_fan_out"), _TRAVELS),
    # Of another library's layers, of how much memory loading takes, of options that are refused themselves.
    **dict.fromkeys(
        ("auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"), _NO_EFFECT
    ),
    "inference_mode": _refused("nothing would be trained", "pass inference_mode=False", after_training=False),
    "bias": _refused(
        "the base's biases would be trained in one client and leak into the next", 'pass bias="none"', "none"
    ),
    "trainable_token_indices": _refused(
        "rows of the embedding are no LoRA factors and would not be sent",
        'train the embedding whole with modules_to_save=["embed_tokens"], or leave it out',
        [],
        {},
    ),
    "target_parameters": _refused(
        "LoRA on fused parameters (experts of a mixture) has a rank for each expert",
        "leave target_parameters out and name linear layers in target_modules",
        [],
    ),
    "layer_replication": _refused(
        "PEFT would copy layers of the base, which the adapters of others do not fit",
        "save the base with its copied layers as a model of its own, and train on that",
        [],
    ),
    "alora_invocation_tokens": _refused("the adapter would act on tokens after an invocation only", _PLAIN, []),
    "use_dora": _refused("DoRA's magnitudes are no LoRA factors", f"{_PLAIN}, or DirMagLoraConfig"),
    "lora_bias": _refused("the factors' own biases are no part of B A"),
    "use_qalora": _refused("A acts on pooled inputs, so the update is not B A", _PLAIN),
    "use_bdlora": _refused("block-diagonal factors do not stay so in a mean", _PLAIN),
    "arrow_config": _refused("Arrow routes among adapters and trains none", _PLAIN),
    "kasa_config": _refused(f"{_FACTORS}, and it changes the base", _PLAIN),
    "monteclora_config": _refused(_FACTORS, _PLAIN),
    "velora_config": _refused("its gradients are approximations of another kind", _PLAIN, after_training=False),
    "megatron_config": _refused("layers split over devices hold parts of the factors only", _PLAIN),
    "ensure_weight_tying": _refused("two modules would share one trained tensor", "leave it out, and name one module"),
    "loftq_config": _refused("LoftQ changes the base", "pass init_lora_weights=True", {}, after_training=False),
    "eva_config": _refused("EVA draws A from data", "see init_lora_weights", after_training=False),
    "corda_config": _refused("CorDA changes the base", "pass init_lora_weights=True", after_training=False),
    "lora_ga_config": _refused("LoRA-GA changes the base", "pass init_lora_weights=True", after_training=False),
    "init_lora_weights": _TRAVELS,  # by value: see _initialisation
}
# What get_peft_model does to the base's own weights; a mean of such adapters fits no client's base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CONVERT = (
    "pass init_lora_weights=True, or convert a trained one with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


def refusal(config: Mapping[str, Any], *, trained: bool, initialised: bool = False) -> str | None:
    """Why an adapter of this config cannot take part, in one line with the remedy; None where it can.

    config: the fields of a LoraConfig (`vars`), or an adapter_config.json. trained: whether it is an adapter that was
    trained already, to be aggregated; else one to be trained here. initialised: it is in a model already, so an
    initialisation that needs data (EVA) may have been done.
    """
    if (reason := _initialisation(config.get("init_lora_weights", True), trained or initialised)) is not None:
        return reason
    for name in sorted(config):
        rule, value = FIELDS.get(name), config[name]
        if rule is None or rule.fate != "refused" or value in rule.accepted or (trained and not rule.after_training):
            continue
        said = "is set" if value is True else f"= {one_line(_shown(value), 80)}"
        return f"{name} {said}: {rule.why}; {rule.remedy}"
    return None


# Fields of DirMagLoraConfig, which is ours: the stages of a pipeline change them.
OURS = ("trainable_parts", "direction_seed", "axis_a", "axis_b")


def unknown(config: Any) -> str | None:
    """The same for a LoraConfig object of a PEFT that knows more fields than the table: a set one is refused."""
    for name, field in type(config).__dataclass_fields__.items():
        value = getattr(config, name, field.default)
        if name not in FIELDS and name not in OURS and value and value != field.default:
            return f"{name}={one_line(value, 80)}: a field of PEFT this version does not know; leave it out"
    return None


def _initialisation(given: Any, done: bool) -> str | None:
    kind = given.lower() if isinstance(given, str) else ""
    if kind.startswith(_CHANGES_BASE):
        return f"init_lora_weights={given!r}: changes the base model's weights, which all clients share; {_CONVERT}"
    if kind == "eva" and not done:
        return (
            "init_lora_weights='eva': draws A from data that this trainer has not got yet; pass a model that "
            "peft.initialize_lora_eva_weights has prepared, or init_lora_weights=True"
        )
    if kind == "mica" and not done:
        return "init_lora_weights='mica': trains A alone, with B frozen; pass init_lora_weights=True"
    return None


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | list | tuple | dict) else type(value).__name__
