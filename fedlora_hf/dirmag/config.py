"""DirMagLoraConfig: a LoraConfig whose factors are split into magnitude and direction, and its two named phases.

On disk an adapter is plain LoRA with a stock adapter_config.json, which anybody loads without this package. What is
ours stands beside it in dirmag_config.json.
"""
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from torch import nn

from fedlora_hf.dirmag.lora import dispatch, stock_config
from fedlora_hf.dirmag.recipe import Recipe
from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.util.disk import read_json

SIDECAR = "dirmag_config.json"
MAX_SIDECAR_BYTES = 1024 * 1024
OWN_FIELDS = tuple(field.name for field in fields(Recipe))
# LoRA options that change what the factors are; a magnitude and a direction of them would mean something else.
REFUSED = ("use_dora", "lora_bias", "target_parameters", "use_qalora", "use_bdlora", "ensure_weight_tying")


@dataclass
class DirMagLoraConfig(Recipe, LoraConfig):
    """LoRA with `A = A_M * A_D` and `B = B_M * B_D` (FedLoRA-Optimizer, arXiv 2510.11274); use it as a LoraConfig.

    trainable_parts: which of A.direction, A.magnitude, B.direction, B.magnitude train (default all);
        `set_trainable_parts` changes it on a model.
    axis_a, axis_b: "row" (default; A has r magnitudes, B has out_features) or "column" (in_features, and r).
    direction_seed: seed of the directions that rows of B = 0 start with; clients that are averaged need one seed.

    The adapter is the identity at the start, as plain LoRA is: B's magnitudes are 0, its directions are not. From
    there only B's magnitudes have a gradient; a run that trains A's direction alone has to start from a trained B.
    ConfigError for a value that cannot be used or a LoRA option that is not combinable.

    ```python
    from peft import get_peft_model

    from fedlora_hf import DirMagLoraConfig

    config = DirMagLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_parts=["B.magnitude"])
    adapted = get_peft_model(model, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("magnitude" in name for name in trained)
    ```
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_recipe()
        for name in REFUSED:
            if getattr(self, name, None):
                raise ConfigError(f"{name}={getattr(self, name)!r}: not combinable with DirMagLoraConfig; leave it out")
        self._register_custom_module({nn.Module: dispatch})  # type: ignore[dict-item]  # a callable does too

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write a stock adapter_config.json, and our own fields to dirmag_config.json beside it."""
        stock_config(self).save_pretrained(save_directory, **kwargs)
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        Path(save_directory, SIDECAR).write_text(json.dumps(own, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "DirMagLoraConfig":
        """The configuration of an adapter in a folder or Hub repository (`revision`, `token` ... as PEFT takes them).

        Fields of our own may be given to override the saved ones. A plain LoRA adapter, without side-car, gets the
        defaults. A phase (`DirectionPhaseConfig`) keeps its own parts. AdapterError for a side-car of another version.
        """
        given = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        stock = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        saved = _read_sidecar(pretrained_model_name_or_path, subfolder, kwargs)
        if cls is not DirMagLoraConfig:
            saved.pop("trainable_parts", None)
        values = {field.name: getattr(stock, field.name) for field in fields(LoraConfig) if field.init}
        return cls(**{**values, **saved, **given})


def _read_sidecar(source: str, subfolder: str | None, hub_options: dict[str, Any]) -> dict[str, Any]:
    """Our fields as saved beside an adapter, {} when it has none."""
    if Path(source).is_dir():
        path = Path(source, subfolder or "", SIDECAR)
        if not path.is_file():
            return {}
    else:
        try:
            path = Path(hf_hub_download(source, SIDECAR, subfolder=subfolder, **hub_options))
        except LocalEntryNotFoundError:
            raise AdapterError(
                f"{source}: {SIDECAR} is not in the local cache and the Hub was not reached; go online once"
            ) from None
        except EntryNotFoundError:
            return {}
    try:
        saved = read_json(path, MAX_SIDECAR_BYTES)
        unknown = sorted(set(saved) - set(OWN_FIELDS))
    except (OSError, ValueError, TypeError):
        raise AdapterError(f"{path}: is not a JSON object; write the adapter again with save_pretrained") from None
    if unknown:
        raise AdapterError(f"{path}: unknown field {unknown[0]!r}, written by another version; use that version")
    return dict(saved)


@dataclass
class DirectionPhaseConfig(DirMagLoraConfig):
    """The global phase: only A's directions train (r * in_features numbers a module). Needs an adapter with B != 0."""

    trainable_parts: Any = ("A.direction",)


@dataclass
class MagnitudePhaseConfig(DirMagLoraConfig):
    """The local phase: only B's magnitudes train (out_features numbers a module). Its learning rate is about 5e-2."""

    trainable_parts: Any = ("B.magnitude",)


__all__ = ["SIDECAR", "DirMagLoraConfig", "DirectionPhaseConfig", "MagnitudePhaseConfig"]
