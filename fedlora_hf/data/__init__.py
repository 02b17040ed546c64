"""From published instruction data to one train/validation/test split a client: formats, partition, clients, tokens."""
# SPDX-License-Identifier: Apache-2.0
