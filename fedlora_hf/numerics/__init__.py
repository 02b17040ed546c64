"""Pure numerics on tensors: torch and math only. A low-rank matrix is a pair (B, A) with W = B @ A, scale folded in."""
# SPDX-License-Identifier: Apache-2.0
