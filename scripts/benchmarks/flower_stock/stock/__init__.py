"""The usual Flower app for LoRA."""
# SPDX-License-Identifier: Apache-2.0
