"""One client's side: its local steps, its scores, its choice of a personal adapter."""
# SPDX-License-Identifier: Apache-2.0
