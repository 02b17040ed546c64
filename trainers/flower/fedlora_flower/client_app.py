"""What every SuperNode runs: the package's ClientApp."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.flower.client_app import app

__all__ = ["app"]
