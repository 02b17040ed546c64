"""Adapters: on disk, and in a PEFT model."""
# SPDX-License-Identifier: Apache-2.0
