"""The run record: what a run did, as JSON."""
# SPDX-License-Identifier: Apache-2.0
