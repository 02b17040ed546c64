"""Base and adapter as one model: a stock transformers folder, with the tokenizer and a card."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fedlora_hf.errors import AdapterError, ConfigError
from fedlora_hf.hub.text import hub_id
from fedlora_hf.launch.quiet import no_bars_in_logs
from fedlora_hf.rounds.output import CLIENTS
from fedlora_hf.using.finished import Adapter, Finished
from fedlora_hf.using.loaded import Loaded, base_name
from fedlora_hf.util.disk import write_atomically
from fedlora_hf.util.names import fit_id

# Of the largest logit: what the sums of a merged matrix and of two separate ones differ by at most in float32.
TOLERANCE = 1e-3


def check_place(run: Finished, output_dir: str, base: str | None) -> None:
    """ConfigError unless a merged model may be written to `output_dir`: an empty or new folder, apart from its
    sources."""
    place = Path(output_dir)
    sources = [run.folder, *([Path(name)] if os.path.isdir(name := base_name(run, base)) else [])]
    out = place.resolve()
    for source in sources:
        given = source.resolve()
        if out == given or given in out.parents or out in given.parents:
            raise ConfigError(f"output_dir={output_dir!r}: overlaps with {str(source)!r}, which is read; name another")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"output_dir={output_dir!r}: is there and not empty; name a new folder")


def merge(run: Finished, loaded: Loaded, adapter: Adapter, output_dir: str, dtype: str = "float32") -> float:
    """Write base + adapter to `output_dir`; the largest difference between the merged logits and those of the adapter
    on its base, on a few fixed tokens, as a share of the largest logit.

    loaded: in float32, in which the sum is taken; dtype: of what is written. Raises AdapterError, and writes nothing,
    where the two differ by more than rounding: an adapter on weights that the base shares between layers, for one.
    """
    with loaded.using(adapter) as model:
        before = _logits(model, run)
    merged = loaded.merged(adapter)
    after = _logits(merged, run)
    error = float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise AdapterError(
            f"{adapter.folder}: merged, the model gives other logits than base and adapter (by {error:.2g} of the "
            "largest); the base may share the adapted weights between layers, use the adapter as it is"
        )
    merged = merged.to(getattr(torch, dtype))
    with no_bars_in_logs():
        merged.save_pretrained(output_dir)
    loaded.tokenizer.save_pretrained(output_dir)
    write_atomically(Path(output_dir) / "README.md", card(run, adapter, dtype).encode())
    return error


def card(run: Finished, adapter: Adapter, dtype: str) -> str:
    """A short card; of the base its Hub id alone, since a path on this machine is nobody's business."""
    base = hub_id(run.record.model, "name_or_path")
    data = {"library_name": "transformers", "tags": ["fedlora_hf", "federated-learning"]}
    data |= {"base_model": base, "base_model_relation": "finetune"} if base else {}
    whose = f"the personal adapter of `{fit_id(adapter.name)}`"
    if adapter.folder is not None and adapter.folder.parent.name != CLIENTS:
        whose = "the global adapter" + ("" if adapter.name == "global" else f" of {adapter.name}")
    about = (
        f"{base or 'A base model'} with {whose} of a federated run ({run.record.method}, {len(run.record.rounds)} "
        f"rounds) added to its weights in float32 and written in {dtype}. No adapter library is needed to load it."
    )
    wording = f"\n\nTrained in this wording: `{json.dumps(dict(run.wording))}`" if run.wording else ""
    return f"---\n{yaml.safe_dump(data)}---\n\n# Merged model\n\n{about}{wording}\n"


@torch.no_grad()
def _logits(model: Any, run: Finished) -> Tensor:
    """Of eight tokens, spread over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    ids = torch.linspace(0, size - 1, 8, device=device).long().unsqueeze(0)
    more = {"decoder_input_ids": ids} if run.task_type == "SEQ_2_SEQ_LM" else {}
    found = model.eval()(input_ids=ids, **more)
    out = getattr(found, "logits", None)
    if out is None:
        out = found.last_hidden_state if hasattr(found, "last_hidden_state") else found.start_logits
    return out.float().cpu()
