"""Named tensors on disk: what a server or a client remembers between rounds."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedlora_hf.aggregation.soundness import unsound
from fedlora_hf.errors import RecordError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, finite all of them; {} where there is none."""
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        found = dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise RecordError(f"{path}: not readable ({type(error).__name__}); resume from an earlier round") from None
    if bad := [name for name, tensor in found.items() if unsound(tensor)]:
        raise RecordError(f"{path}: {bad[0]} {unsound(found[bad[0]])}; resume from an earlier round")
    return found
