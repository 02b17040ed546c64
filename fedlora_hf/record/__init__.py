"""The run record: what a run did, as JSON."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.record.record import RunRecord

__all__ = ["RunRecord"]
