"""The garbage collector waits while modules are imported, and is as it was afterwards."""
# SPDX-License-Identifier: Apache-2.0

import gc
import subprocess
import sys

import pytest

from fedlora_hf.launch.collecting import not_collecting


def _fails(own_process: bool) -> None:
    with not_collecting(own_process):
        assert not gc.isenabled()
        raise ImportError("gone")


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("own_process", [True, False])
def test_it_waits_and_is_as_it_was(collecting: bool, own_process: bool) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError, match="gone"):
            _fails(own_process)
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert gc.get_freeze_count() == frozen  # torch was there before: what there is may be a user's


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("from fedlora_hf.cli import loaded; loaded('train', 'train')", True),
        ("from fedlora_hf import FederatedTrainer", False),
    ],
)
def test_only_a_command_leaves_what_it_imported_alone_for_good(code: str, kept: bool) -> None:
    told = f"import gc; {code}; print(gc.isenabled(), gc.get_freeze_count() > 10 ** 5)"
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", str(kept)]
