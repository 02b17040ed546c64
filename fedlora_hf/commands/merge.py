"""`fedlora merge`: base + adapter + tokenizer as a stock transformers folder."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.errors import ConfigError
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.loaded import load
from fedlora_hf.using.merging import check_place, merge


def merge_run(
    folder: str,
    output_dir: str,
    *,
    client: str | None = None,
    group: str | None = None,
    dtype: str = "auto",
    base: str | None = None,
) -> None:
    """Write the merged model and say how exact it is. dtype: "auto" is the dtype that the run loaded its base in."""
    run = Finished.read(folder)
    if client and group:
        raise ConfigError(f"client={client!r} and group={group!r}: one adapter is merged; leave out one")
    adapter = run.adapters([client] if client else [], groups=[group] if group else [])[0]
    check_place(run, output_dir, base)
    # Summed in float32, whatever is written; a base in 4 or 8 bits has no weights to add to, so it is loaded whole.
    whole = {"load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False}
    loaded = load(run, base, model_dtype="float32", use_cpu=True, **whole)
    recorded = str(run.record.model.get("dtype") or "float32")
    chosen = (recorded if recorded in ("float32", "bfloat16", "float16") else "float32") if dtype == "auto" else dtype
    error = merge(run, loaded, adapter, output_dir, chosen)
    print(  # noqa: T201
        f"{output_dir}: the base with the {adapter.name} adapter in it, {chosen}; its logits are those of "
        f"base and adapter up to {error:.1e} of the largest, in float32"
    )
