"""A PEFT model's adapter <-> AdapterState: read out, and written back in place, without rebuilding anything."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora_hf.adapter import contract
from fedlora_hf.adapter.files import SIDE_CAR
from fedlora_hf.dirmag import PARTS, DirMagLoraConfig, is_dirmag, phase_size, set_trainable_parts, write_factor
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.update import AdapterState, LoraFactors
from fedlora_hf.util.seeding import derive_seed

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig

DEFAULT = "default"
FROZEN = "frozen"
TASKS = {"causal_lm": TaskType.CAUSAL_LM, "sequence_classification": TaskType.SEQ_CLS}


def peft_config(args: "FederatedConfig") -> LoraConfig:
    """The PEFT config that a run's options describe: stock LoRA, or direction/magnitude LoRA."""
    kind = DirMagLoraConfig if args.adapter == "dirmag" else LoraConfig
    targets = args.target_modules
    return kind(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type=TASKS[args.task],
    )


def with_adapter(model: nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    """`model` with a fresh adapter, drawn from `seed` alone.

    ConfigError when the target modules match nothing, or the config asks for what cannot travel (adapter/contract.py).
    """
    check_config(config)
    targets = getattr(config, "target_modules", None)
    names = [name for name, _ in model.named_modules()]
    linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    rest = f"this model's linear layers end in {', '.join(linear[:12])}; pass --target_modules with some of them"
    listed = sorted(targets) if targets is not None and not isinstance(targets, str) else []
    lost = [target for target in listed if not any(f".{name}".endswith(f".{target}") for name in names)]
    if 0 < len(lost) < len(listed):  # PEFT would adapt what it finds, and say nothing of the rest
        raise ConfigError(f"target_modules={','.join(listed)}: no module's name ends in {lost[0]}; {rest}")
    try:
        with torch.random.fork_rng(devices=[]), peft_quiet():
            torch.manual_seed(derive_seed(seed, "adapter"))
            return get_peft_model(model, config)
    except ValueError as error:
        shown = ",".join(listed) or targets or "not given"
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(f"target_modules={shown}: no adapter could be added ({reason}); {rest}") from None


def check_config(config: PeftConfig, *, initialised: bool = False) -> None:
    """ConfigError for an adapter that is not LoRA, or is more than a federation can carry.

    initialised: it is in a model already.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"peft_config is a {type(config).__name__}: only LoRA travels; pass a peft.LoraConfig")
    reason = contract.unknown(config) or contract.refusal(
        {field.name: getattr(config, field.name) for field in fields(LoraConfig)},
        trained=False,
        initialised=initialised,
    )
    if reason is not None:
        raise ConfigError(f"peft_config: {reason}")


def own_adapter(model: PeftModel) -> str:
    """The name of the one adapter that a model has active; ConfigError where there are several."""
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ConfigError(f"model: {len(active)} active adapters ({', '.join(active)}); activate the one to train")
    return active[0]


class AdapterSlot:
    """One named adapter inside a PEFT model: states are read from it and written into it, in place.

    Module names are the base model's own ("model.layers.0.self_attn.q_proj"). Writing keeps the parameters' identity,
    so an optimizer or a wrapper that holds them goes on working.
    """

    def __init__(self, model: PeftModel, name: str = DEFAULT) -> None:
        if name not in getattr(model, "peft_config", {}):
            raise AdapterError(f"adapter {name!r}: not in the model ({', '.join(getattr(model, 'peft_config', {}))})")
        self.model, self.name = model, name
        self.layers: dict[str, Any] = dict(sorted(_lora_layers(model.get_base_model(), name)))
        self.wrappers: dict[str, Any] = dict(
            sorted(
                (path, module)
                for path, module in model.get_base_model().named_modules()
                if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
            )
        )
        if not self.layers:
            raise AdapterError(f"adapter {name!r}: has no LoRA layers; use a LoraConfig or DirMagLoraConfig")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The slot's trainable parameters, in module order."""
        for layer in [*self.layers.values(), *self.wrappers.values()]:
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and f".{self.name}." in f".{name}.":
                    yield parameter

    def check_owns_all(self) -> None:
        """ConfigError when the model would train a parameter that is not the slot's.

        It would be trained by one client after the other, and neither sent nor saved.
        """
        own = {id(parameter) for parameter in self.parameters()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                raise ConfigError(
                    f"model: {name} is trainable and no part of adapter {self.name!r}, so it would leak from client to "
                    "client; freeze it (requires_grad_(False)) or name its module in modules_to_save"
                )

    def modules(self) -> list[nn.Module]:
        """The modules that hold the slot's parameters, and nothing else."""
        return [place[self.name] for place in self.places()]

    def places(self) -> list[nn.ModuleDict]:
        """Where these modules stand, each under the slot's name: A and B of every layer, then what is trained whole."""
        factors = [factors for layer in self.layers.values() for factors in (layer.lora_A, layer.lora_B)]
        return [*factors, *(wrapper.modules_to_save for wrapper in self.wrappers.values())]

    def checksum(self) -> str:
        """A hash of the adapter's values, to the bit."""
        digest = hashlib.sha256()
        for module in self.modules():
            for _, tensor in sorted(module.state_dict().items()):
                digest.update(_copy(tensor).numpy().tobytes())
        return digest.hexdigest()

    def train_only(self, parts: Iterable[str]) -> None:
        """Leave trainable the factors ("A", "B") or parts of them ("A.direction") that are named, and whole tensors.

        Parts need a direction/magnitude adapter; ConfigError otherwise.
        """
        chosen = set(parts)
        if is_dirmag(self.model, self.name):
            set_trainable_parts(self.model, [part for part in PARTS if chosen & {part, part[0]}], self.name)
            return
        if odd := chosen - {"A", "B"}:
            raise ConfigError(f"part {sorted(odd)[0]!r}: a plain LoRA adapter has A and B only; pass --adapter dirmag")
        for layer in self.layers.values():
            layer.lora_A[self.name].requires_grad_("A" in chosen)
            layer.lora_B[self.name].requires_grad_("B" in chosen)

    def message_bytes(self, parts: Iterable[str]) -> int:
        """Bytes of what a client that trains `parts` has to send: those parts and the whole tensors, in float32."""
        chosen = set(parts)
        size = sum(tensor.numel() for _, tensor in self._extras()) * 4
        if is_dirmag(self.model, self.name):
            return size + 4 * phase_size(self.model, [p for p in PARTS if chosen & {p, p[0]}], self.name).numbers
        for layer in self.layers.values():
            size += 4 * sum(getattr(layer, f"lora_{factor}")[self.name].weight.numel() for factor in sorted(chosen))
        return size

    def read(self) -> AdapterState:
        """The adapter as it stands: detached float32 copies on the CPU."""
        factors = {
            module: LoraFactors(
                _copy(layer.lora_A[self.name].weight), _copy(layer.lora_B[self.name].weight), layer.scaling[self.name]
            )
            for module, layer in self.layers.items()
        }
        return AdapterState(factors, {name: _copy(tensor) for name, tensor in self._extras()})

    @torch.no_grad()
    def write(self, state: AdapterState) -> None:
        """Put `state` into the model. Lower ranks are padded with zeros; a higher rank is an AdapterError, unless what
        is too much of it is zeros."""
        if set(state) != set(self.layers):
            odd = sorted(set(state) ^ set(self.layers))[0]
            raise AdapterError(f"module {odd!r}: is in the state or in the model but not in both; load the right model")
        for module, layer in self.layers.items():
            lora_A, lora_B = layer.lora_A[self.name], layer.lora_B[self.name]
            rank = lora_A.out_features
            factors = _without_idle_rank(state[module], rank)
            if factors.rank > rank:
                raise AdapterError(
                    f"{module}: rank {factors.rank} does not fit the model's {rank}; truncate it or raise lora_r"
                )
            if factors.shape != (lora_B.out_features, lora_A.in_features):
                raise AdapterError(
                    f"{module}: is {factors.shape} in the state and {(lora_B.out_features, lora_A.in_features)} in the "
                    "model; load the right model"
                )
            factors = factors.rescaled(layer.scaling[self.name]).padded(rank)
            write_factor(lora_A, factors.A)
            write_factor(lora_B, factors.B)
        for name, tensor in self._extras():
            if name in state.extras:
                if state.extras[name].shape != tensor.shape:
                    raise AdapterError(
                        f"{name}: is {tuple(state.extras[name].shape)} in the state and {tuple(tensor.shape)} in the "
                        "model; load the right model"
                    )
                tensor.copy_(state.extras[name])

    def _extras(self) -> Iterator[tuple[str, Tensor]]:
        for path, wrapper in self.wrappers.items():
            for name, tensor in wrapper.modules_to_save[self.name].state_dict(keep_vars=True).items():
                yield f"{path}.{name}", tensor

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the slot, as stock PEFT writes it; of direction/magnitude LoRA also its side-car."""
        side_car = None
        with tempfile.TemporaryDirectory() as folder:
            self.model.peft_config[self.name].save_pretrained(folder)
            content = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            if (Path(folder) / SIDE_CAR).is_file():
                side_car = json.loads((Path(folder) / SIDE_CAR).read_text(encoding="utf-8"))
        content["inference_mode"] = True
        for name, value in content.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                content[name] = sorted(value)  # PEFT keeps sets; a set has no order to reproduce
        return content if side_car is None else {**content, SIDE_CAR: side_car}


def slot_rank(slot: AdapterSlot) -> int:
    """The largest rank of the slot's layers."""
    return max(layer.lora_A[slot.name].out_features for layer in slot.layers.values())


def slot_ranks(slot: AdapterSlot) -> dict[str, int]:
    """{module: its rank}; they differ where a rank_pattern says so."""
    return {module: layer.lora_A[slot.name].out_features for module, layer in slot.layers.items()}


def write_initial(slot: AdapterSlot, state: AdapterState, where: str) -> None:
    """Start from an adapter on disk; ConfigError when it holds more than the slot has a place for."""
    places = {name for name, _ in slot._extras()}
    if lost := sorted(set(state.extras) - places):
        raise ConfigError(
            f"initial_adapter={where!r}: holds {lost[0]}, for which this run's adapter has no place; pass a "
            "peft_config with modules_to_save for that module, or leave the tensor out of the adapter"
        )
    ranks = slot_ranks(slot)
    for module in sorted(set(state) & set(ranks)):
        if (rank := _without_idle_rank(state[module], ranks[module]).rank) > ranks[module]:
            raise ConfigError(
                f"initial_adapter={where!r}: {module} has rank {rank}, more than the run's {ranks[module]}; "
                f"pass --lora_r {rank}"
            )
    slot.write(state)


def _without_idle_rank(factors: LoraFactors, rank: int) -> LoraFactors:
    """The factors cut to `rank` where the rest adds nothing; as they are otherwise."""
    if factors.rank <= rank or (factors.A[rank:].any() and factors.B[:, rank:].any()):
        return factors
    return LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scale)


def slot_facts(slot: AdapterSlot, kind: str) -> dict[str, Any]:
    """What the run record says of the adapter."""
    config: Any = slot.model.peft_config[slot.name]
    return {
        "kind": kind,
        "r": slot_rank(slot),
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in slot.layers}),
        "parameters": sum(parameter.numel() for parameter in slot.parameters()),
    }


def set_frozen(model: PeftModel, state: Mapping[str, LoraFactors] | None) -> None:
    """Keep `state` as a second, frozen adapter under the trained one (None: take it away).

    Its rank may be anything, so an exact aggregate of growing rank can stand under fresh factors of the usual rank.
    """
    if state is None and FROZEN not in model.peft_config:
        return
    name = next(active for active in model.active_adapters if active != FROZEN)
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
        model.set_adapter(name)
    if state is None:
        return
    config = model.peft_config[name]
    rank = max(factors.rank for factors in state.values())
    plain = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(state), task_type=config.task_type)
    with peft_quiet():
        model.add_adapter(FROZEN, plain)
    AdapterSlot(model, FROZEN).write(AdapterState(state, {}))
    under = AdapterSlot(model, FROZEN)
    for layer in under.layers.values():  # the layers alone: a head that is trained whole takes one adapter at a time
        layer.set_adapter([FROZEN, name])
        layer.lora_A[FROZEN].requires_grad_(False)
        layer.lora_B[FROZEN].requires_grad_(False)
    for wrapper in under.wrappers.values():
        wrapper.modules_to_save[FROZEN].requires_grad_(False)


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Without two of PEFT's warnings: its own use of a deprecated name, and that one model has several adapters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        yield


def _lora_layers(base: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            if name in module.lora_embedding_A:
                raise AdapterError(f"{path}: LoRA on an embedding cannot be aggregated; leave it out of target_modules")
            if name in module.lora_A:
                if not isinstance(module.get_base_layer(), nn.Module) or not hasattr(
                    module.lora_A[name], "out_features"
                ):
                    raise AdapterError(
                        f"{path}: LoRA on a {type(module).__name__} cannot be aggregated; target linear layers only"
                    )
                if module.use_dora.get(name) if hasattr(module, "use_dora") else False:
                    raise AdapterError(f"{path}: DoRA magnitudes cannot be aggregated; use plain LoRA or dirmag")
                yield path, module


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
