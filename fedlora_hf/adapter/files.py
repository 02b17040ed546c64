"""Adapters on disk: stock PEFT LoRA folders, read lazily and written whole; safetensors alone, no PEFT, no pickle."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fedlora_hf.adapter.contract import refusal
from fedlora_hf.adapter.stored import StoredFile
from fedlora_hf.errors import AdapterError, one_line
from fedlora_hf.update import AdapterState, LoraFactors, Outline
from fedlora_hf.util.disk import read_json, write_atomically

CONFIG, WEIGHTS, SIDE_CAR = "adapter_config.json", "adapter_model.safetensors", "dirmag_config.json"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_NAME_LENGTH = 300
# Of the expressions in rank_pattern and alpha_pattern: characters looked at while matching, and number [our choice].
MAX_MATCH_STEPS, MAX_EXPRESSIONS = 1e9, 1000
_TEXT, _TEXTS = (str, type(None)), (str, list, type(None))
_TAKEN_OVER: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "bias"), _TEXT),
    **dict.fromkeys(("target_modules", "modules_to_save"), _TEXTS),
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("fan_in_fan_out", "inference_mode", "use_rslora"), (bool,)),
    "init_lora_weights": (bool, str),
}
_LITERAL = re.compile(r"[\w.-]*")
_REPEAT = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Keys of adapters that are LoRA by name but not W + scale * B A of a linear layer.
_REFUSED = {
    "lora_magnitude_vector": "DoRA magnitudes",
    "lora_embedding_": "an embedding's LoRA",
    "lora_A.bias": "a LoRA bias",
    "lora_B.bias": "a LoRA bias",
}


class StoredFactors(Mapping[str, LoraFactors]):
    """{module: LoraFactors} of one safetensors file; a module is read when it is asked for, and not kept."""

    def __init__(self, file: StoredFile, keys: Mapping[str, tuple[str, str]], scales: Mapping[str, float]) -> None:
        self._file, self._keys, self._scales = file, keys, scales

    def __getitem__(self, module: str) -> LoraFactors:
        A, B = _tensors(self._file, *self._keys[module])
        return LoraFactors(A, B, self._scales[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class StoredTensors(Mapping[str, Tensor]):
    """{name: tensor} of one safetensors file, read when asked for."""

    def __init__(self, file: StoredFile, keys: Mapping[str, str]) -> None:
        self._file, self._keys = file, keys

    def __getitem__(self, name: str) -> Tensor:
        return _tensors(self._file, self._keys[name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _tensors(file: StoredFile, *keys: str) -> list[Tensor]:
    try:
        return file.tensors(*keys)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file.path}: {_first_line(error)}; the file is damaged, copy it again") from None


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterState, dict[str, Any]]:
    """(state read lazily, adapter_config.json as a dict) of a PEFT LoRA folder.

    Raises AdapterError for anything that is not plain LoRA on linear layers in safetensors: another PEFT type, DoRA,
    LoRA biases, embeddings, pickled weights, a damaged file.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: pickled weights can run code when loaded; save the adapter as safetensors instead"
            )
        raise AdapterError(f"{path}: no such file; give a folder written by save_pretrained of a LoRA adapter")
    try:
        file = StoredFile(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: {_first_line(error)}; the file is damaged, copy it again") from None
    return _state(file, config), config


def _state(file: StoredFile, config: Mapping[str, Any]) -> AdapterState:
    path, shapes = file.path, {name: entry.shape for name, entry in file.entries.items()}
    factors: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for name in shapes:
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise AdapterError(f"{path}: {name[:80]!r} is no module's name; save the adapter again")
        for part, what in _REFUSED.items():
            if part in name:
                raise AdapterError(f"{path}: {name} holds {what}; only plain LoRA on linear layers can be aggregated")
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match:
            factors.setdefault(match["module"], {})[match["factor"]] = name
        else:
            extras[name.removeprefix(PREFIX)] = name
    keys, ranks, sizes = {}, {}, {}
    for module, pair in sorted(factors.items()):
        if set(pair) != {"A", "B"}:
            raise AdapterError(
                f"{path}: {module} has lora_{'/'.join(pair)} only; a LoRA module has both lora_A and lora_B"
            )
        A, B = shapes[pair["A"]], shapes[pair["B"]]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise AdapterError(
                f"{path}: {module} has A {list(A)} and B {list(B)}; a linear layer has A (r, in) and B (out, r)"
            )
        keys[module] = (pair["A"], pair["B"])
        ranks[module], sizes[module] = A[0], (B[0], A[1])
    if not keys:
        raise AdapterError(f"{path}: no lora_A / lora_B weights; give a folder written by save_pretrained of LoRA")
    scales = module_scales(config, ranks, str(path))
    outline = Outline({**sizes, **{name: shapes[key] for name, key in extras.items()}}, ranks, scales)
    return AdapterState(StoredFactors(file, keys, scales), StoredTensors(file, extras), outline)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`, checked to be plain LoRA; AdapterError says what is not."""
    path = folder / CONFIG
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; give a folder written by save_pretrained of an adapter") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({one_line(error, 80)}); save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds a {type(config).__name__}; an adapter's config is a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type {str(config.get('peft_type'))!r}; only 'LORA' adapters can be aggregated"
        )
    if (reason := refusal(config, trained=True)) is not None:
        raise AdapterError(f"{path}: {reason}")
    return config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of somebody's adapter_config.json what an aggregate's own may take over: known fields, of the right types.

    The rest would be passed on to whoever loads the aggregate: `auto_mapping` names modules to import, for one.
    Where some layers are left out of the targets, the aggregate's own config is to name its modules in full.
    """
    kept = {name: value for name, value in config.items() if name in _TAKEN_OVER and _is_of(value, _TAKEN_OVER[name])}
    if any(config.get(name) not in (None, []) for name in ("layers_to_transform", "exclude_modules")):
        kept["target_modules"] = []
    return kept


def _is_of(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(value, str):
        return str in kinds and value.isprintable() and len(value) <= MAX_NAME_LENGTH
    if isinstance(value, list):
        return list in kinds and all(_is_of(item, (str,)) for item in value)
    return type(value) in kinds


def module_scales(config: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> dict[str, float]:
    """{module: alpha / r, or alpha / sqrt(r) for rslora}; rank_pattern and alpha_pattern as PEFT matches them.

    ranks: {module: rank of its factors}, which must be what the config says.
    """
    alphas = _matched(config, "alpha_pattern", ranks, config.get("lora_alpha"), where)
    declared = _matched(config, "rank_pattern", ranks, config.get("r"), where)
    scales = {}
    for module, rank in ranks.items():
        alpha = alphas[module]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"{where}: lora_alpha {alpha!r}; must be a finite number; save the adapter again")
        if declared[module] != rank:
            raise AdapterError(
                f"{where}: {module} has rank {rank} but its config says {declared[module]!r}; save the adapter again"
            )
        scales[module] = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def _matched(config: Mapping[str, Any], name: str, modules: Iterable[str], default: Any, where: str) -> dict[str, Any]:
    """{module: value of the first key of config[name] that is a regular expression for the end of its name}.

    A key without signs is looked up. Expressions come from anybody: one that repeats a group is refused, and so are
    all together when matching them could take more than MAX_MATCH_STEPS.
    """
    given = config.get(name)
    values = list(given.values()) if isinstance(given, dict) else []
    patterns = {key: place for place, key in enumerate(given)} if isinstance(given, dict) else {}
    expressions: list[tuple[int, re.Pattern[str]]] = []
    steps, modules = 0.0, list(modules)
    for key, place in patterns.items():
        if _LITERAL.fullmatch(key):
            continue
        steps += sum(float(len(module)) ** (1 + len(_REPEAT.findall(key))) for module in modules) * max(
            1, len(key) / 100
        )
        if _REPEATED_GROUP.search(key) or steps > MAX_MATCH_STEPS or len(expressions) == MAX_EXPRESSIONS:
            raise AdapterError(f"{where}: {name} has {key[:80]!r}, too much to match; write the modules' names out")
        try:
            with warnings.catch_warnings():  # of what a later Python may read otherwise
                warnings.simplefilter("ignore")
                expressions.append((place, re.compile(rf"(.*\.)?({key})$")))
        except (re.error, RecursionError, OverflowError):
            continue
    found = {}
    for module in modules:
        steps_down = module.split(".")
        ends = (".".join(steps_down[start:]) for start in range(len(steps_down)))
        places = [patterns[end] for end in ends if end in patterns]
        places += [place for place, expression in expressions if expression.match(module)]
        found[module] = values[min(places)] if places else default
    return found


def write_adapter(folder: str | os.PathLike[str], state: AdapterState, config: Mapping[str, Any]) -> None:
    """Write `state` as a stock PEFT folder, each file whole or not at all, tensors in float32.

    `config` is an adapter_config.json as a dict; r, lora_alpha and target_modules are set to what the state needs.
    Modules of lower rank or another scale than the config says (its rank_pattern, where that has room for the state)
    are padded and rescaled, which changes no update. What stands under the key
    SIDE_CAR goes to a file of that name: stock PEFT would complain of fields that are not its own.
    """
    folder, config = Path(folder), dict(config)
    side_car = config.pop(SIDE_CAR, None)
    rank = max(factors.rank for factors in state.values())
    scale = next(iter(state.values())).scale
    pattern = _pattern(config, state, str(folder))
    tensors: dict[str, Tensor] = {}
    for module, factors in state.items():
        own_rank, own_scale = pattern.get(module, (rank, scale))
        written = factors.to(torch.float32).rescaled(own_scale).padded(own_rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = written.A.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = written.B.contiguous()
    for name, tensor in state.extras.items():
        tensors[PREFIX + name] = tensor.contiguous()
    scaling = {} if pattern else rank_and_alpha(config, rank, scale)
    content = {**config, **scaling, "target_modules": target_modules(config, list(state))}
    write_atomically(folder / WEIGHTS, safetensors_bytes(tensors, metadata={"format": "pt"}))
    if side_car is not None:
        write_atomically(folder / SIDE_CAR, (json.dumps(side_car, indent=2, sort_keys=True) + "\n").encode())
    write_atomically(folder / CONFIG, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _pattern(config: Mapping[str, Any], state: AdapterState, where: str) -> dict[str, tuple[int, float]]:
    """{module: (rank, scale)} as rank_pattern and alpha_pattern give them; {} without them, or where a rank is lower
    than the state's."""
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):
        return {}
    ranks = _matched(config, "rank_pattern", state, config.get("r"), where)
    if any(type(ranks[module]) is not int or ranks[module] < state[module].rank for module in state):
        return {}
    scales = module_scales(config, ranks, where)
    return {module: (ranks[module], scales[module]) for module in state}


def rank_and_alpha(config: Mapping[str, Any], rank: int, scale: float) -> dict[str, Any]:
    """The fields of an adapter_config.json that say rank and scale; as they stand where they already say so."""
    if config.get("r") == rank and not config.get("rank_pattern") and not config.get("alpha_pattern"):
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        if math.isclose(float(config.get("lora_alpha", 0)) / root, scale, rel_tol=1e-12):
            return {}
    alpha = scale * rank
    whole = round(alpha)
    return {
        "r": rank,
        "lora_alpha": whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def target_modules(config: Mapping[str, Any], modules: list[str]) -> Any:
    """The config's target_modules where its names match the modules, all of them and no others; else full names.

    An adapter that lacks what its config names, or has more, is loaded by PEFT with a warning or only in part.
    """
    named = config.get("target_modules")
    if not isinstance(named, list):
        return named
    matches = {name: {m for m in modules if m == name or m.endswith(f".{name}")} for name in named}
    fits = all(matches.values()) and set().union(*matches.values()) == set(modules)
    return named if fits else modules


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
