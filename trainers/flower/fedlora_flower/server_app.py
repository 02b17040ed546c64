"""What the SuperLink runs: the package's ServerApp."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.flower.server_app import app

__all__ = ["app"]
